"""The submissions that are shipped: each builds from its runs, and the commands in its head make exactly these runs."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from small_kernels import make_run, make_wheel

from kitlib.fusion import FusionSettings, read_settings, write_settings
from kitlib.kernel import build_kernel
from kitlib.kernel_spec import read_spec
from kitlib.paths import project_root
from kitlib.recipes import RECIPES, recipe
from kitlib.run_notebook import check_parameters

ROOT = project_root()
SIIM = sorted((ROOT / "submissions").glob("siim_*.yaml"))
TRAINING = ("20_pretrain_backbone", "30_train_study", "40_train_detector")


def commands(path: Path) -> list[tuple[str, dict]]:
    """(notebook, parameters) of each `# papermill` line and the indented lines that go on with it."""
    joined: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("# papermill "):
            joined.append(line[2:])
        elif line.startswith("#   ") and joined:
            joined[-1] += " " + line[4:]
    parsed = []
    for line in joined:
        _, notebook, _, option, values = shlex.split(line)
        assert option == "-y"
        parsed.append((Path(notebook).stem, yaml.safe_load(values)))
    return parsed


def made(path: Path) -> dict[str, tuple[str, dict]]:
    """Run folder -> the notebook that makes it and its parameters."""
    return {parameters["run_folder"]: (notebook, parameters) for notebook, parameters in commands(path)}


def test_three_are_shipped_beside_the_demo():
    assert [path.stem for path in SIIM] == ["siim_heidelberg", "siim_lean", "siim_strong"]


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_the_kernel_builds_from_its_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    spec = read_spec(path)
    for run in spec.runs:
        name = made(path)[str(Path(run).parent.relative_to("runs"))][1].get("model_name", Path(run).parent.name)
        make_run(tmp_path / run, model=name, fold=int(run[-1]))
    write_settings(FusionSettings(box_iou=0.55), tmp_path / spec.fusion)
    parts = build_kernel(spec, tmp_path / "out", [make_wheel(tmp_path / "wheels", "kit_extra", "1.2", [])])
    bundles = json.loads((parts["weights"] / "weights.json").read_text())["bundles"]
    assert len(bundles) == len(spec.runs)
    assert [entry["fold"] for entry in bundles] == sorted(entry["fold"] for entry in bundles)
    assert read_settings(parts["weights"] / "fusion.json").box_iou == 0.55
    assert "share = 0.65" in (parts["kernel"] / f"{spec.slug}.ipynb").read_text()


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_its_commands_are_right_and_in_order(path):
    runs: set[str] = set()
    for notebook, parameters in commands(path):
        check_parameters(ROOT / "notebooks" / f"{notebook}.ipynb", parameters)
        overrides = parameters.get("overrides", {})
        if notebook in TRAINING:
            recipe(parameters["recipe"], type(RECIPES[parameters["recipe"]]), **overrides)
        # What a run reads has been made by a command above it.
        read = [parameters.get(name) for name in ("prepare_run", "fuse_run", "source_run", "extra_run")]
        read += parameters.get("runs", []) + parameters.get("extra_runs", [])
        start = overrides.get("starting_weights", "")
        read += [start.removesuffix("/fold0/bundle")] if start.endswith("/bundle") else []
        assert {name for name in read if name} <= runs
        runs.add(parameters["run_folder"])


@pytest.mark.parametrize("path", SIIM, ids=lambda path: path.stem)
def test_its_commands_make_its_runs(path):
    spec, commanded = read_spec(path), made(path)
    for run in spec.runs:
        _, parameters = commanded[str(Path(run).parent.relative_to("runs"))]
        assert int(run[-1]) in parameters.get("folds", range(5))
    used = {str(Path(run).parent.relative_to("runs")) for run in spec.runs}
    fuse = commanded[str(Path(spec.fusion).parent.relative_to("runs"))][1]
    assert set(fuse["runs"]) == used
    # Fused together, models need names of their own: those the training notebooks give by default count too.
    default = {"30_train_study": "study", "40_train_detector": "faster_rcnn"}
    names = [commanded[name][1].get("model_name", default[commanded[name][0]]) for name in used]
    assert len(set(names)) == len(used)
