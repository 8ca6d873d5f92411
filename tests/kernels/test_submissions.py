"""The shipped submissions: each builds from its runs, and its plan produces exactly these runs."""

import itertools
import json
from pathlib import Path

import pytest

from kitlib.competitions.registry import COMPETITIONS, choose_competition
from kitlib.fusion.model_fusion import read_settings, write_settings
from kitlib.kernels.build import build_kernel
from kitlib.kernels.spec import read_spec
from kitlib.models.families import family_of
from kitlib.parameters import read_parameters
from kitlib.paths import project_root
from kitlib.plans.plan import Plan, read_plan
from kitlib.recipes.named import RECIPES, recipe
from tests.small_kernels import make_run, make_wheel

ROOT = project_root()
SHIPPED = [path for path in sorted((ROOT / "submissions").glob("*.yaml")) if not path.stem.startswith("demo")]


def plan_of(path: Path) -> Plan:
    return read_plan(ROOT / "submissions" / "plans" / path.name)


def trained(path: Path) -> dict[str, tuple[str, int, dict]]:
    """Return, by the submission's run, the model's name and fold and the parameters of the planned run that trains it."""
    plan, models = plan_of(path), {}
    for run in read_spec(path, owner="someone").runs:
        folder = (ROOT / run).parent
        (planned,) = (candidate for candidate in plan.planned.values() if candidate.folder == folder)
        fold = int(run.rpartition("fold")[2])
        assert fold in planned.parameters["folds"]
        values = read_parameters(planned.notebook) | planned.parameters
        models[run] = values["model_name"], fold, planned.parameters
    return models


def test_each_competition_has_a_submission():
    siim = ["siim_heidelberg", "siim_lean", "siim_strong"]
    assert [path.stem for path in SHIPPED] == sorted([*siim, "ranzcr_lean", "rsna_lean", "siim_acr_lean", "vinbigdata_lean"])
    assert {read_spec(path, owner="someone").rules.name for path in SHIPPED} == set(COMPETITIONS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_kernel_builds_from_its_runs(path, tmp_path, monkeypatch):
    names = trained(path)
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    spec = read_spec(path)
    classes = [*itertools.chain(*spec.rules.answers.values()), *spec.rules.helping_classes]
    for run, (model, fold, parameters) in names.items():
        family = family_of(RECIPES[parameters["recipe"]]).name
        make_run(tmp_path / run, model=model, fold=fold, family=family, classes=classes)
    if spec.lungs:
        make_run(tmp_path / spec.lungs, family="segmenter")
    write_settings(spec.rules.settings(box_iou=0.55), tmp_path / spec.fusion, spec.rules)
    parts = build_kernel(spec, tmp_path / "out", [make_wheel(tmp_path / "wheels", "kit_extra", "1.2", [])])
    bundles = json.loads((parts["weights"] / "weights.json").read_text())["bundles"]
    assert len(bundles) == len(spec.runs)
    assert [entry["fold"] for entry in bundles] == sorted(entry["fold"] for entry in bundles)
    assert read_settings(parts["weights"] / "fusion.json", spec.rules).box_iou == 0.55
    assert "share = 0.65" in (parts["kernel"] / f"{spec.slug}.ipynb").read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
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
    assert choose_competition(fuse.parameters.get("competition", "siim-covid19"))[0] is spec.rules


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_its_plan_names_existing_recipes_and_fields(path):
    for run in plan_of(path).planned.values():
        if name := run.parameters.get("recipe"):
            recipe(name, type(RECIPES[name]), **run.parameters.get("overrides", {}))


def test_the_second_training_of_a_fold_starts_from_the_first_of_the_same_fold():
    planned = read_plan(ROOT / "submissions" / "plans" / "siim_acr_lean.yaml", changes={"folds": [1, 3]}).planned
    assert [name for name in planned if name.startswith("segmenter")] == ["segmenter-1", "segmenter-3"]
    for fold in (1, 3):
        overrides = planned[f"segmenter-{fold}"].parameters["overrides"]
        assert overrides["starting_weights"] == str(planned[f"first-{fold}"].folder / f"fold{fold}" / "bundle")


def test_pseudo_labels_of_a_fold_come_from_models_validated_on_that_fold():
    planned = read_plan(ROOT / "submissions" / "plans" / "siim_strong.yaml").planned
    for name in ("study", "none", "study_b7", "faster_rcnn", "yolo"):
        for fold in range(5):
            pseudo = planned[Path(planned[f"{name}-{fold}"].parameters["extra_run"]).name].parameters
            assert pseudo["folds"] == [fold]
            assert [Path(run).name for run in pseudo["runs"]] == [
                f"first_{model}-{fold}" for model in ("study", "faster_rcnn", "yolo")
            ]
