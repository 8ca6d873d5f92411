import json
import math
import subprocess
import sys
import time
import types
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from kitlib import paths
from kitlib.errors import RunError
from kitlib.runs import record as run_record
from kitlib.runs.record import finish_run, git_commit, kitlib_digest, process_record, start_run


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project at tmp_path, so that runs are written below it."""
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    monkeypatch.setattr(paths, "on_kaggle", lambda: False)
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_a_record_keeps_a_notebooks_parameters_and_nothing_else(tmp_path):
    parameters = {
        "recipe": "lean",
        "folds": [0, 1],
        "overrides": {"epochs": 2, "size": None},
        "share": 0.5,
        "resume": True,
        "limit": math.inf,
    }
    others = {
        "_hidden": 1,
        "In": ["", "x = 1"],
        "Out": {},
        "np": np,
        "path": tmp_path,
        "table": pd.DataFrame({"a": [1]}),
        "tables": [pd.DataFrame()],
        "STUDY_CLASSES": ["negative"],
        "by_number": {1: "one"},
        "function": start_run,
        "pair": (1, 2),
    }
    run = start_run("study", {**parameters, **others})
    assert run == tmp_path / "runs" / "study"
    # JSON has no infinity
    assert read(run / "record.json")["parameters"] == {**parameters, "limit": None}


def test_a_run_started_again_is_unfinished_and_has_a_new_record():
    run = start_run("study", {"seed": 1})
    finish_run(run, {"score": 0.5})
    assert read(run / "metrics.json") == {"score": 0.5}
    assert start_run("study", {"seed": 2}) == run
    record = read(run / "record.json")
    assert record["parameters"] == {"seed": 2}
    assert "wall_s" not in record and not (run / "metrics.json").exists()


def test_a_finished_run_records_its_time_memory_and_versions():
    before = datetime.now(UTC)
    run = start_run("study", {})
    time.sleep(0.2)
    finish_run(run, {})
    record = read(run / "record.json")
    assert 0.2 <= record["wall_s"] < 10
    assert abs((datetime.fromisoformat(record["started"]) - before).total_seconds()) < 2
    assert "." not in record["started"]  # whole seconds, because times are compared as texts
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["versions"]["numpy"] == np.__version__ and record["versions"]["pandas"] == pd.__version__
    assert record["cpus"] >= 1 and record["host"] and record["image"]["platform"]
    # numpy and pandas alone take tens of MB; KiB mistaken for bytes would give less than 1 MB
    assert 30 < record["peak_memory_mb"] < 100_000


def test_figures_that_are_not_defined_are_null():
    run = start_run("report", {})
    finish_run(run, {"score": float("nan"), "parts": {"opacity": np.float64("nan"), "none": 0.5}, "folds": [0, 1]})
    assert read(run / "metrics.json") == {"score": None, "parts": {"opacity": None, "none": 0.5}, "folds": [0, 1]}


def test_a_run_that_was_not_started_cannot_be_finished(tmp_path):
    with pytest.raises(RunError, match=r"record\.json is missing or damaged.*call start_run before"):
        finish_run(tmp_path, {})
    assert not (tmp_path / "metrics.json").exists()


def test_memory_of_children_is_recorded_in_a_process_with_little_memory():
    # The child fills 200 MB; its parent imports only kitlib.runs.record, and its own peak must stay small.
    code = (
        "import subprocess, sys; from kitlib.runs.record import process_record;"
        "subprocess.run([sys.executable, '-c', 'bytearray(200_000_000)'], check=True);"
        "record = process_record(); print(record['peak_memory_mb'], record['peak_child_memory_mb'], record['gpu'])"
    )
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # Started by a process as large as this one, the child would count as large as that.
    peak, child_peak = map(int, words[:2])
    assert peak < 150 and child_peak >= 200
    assert words[2] == "None"


def test_a_gpu_is_recorded_only_where_torch_has_used_one(monkeypatch):
    def torch_with(initialised, peaks):
        def never(*_):
            raise AssertionError("queried a GPU that nothing has used")

        count = (lambda: len(peaks)) if initialised else never
        return types.SimpleNamespace(
            cuda=types.SimpleNamespace(
                is_initialized=lambda: initialised,
                device_count=count,
                max_memory_allocated=peaks.__getitem__,
                get_device_name=lambda index: f"T{index}",
            )
        )

    nothing = {"gpu": None, "peak_gpu_memory_mb": None}
    for torch, expected in (
        (torch_with(False, []), nothing),
        (torch_with(True, [0, 0]), nothing),
        (torch_with(True, [0, 3_400_000]), {"gpu": "T1", "peak_gpu_memory_mb": 3}),
        (torch_with(True, [5_000_000, 3_000_000]), {"gpu": "T0, T1", "peak_gpu_memory_mb": 5}),
    ):
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert process_record().items() >= expected.items()
    monkeypatch.delitem(sys.modules, "torch")
    assert process_record().items() >= nothing.items()


def test_the_commit_is_returned_and_marked_where_files_differ_from_it(tmp_path):
    assert git_commit(tmp_path) is None  # not a clone
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    git = ["git", "-C", str(tmp_path), *author]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "First"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result").write_text("not a source")
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{head}+changes"
    # A folder inside a repository is not its root.
    assert git_commit(tmp_path / "runs") is None


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None
    assert read(start_run("study", {}) / "record.json")["git_commit"] is None


def test_kaggles_docker_image_is_recorded_where_it_identifies_itself(tmp_path, monkeypatch):
    (tmp_path / "commit").write_text("commit of the image\n")
    (tmp_path / "built").write_bytes(b"built of the image \xff\n")  # not UTF-8
    monkeypatch.setattr(run_record, "IMAGE_FILES", {name: str(tmp_path / name) for name in ("commit", "built")})
    monkeypatch.setenv("KAGGLE_DOCKER_IMAGE", "gcr.io/kaggle-images/python@sha256:12")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    record = read(start_run("study", {}) / "record.json")
    assert record["kaggle_run_type"] == "Batch"
    assert (
        record["image"].items()
        >= {
            "name": "gcr.io/kaggle-images/python@sha256:12",
            "commit": "commit of the image",
            "built": "built of the image \ufffd",
        }.items()
    )
    monkeypatch.setattr(run_record, "IMAGE_FILES", {"commit": str(tmp_path / "none")})
    monkeypatch.delenv("KAGGLE_DOCKER_IMAGE")
    assert list(read(start_run("study", {}) / "record.json")["image"]) == ["platform"]


def test_the_digest_follows_the_librarys_files_and_nothing_else(tmp_path, monkeypatch):
    for name, text in {"__init__.py": "", "a.py": "1", "a.yaml": "1", "notes.txt": "1"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(run_record.kitlib, "__file__", str(tmp_path / "__init__.py"))
    first = kitlib_digest()
    (tmp_path / "notes.txt").write_text("2")
    assert kitlib_digest() == first
    (tmp_path / "a.py").write_text("2")
    second = kitlib_digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    third = kitlib_digest()
    (tmp_path / "a.yaml").write_text("2")
    assert len({first, second, third, kitlib_digest()}) == 4
    # The part of the library in a kernel has the digest of the whole.
    (tmp_path / "whole_library.sha256").write_text("ab" * 32)
    assert kitlib_digest() == "ab" * 32


def test_a_start_is_cheap(tmp_path):
    start_run("study", {})
    started = time.perf_counter()
    start_run("study", {})
    # Takes about 15 ms on one of two busy cores; tmp_path is not a clone, so git does not run.
    assert time.perf_counter() - started < 0.25
