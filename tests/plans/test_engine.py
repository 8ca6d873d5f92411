"""Plans executed by Snakemake: what runs, what is skipped, and how failures and killed processes end."""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console

from kitlib.errors import PlanError
from kitlib.plans.engine import describe_plan, run_plan
from kitlib.plans.plan import read_plan
from kitlib.processes import exiting_on_signals, kill_family

# Logs a line for each start of a run, so that a second start is noticed.
NOTE = 'echo {run} >> "{log}"; echo ok > "{run}/metrics.json"'


def shell(script, **more):
    return {"command": ["sh", "-c", script], **more}


def write_plan(folder, steps, **variables):
    path = folder / "plan.yaml"
    variables = {"log": str(folder / "log.txt"), **variables}
    path.write_text(yaml.safe_dump({"runs": str(folder / "runs"), "variables": variables, "steps": steps}, sort_keys=False))
    return path


def carry_out(path, console=None, **options):
    return run_plan(read_plan(path), console or Console(file=io.StringIO()), **options)


def started(folder):
    log = folder / "log.txt"
    return sorted(line.rpartition("/")[2] for line in log.read_text().split()) if log.is_file() else []


def test_done_runs_are_skipped_and_changed_ones_are_repeated_with_their_dependents(tmp_path):
    steps = {
        "first": shell(NOTE),
        "each": shell(f"test {{number}} -gt 0 && {NOTE}", matrix={"number": [1, 2]}, needs=["first"]),
        # A request for more GPUs than there are gets all of them: here none, so that none is visible.
        "other": shell(f'test "$CUDA_VISIBLE_DEVICES" = "" && {NOTE}', gpus=2),
        "last": shell(f"cat {{log}}; {NOTE} # {{value}}", needs=["each"]),
    }
    path, shown = write_plan(tmp_path, steps, value=1), io.StringIO()
    # Only the selected step and what it needs.
    records = carry_out(path, Console(file=shown, width=100), only=["last"])
    assert records.pop("other") == {}
    assert {name: record["state"] for name, record in records.items()} == dict.fromkeys(
        ("first", "each-1", "each-2", "last"), "done"
    )
    assert "4/5 done" in shown.getvalue()
    assert started(tmp_path) == ["each-1", "each-2", "first", "last"]
    # `last` was started after all that it needs: its log contains their lines.
    assert "each-2" in (tmp_path / "runs" / "last" / "command.log").read_text()
    (tmp_path / "log.txt").unlink()
    shown = io.StringIO()
    records = carry_out(path, Console(file=shown, width=100), gpus=0)
    assert {record["state"] for record in records.values()} == {"done"}
    assert started(tmp_path) == ["other"]
    assert "other done, 5/5 done" in shown.getvalue() and "first done" not in shown.getvalue()
    (tmp_path / "log.txt").unlink()
    steps["each"]["matrix"] = {"number": [2, 3]}
    path = write_plan(tmp_path, steps, value=1)
    listed = Console(file=io.StringIO(), width=100)
    listed.print(describe_plan(read_plan(path)))
    rows = {line.split()[0]: line for line in listed.file.getvalue().splitlines() if line.strip()}
    assert "done 2; new 3" in rows["each"] and "changed" in rows["last"] and "done" in rows["other"]
    carry_out(path)
    assert started(tmp_path) == ["each-3", "last"]


def test_a_failure_is_reported_stops_only_its_dependents_and_is_repeated_next_time(tmp_path):
    once = f'if [ -e "{{run}}/again" ]; then {NOTE}; else touch "{{run}}/again"; exit 1; fi'
    steps = {
        "good": shell(NOTE),
        "flaky": shell(once),
        "bad": shell("echo broken pipe organ >&2; exit 3"),
        "silent": shell("true"),
        "slow": shell("sleep 60", minutes=0.01),
        # The shell's parent is the process that Snakemake has started.
        "victim": shell("kill -9 $PPID; sleep 60"),
        "last": shell(NOTE, needs=["good", "bad"]),
        "unasked": shell("exit 1"),
    }
    path = write_plan(tmp_path, steps)
    with pytest.raises(PlanError) as failed:
        carry_out(path, only=[step for step in steps if step != "unasked"], retries=1)
    message = str(failed.value)
    assert "2 of 8 runs are done" in message
    assert "exit code 3" in message and "broken pipe organ" in message and "runs/bad/command.log" in message
    assert "silent failed" in message and "it ended without writing" in message
    assert "stopped at its time limit of 0.01 minutes" in message
    assert re.search(r"victim was killed on .* without an error message", message)
    assert "not started: last\n" in message and "unasked" not in message
    assert started(tmp_path) == ["flaky", "good"]
    corrected = {name: shell(NOTE, minutes=1) for name in ("bad", "silent", "slow", "victim", "unasked")}
    carry_out(write_plan(tmp_path, {**steps, **corrected}))
    assert started(tmp_path) == sorted(steps)


def test_gpus_are_shared_and_hidden_from_runs_that_request_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    # Each claims a GPU and waits until the other has one: they end only if both run at the same time.
    meet = 'echo $CUDA_VISIBLE_DEVICES > "{run}.gpu"; while [ $(ls {run}/.. | grep -c gpu$) -lt 2 ]; do sleep 0.1; done; '
    steps = {
        "train": shell(f'{meet} echo ok > "{{run}}/metrics.json"', matrix={"fold": [0, 1]}, gpus=1, minutes=1),
        "none": shell('test "$CUDA_VISIBLE_DEVICES" = "" && echo ok > "{run}/metrics.json"'),
    }
    carry_out(write_plan(tmp_path, steps), gpus=2, cores=2)
    assert sorted(path.read_text().strip() for path in (tmp_path / "runs").glob("*.gpu")) == ["3", "5"]
    with pytest.raises(PlanError, match="4 GPUs were requested; available indices: 3, 5, 7"):
        carry_out(write_plan(tmp_path, steps), gpus=4)


@pytest.mark.parametrize(
    ("visible", "available"),
    [
        ("-1", "none"),  # CUDA's way to hide all GPUs
        ("", "none"),
        ("3,", "3"),
        (None, "0, 1"),  # those that nvidia-smi lists
    ],
)
def test_hidden_gpus_are_not_given_to_runs(tmp_path, monkeypatch, visible, available):
    listing = "GPU 0: H200 (UUID: GPU-a)\n  MIG 1g.18gb Device 0: (UUID: MIG-b)\nGPU 1: H200 (UUID: GPU-c)"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(PlanError, match=f"3 GPUs were requested; available indices: {available}$"):
        carry_out(write_plan(tmp_path, {"train": shell(NOTE, gpus=1)}), gpus=3)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_a_plan_whose_processes_were_all_killed_is_resumed(tmp_path):
    steps = {
        "first": shell(NOTE),
        "slow": shell(f'touch "{{run}}/begun"; if [ -e {{go}} ]; then {NOTE}; else sleep 600; fi', needs=["first"]),
    }
    path = write_plan(tmp_path, steps, go=str(tmp_path / "go"))
    process = subprocess.Popen([sys.executable, "-m", "kitlib", "run", str(path)], stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "runs" / "slow" / "begun").exists)
    with pytest.raises(PlanError, match=r"is already being run in"):
        carry_out(path)
    kill_family(process.pid)
    process.wait()
    (tmp_path / "go").touch()
    carry_out(path)
    assert started(tmp_path) == ["first", "slow"]


# Sets how SIGINT is handled, then starts the command: scripts that use `&` make their processes ignore it.
LAUNCHER = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_{}); os.execv(sys.executable, sys.argv[1:])"


@pytest.mark.parametrize(("number", "ignored"), [(2, False), (15, True)])
def test_an_interrupted_or_terminated_plan_ends_its_runs(tmp_path, number, ignored):
    path = write_plan(tmp_path, {"slow": shell('echo $$ > "{run}/pid"; sleep 600')})
    command = [sys.executable, "-m", "kitlib", "run", str(path)]
    # Set explicitly in both cases, because these tests may themselves be run with `&`.
    launcher = [sys.executable, "-c", LAUNCHER.format("IGN" if ignored else "DFL")]
    process = subprocess.Popen([*launcher, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = tmp_path / "runs" / "slow" / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    process.send_signal(number)
    # 30 s, well before the 60 s after which Snakemake would be killed.
    process.wait(30)
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), seconds=60)


def test_a_closed_terminal_ends_a_plan_unless_sighup_is_ignored():
    own = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with exiting_on_signals(), pytest.raises(SystemExit, match="129"):
        signal.raise_signal(signal.SIGHUP)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == own  # restored after the block
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exiting_on_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_engine_that_does_not_end_is_killed_with_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.plans.engine.ENDING_S", 0.2)
    path, pid = write_plan(tmp_path, {"slow": shell('echo $$ > "{run}/pid"; sleep 600')}), tmp_path / "runs/slow/pid"

    def interrupt(*_):
        if pid.exists() and pid.read_text().strip():
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr("kitlib.plans.engine._read_record", interrupt)
    monkeypatch.setattr("os.killpg", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path)
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), seconds=60)


def test_nothing_is_removed_while_a_plan_is_being_run(tmp_path):
    path, result = write_plan(tmp_path, {"only": shell(NOTE)}), tmp_path / "runs" / "only" / "metrics.json"
    result.parent.mkdir(parents=True)
    result.touch()
    own, other = tmp_path / "runs" / ".plan" / "lock", tmp_path / "runs" / ".other" / "lock"
    own.parent.mkdir()
    other.parent.mkdir()
    for lock in (own, other):
        with open(lock, "w") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            with pytest.raises(PlanError, match=r"is already being run in"):
                carry_out(path, afresh=True)
    assert result.is_file()
    locks = own.stat().st_ino, other.stat().st_ino
    carry_out(path, afresh=True)
    assert started(tmp_path) == ["only"] and result.read_text() == "ok\n"
    assert (own.stat().st_ino, other.stat().st_ino) == locks


def test_a_failed_notebook_is_reported_with_its_cell_and_log(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    parameters = new_code_cell("run_folder = ''\nfold = 0", metadata={"tags": ["parameters"]})
    cells = [
        parameters,
        new_code_cell("assert fold, 'no fold zero'"),
        new_code_cell("print('fold 1: epoch 3 of 9, loss 0.5')"),
        new_code_cell("from pathlib import Path\nPath(run_folder, 'metrics.json').write_text('{}')"),
    ]
    (tmp_path / "notebooks").mkdir()
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "train.ipynb")
    path = write_plan(
        tmp_path, {"train": {"notebook": "train", "matrix": {"fold": [0, 1]}, "parameters": {"fold": "{fold}"}}}
    )
    printed = io.StringIO()
    with pytest.raises(PlanError) as failed:
        carry_out(path, Console(file=printed, width=200))
    message = str(failed.value)
    assert "train-1: fold 1: epoch 3 of 9, loss 0.5" in printed.getvalue()
    assert "train-0 failed on" in message
    assert "train.ipynb: cell 3 raised AssertionError: no fold zero" in message
    assert f"{tmp_path}/runs/train-0/notebook.log" in message
    done = read_plan(path).planned["train-1"]
    assert json.loads(done.done_file.read_text())["state"] == "done"
    assert os.path.isfile(done.folder / "notebook.ipynb")
