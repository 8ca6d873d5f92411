"""One run of a plan: what happens to an existing folder, and how runs of several plans share GPUs."""

import fcntl
import json
import os
import signal

import pytest

from kitlib.atomic import write_json
from kitlib.plans.one_run import SHARED_GPUS, claim_gpus, run_planned
from kitlib.plans.plan import RECORD, PlannedRun


@pytest.fixture(autouse=True)
def restored_sigterm_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def planned(folder, key, script='echo ok > "{}/metrics.json"'):
    """Write a file with one run, `train`, that executes `script` in its folder; return the file."""
    run = PlannedRun(
        name="train",
        step="train",
        values={},
        folder=folder / "train",
        notebook=None,
        parameters={},
        command=("sh", "-c", script.format(folder / "train")),
        result=folder / "train" / "metrics.json",
        needs=(),
        threads=1,
        gpus=0,
        memory_gb=1.0,
        minutes=1.0,
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
