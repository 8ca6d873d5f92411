"""One run of a plan: its folder, its process or notebook, its limits, and how runs of several plans share GPUs."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from kitlib.atomic import write_json
from kitlib.errors import PlanError
from kitlib.paths import project_root
from kitlib.plans.one_run import SHARED_GPUS, claim_gpus, run_planned, state_file
from kitlib.plans.plan import RECORD, PlannedRun


@pytest.fixture(autouse=True)
def restored_sigterm_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def planned(folder, key, script='echo ok > "{}/metrics.json"', minutes=1.0, threads=1, notebook=None, parameters=None):
    """Write a file with one run, `train`, that executes `script` in its folder; return the file."""
    run = PlannedRun(
        name="train",
        step="train",
        values={},
        folder=folder / "train",
        notebook=notebook,
        parameters=parameters or {},
        command=("sh", "-c", script.format(folder / "train")),
        result=folder / "train" / "metrics.json",
        needs=(),
        threads=threads,
        gpus=0,
        memory_gb=1.0,
        minutes=minutes,
        key=key,
    )
    write_json(folder / f"{key}.runs.json", {"train": run.as_json()})
    return folder / f"{key}.runs.json"


def test_a_run_that_is_done_with_other_parameters_is_renamed(tmp_path, caplog):
    run_planned(planned(tmp_path, "first"), "train")
    (tmp_path / "train" / "weights").write_text("days")
    run_planned(planned(tmp_path, "second"), "train")
    backup = tmp_path / "train.old-first"
    assert (backup / "weights").read_text() == "days" and (backup / "done-first.json").is_file()
    assert str(backup) in caplog.text
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "command.log",
        "done-second.json",
        "metrics.json",
        RECORD,
    ]
    # Switching back and forth keeps the newest folder of each key.
    run_planned(planned(tmp_path, "first"), "train")
    run_planned(planned(tmp_path, "second"), "train")
    assert sorted(path.name for path in tmp_path.glob("train*")) == ["train", "train.old-first", "train.old-second"]


def test_an_unfinished_run_with_other_parameters_is_started_over(tmp_path):
    write_json(tmp_path / "train" / RECORD, {"key": "first"})
    (tmp_path / "train" / "half").touch()
    run_planned(planned(tmp_path, "second"), "train")
    assert not (tmp_path / "train" / "half").exists()
    assert [path.name for path in tmp_path.glob("train*")] == ["train"]
    assert json.loads((tmp_path / "train" / RECORD).read_text())["key"] == "second"


def test_a_run_that_waits_for_a_gpu_releases_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(SHARED_GPUS, "0,1")
    folder = tmp_path / f"kit-gpus-{os.getuid()}"
    folder.mkdir()

    class Waited(Exception):
        pass

    def other_can_have_the_first(_):
        with open(folder / "0", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise Waited

    monkeypatch.setattr("time.sleep", other_can_have_the_first)
    with open(folder / "1", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Waited), claim_gpus(2):
            pass
    with claim_gpus(2) as variables:
        assert variables == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    ("shared", "count", "claimed"),
    [
        ("0,1,2", 1, "0"),
        ("0,1,2", 2, "0,1"),
        ("0,1", 2, "0,1"),
        ("0", 2, "0"),  # more than there are: all of them
        ("", 1, ""),
        ("0,1", 0, ""),
    ],
)
def test_a_run_claims_as_many_gpus_as_it_requests_or_all(tmp_path, monkeypatch, shared, count, claimed):
    def waiting(_):
        raise AssertionError("all GPUs are free, so nothing is waited for")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("time.sleep", waiting)
    monkeypatch.setenv(SHARED_GPUS, shared)
    with claim_gpus(count) as variables:
        assert variables == {"CUDA_VISIBLE_DEVICES": claimed}
        taken = set(filter(None, claimed.split(",")))
        for gpu in filter(None, shared.split(",")):  # exactly the claimed GPUs are locked
            with open(tmp_path / f"kit-gpus-{os.getuid()}" / gpu, "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    assert gpu in taken
                else:
                    assert gpu not in taken


@pytest.mark.parametrize(("minutes", "stopped"), [(0.01, True), (1.0, False), (0.0, False)])  # 0: no limit
def test_a_run_is_stopped_at_its_time_limit(tmp_path, minutes, stopped):
    script = "exec sleep 60" if stopped else 'sleep 0.1; echo ok > "{}/metrics.json"'
    file = planned(tmp_path, "first", script, minutes)
    if stopped:
        with pytest.raises(PlanError, match=r"stopped at its time limit of 0\.01 minutes"):
            run_planned(file, "train")
    else:
        run_planned(file, "train")
        assert (tmp_path / "train" / "done-first.json").is_file()
    record = json.loads(state_file(file, "train").read_text())
    assert record["state"] == ("failed" if stopped else "done") and record["started"] <= record["ended"]
    assert (record["cell"], record["cells"]) == (0, 0)  # a command has no cells
    assert ("time limit" in record["problem"]) if stopped else "problem" not in record


def test_a_command_runs_in_the_projects_folder_with_the_plans_python_and_threads(tmp_path):
    file, result = planned(tmp_path, "first", threads=3), tmp_path / "train" / "metrics.json"
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.getcwd(), *sys.argv[2:], file=open(sys.argv[1], 'w'))"
    runs = json.loads(file.read_text())
    # Only the first word is the name of a program.
    runs["train"]["command"] = ["python", "-c", script, str(result), "python"]
    write_json(file, runs)
    run_planned(file, "train")
    assert result.read_text() == f"3 {project_root().resolve()} python\n"


def test_a_run_that_another_process_has_finished_is_not_repeated(tmp_path):
    file = planned(tmp_path, "first", 'echo again >> "{0}/starts"; echo ok > "{0}/metrics.json"')
    run_planned(file, "train")
    state_file(file, "train").unlink()
    run_planned(file, "train")
    assert (tmp_path / "train" / "starts").read_text() == "again\n"
    record = json.loads(state_file(file, "train").read_text())
    assert record["state"] == "done" and record["started"] <= record["ended"]


def test_after_sigterm_a_run_cleans_up(tmp_path):
    run_planned(planned(tmp_path, "first"), "train")
    with pytest.raises(SystemExit, match="143"):  # and so `finally` blocks are executed
        signal.raise_signal(signal.SIGTERM)


def test_a_notebook_gets_its_parameters_and_limits_and_reports_its_cell_and_epoch(tmp_path, monkeypatch):
    file = planned(tmp_path, "first", minutes=2.0, threads=3, notebook=tmp_path / "train.ipynb", parameters={"fold": 1})
    calls = []

    def run_notebook(*arguments, on_cell, on_epoch, **limits):
        calls.append((arguments, limits))
        on_cell(2, 5)
        on_epoch("epoch 1 of 9")

    monkeypatch.delenv(SHARED_GPUS, raising=False)
    monkeypatch.setattr("kitlib.plans.one_run.run_notebook", run_notebook)
    run_planned(file, "train")
    ((arguments, limits),) = calls
    folder = tmp_path / "train"
    assert arguments == (tmp_path / "train.ipynb", folder / "notebook.ipynb", {"fold": 1}, folder / "metrics.json")
    assert limits == {"threads": 3, "time_limit_s": 120.0, "variables": {}}
    record = json.loads(state_file(file, "train").read_text())
    assert (record["cell"], record["cells"], record["epoch"]) == (2, 5, "epoch 1 of 9")


def test_the_process_of_a_run_starts_without_pandas():
    code = "import sys, kitlib.__main__, kitlib.plans.one_run; print({'numpy', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
