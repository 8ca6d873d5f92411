"""Every benchmark can be imported, and those that need no real data run at their smallest size; figures are not checked."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.small_page import page_runs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.rglob("*.py"))
# Real X-rays are not part of this project, and the GPU parts take minutes even with --small.
RUNNABLE = [script for script in SCRIPTS if script.parent.name not in ("real", "gpu")]
# Imported by several scripts, not run themselves.
SHARED = ("gpu/part.py", "real/squeezenet.py", "real/squeezenet_weights.py", "real/squeezenet_yolo.py")


def name(script):
    return str(script.relative_to(FOLDER))


def load(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the scripts add the project's folder
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # timm looks up the module that registers a network
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_benchmark_can_be_imported_and_has_a_main_function(script, monkeypatch):
    module = load(script, monkeypatch)
    assert hasattr(module, "main") == (name(script) not in SHARED)
    assert hasattr(module, "SMALLEST") == (script in RUNNABLE)


@pytest.mark.parametrize("script", RUNNABLE, ids=name)
def test_a_benchmark_runs_at_its_smallest_size(script, monkeypatch, tmp_path, capsys):
    module = load(script, monkeypatch)
    arguments = dict(module.SMALLEST)
    if name(script) == "page.py":
        arguments |= {"runs": page_runs(tmp_path), "images": tmp_path / "inputs"}
    if name(script) == "phantoms/ablation.py":
        arguments |= {"folder": tmp_path}
    module.main(**arguments)
    assert any(character.isdigit() for character in capsys.readouterr().out)
