"""The shipped submissions: each builds from its runs, and its plan produces exactly these runs."""

import json
from pathlib import Path

import pytest

from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.fusion.model_fusion import read_settings, write_settings
from kitlib.kernels.build import build_kernel
from kitlib.kernels.spec import read_spec
from kitlib.paths import project_root
from kitlib.plans.plan import Plan, read_plan
from kitlib.recipes.named import RECIPES, recipe
from tests.small_kernels import make_run, make_wheel

ROOT = project_root()
SIIM = sorted((ROOT / "submissions").glob("siim_*.yaml"))
TRAINING = ("20_pretrain_backbone", "30_train_study", "40_train_detector")


def plan_of(path: Path) -> Plan:
    return read_plan(ROOT / "submissions" / "plans" / path.name)


def trained(path: Path) -> dict[str, tuple[str, int, dict]]:
    """Return, by the submission's run, the model's name and fold and the parameters of the planned run that trains it."""
    plan, models = plan_of(path), {}
    for run in read_spec(path, owner="someone").runs:
        folder = (ROOT / run).parent
        (planned,) = (candidate for candidate in plan.planned.values() if candidate.folder == folder)
        default = {"30_train_study": "study", "40_train_detector": "faster_rcnn"}[planned.notebook.stem]
        fold = int(run.rpartition("fold")[2])
        assert fold in planned.parameters["folds"]
        models[run] = planned.parameters.get("model_name", default), fold, planned.parameters
    return models


def test_three_siim_submissions_are_shipped():
    assert [path.stem for path in SIIM] == ["siim_heidelberg", "siim_lean", "siim_strong"]


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_the_kernel_builds_from_its_runs(path, tmp_path, monkeypatch):
    names = trained(path)
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    spec = read_spec(path)
    for run in spec.runs:
        make_run(tmp_path / run, model=names[run][0], fold=names[run][1])
    if spec.lungs:
        make_run(tmp_path / spec.lungs, family="segmenter")
    write_settings(SiimFusion(box_iou=0.55), tmp_path / spec.fusion)
    parts = build_kernel(spec, tmp_path / "out", [make_wheel(tmp_path / "wheels", "kit_extra", "1.2", [])])
    bundles = json.loads((parts["weights"] / "weights.json").read_text())["bundles"]
    assert len(bundles) == len(spec.runs)
    assert [entry["fold"] for entry in bundles] == sorted(entry["fold"] for entry in bundles)
    assert read_settings(parts["weights"] / "fusion.json").box_iou == 0.55
    assert "share = 0.65" in (parts["kernel"] / f"{spec.slug}.ipynb").read_text()


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_its_plan_trains_and_fuses_its_models(path):
    plan, spec, models = plan_of(path), read_spec(path, owner="someone"), trained(path)
    assert len({(name, fold) for name, fold, _ in models.values()}) == len(spec.runs)
    fusions = [run for run in plan.planned.values() if run.notebook.stem == "60_fuse"]
    # A submission uses the tuned fusion, not the published one beside it.
    (fuse,) = (run for run in fusions if not run.parameters.get("fixed"))
    assert fuse.folder == (ROOT / spec.fusion).parent
    assert set(fuse.parameters["runs"]) == {str((ROOT / run).parent) for run in spec.runs}
    # The test images are cropped by the segmenter that cropped the training images.
    lungs_runs = {parameters["lungs_run"] for _, _, parameters in models.values() if parameters.get("lungs_run")}
    assert lungs_runs == ({str(ROOT / spec.lungs)} if spec.lungs else set())


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_its_plan_names_existing_recipes_and_fields(path):
    for run in plan_of(path).planned.values():
        if run.notebook.stem in TRAINING:
            name = run.parameters["recipe"]
            recipe(name, type(RECIPES[name]), **run.parameters.get("overrides", {}))


def test_pseudo_labels_of_a_fold_come_from_models_validated_on_that_fold():
    planned = read_plan(ROOT / "submissions" / "plans" / "siim_strong.yaml").planned
    for name in ("study", "none", "study_b7", "faster_rcnn", "yolo"):
        for fold in range(5):
            pseudo = planned[Path(planned[f"{name}-{fold}"].parameters["extra_run"]).name].parameters
            assert pseudo["folds"] == [fold]
            assert [Path(run).name for run in pseudo["runs"]] == [
                f"first_{model}-{fold}" for model in ("study", "faster_rcnn", "yolo")
            ]
