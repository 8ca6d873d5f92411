"""Plans carried out by the real engine: what is done, what is not done again, and how failures and killed processes end."""

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
from kitlib.plans.engine import configuration, describe_plan, run_plan
from kitlib.plans.plan import read_plan
from kitlib.processes import exiting_on_signals, kill_family

# One line a start of a run, so that a second start shows.
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


def test_done_runs_are_skipped_and_changed_ones_take_those_that_need_them_along(tmp_path):
    steps = {
        "first": shell(NOTE),
        "each": shell(f"test {{number}} -gt 0 && {NOTE}", matrix={"number": [1, 2]}, needs=["first"]),
        # More GPUs than there are mean those that there are: none here, and it sees none.
        "other": shell(f'test "$CUDA_VISIBLE_DEVICES" = "" && {NOTE}', gpus=2),
        "last": shell(f"cat {{log}}; {NOTE} # {{value}}", needs=["each"]),
    }
    path, shown = write_plan(tmp_path, steps, value=1), io.StringIO()
    # Only a step that is asked for, and what it needs.
    told = carry_out(path, Console(file=shown, width=100), only=["last"])
    assert told.pop("other") == {}
    assert {name: run["state"] for name, run in told.items()} == dict.fromkeys(("first", "each-1", "each-2", "last"), "done")
    assert "4/5 done" in shown.getvalue()
    assert started(tmp_path) == ["each-1", "each-2", "first", "last"]
    # `last` was begun after all that it needs: its log holds their lines.
    assert "each-2" in (tmp_path / "runs" / "last" / "command.log").read_text()
    (tmp_path / "log.txt").unlink()
    told = carry_out(path, gpus=0)
    assert {run["state"] for run in told.values()} == {"done"}
    assert started(tmp_path) == ["other"]
    (tmp_path / "log.txt").unlink()
    steps["each"]["matrix"] = {"number": [2, 3]}
    path = write_plan(tmp_path, steps, value=1)
    listed = Console(file=io.StringIO(), width=100)
    listed.print(describe_plan(read_plan(path)))
    rows = {line.split()[0]: line for line in listed.file.getvalue().splitlines() if line.strip()}
    assert "done 2; new 3" in rows["each"] and "changed" in rows["last"] and "done" in rows["other"]
    carry_out(path)
    assert started(tmp_path) == ["each-3", "last"]


def test_a_failure_is_named_stops_only_what_needs_it_and_is_done_next_time(tmp_path):
    once = f'if [ -e "{{run}}/again" ]; then {NOTE}; else touch "{{run}}/again"; exit 1; fi'
    steps = {
        "good": shell(NOTE),
        "flaky": shell(once),
        "bad": shell("echo broken pipe organ >&2; exit 3"),
        "silent": shell("true"),
        "slow": shell("sleep 60", minutes=0.01),
        # The parent of the shell is the process that the engine has started.
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
    assert "silent failed" in message and "it ended without" in message
    assert "stopped at its time limit of 0.01 minutes" in message
    assert re.search(r"victim was killed on .* without a word", message)
    assert "not begun: last\n" in message and "unasked" not in message
    assert started(tmp_path) == ["flaky", "good"]
    mended = {name: shell(NOTE, minutes=1) for name in ("bad", "silent", "slow", "victim", "unasked")}
    carry_out(write_plan(tmp_path, {**steps, **mended}))
    assert started(tmp_path) == sorted(steps)


def test_gpus_are_shared_out_and_hidden_from_runs_without(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    # Each claims a GPU and waits until the other has one, too: they can only end together.
    meet = 'echo $CUDA_VISIBLE_DEVICES > "{run}.gpu"; while [ $(ls {run}/.. | grep -c gpu$) -lt 2 ]; do sleep 0.1; done; '
    steps = {
        "train": shell(f'{meet} echo ok > "{{run}}/metrics.json"', matrix={"fold": [0, 1]}, gpus=1, minutes=1),
        "none": shell('test "$CUDA_VISIBLE_DEVICES" = "" && echo ok > "{run}/metrics.json"'),
    }
    carry_out(write_plan(tmp_path, steps), gpus=2, cores=2)
    assert sorted(path.read_text().strip() for path in (tmp_path / "runs").glob("*.gpu")) == ["3", "5"]
    with pytest.raises(PlanError, match="4 GPUs are asked for; there are: 3, 5, 7"):
        carry_out(write_plan(tmp_path, steps), gpus=4)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_a_plan_whose_processes_are_all_killed_goes_on_where_it_was(tmp_path):
    steps = {
        "first": shell(NOTE),
        "slow": shell(f'touch "{{run}}/begun"; if [ -e {{go}} ]; then {NOTE}; else sleep 600; fi', needs=["first"]),
    }
    path = write_plan(tmp_path, steps, go=str(tmp_path / "go"))
    process = subprocess.Popen([sys.executable, "-m", "kitlib", "run", str(path)], stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "runs" / "slow" / "begun").exists)
    with pytest.raises(PlanError, match=r"is being carried out in .* already"):
        carry_out(path)
    kill_family(process.pid)
    process.wait()
    (tmp_path / "go").touch()
    carry_out(path)
    assert started(tmp_path) == ["first", "slow"]


# As a script does with `&`: SIGINT is ignored from the start.
HEEDS = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_{}); os.execv(sys.executable, sys.argv[1:])"


@pytest.mark.parametrize(("number", "deaf"), [(2, False), (15, True)])
def test_an_interrupted_or_terminated_plan_ends_its_runs(tmp_path, number, deaf):
    path = write_plan(tmp_path, {"slow": shell('echo $$ > "{run}/pid"; sleep 600')})
    command = [sys.executable, "-m", "kitlib", "run", str(path)]
    # Either way said, because these tests may be run with `&` themselves.
    heeds = HEEDS.format("IGN" if deaf else "DFL")
    process = subprocess.Popen([sys.executable, "-c", heeds, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = tmp_path / "runs" / "slow" / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    process.send_signal(number)
    # Long before the engine would be killed.
    process.wait(30)
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), seconds=60)


def test_a_closed_terminal_ends_a_plan_as_a_termination_does_unless_that_is_ignored():
    with exiting_on_signals(), pytest.raises(SystemExit, match="129"):
        signal.raise_signal(signal.SIGHUP)
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

    def told(*_):
        if pid.exists() and pid.read_text().strip():
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr("kitlib.plans.engine._told", told)
    monkeypatch.setattr("os.killpg", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path)
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())), seconds=60)


def test_nothing_is_removed_of_a_plan_that_is_being_carried_out(tmp_path):
    path, made = write_plan(tmp_path, {"only": shell(NOTE)}), tmp_path / "runs" / "only" / "metrics.json"
    made.parent.mkdir(parents=True)
    made.touch()
    mine, other = tmp_path / "runs" / ".plan" / "lock", tmp_path / "runs" / ".other" / "lock"
    mine.parent.mkdir()
    other.parent.mkdir()
    for lock in (mine, other):
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(PlanError, match=r"is being carried out in .* already"):
                carry_out(path, afresh=True)
    assert made.is_file()
    locks = mine.stat().st_ino, other.stat().st_ino
    carry_out(path, afresh=True)
    assert started(tmp_path) == ["only"] and made.read_text() == "ok\n"
    assert (mine.stat().st_ino, other.stat().st_ino) == locks


def test_names_that_differ_in_a_sign_alone_are_two_rules(tmp_path):
    plan = read_plan(write_plan(tmp_path, {"a": shell(NOTE, matrix={"of": [1]}), "a_1": shell(NOTE)}))
    runs = configuration(plan, tmp_path / "runs.json", [], {}, 0)["runs"]
    assert [run["rule"] for run in runs] == ["r0_a_1", "r1_a_1"]


def test_a_failed_notebook_is_named_with_its_cell_and_log(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    parameters = new_code_cell("run_folder = ''\nfold = 0", metadata={"tags": ["parameters"]})
    cells = [
        parameters,
        new_code_cell("assert fold, 'no fold zero'"),
        new_code_cell("from pathlib import Path\nPath(run_folder, 'metrics.json').write_text('{}')"),
    ]
    (tmp_path / "notebooks").mkdir()
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "train.ipynb")
    path = write_plan(
        tmp_path, {"train": {"notebook": "train", "matrix": {"fold": [0, 1]}, "parameters": {"fold": "{fold}"}}}
    )
    with pytest.raises(PlanError) as failed:
        carry_out(path)
    message = str(failed.value)
    assert "train-0 failed on" in message
    assert "train.ipynb: cell 3 raised AssertionError: no fold zero" in message
    assert f"{tmp_path}/runs/train-0/notebook.log" in message
    done = read_plan(path).planned["train-1"]
    assert json.loads(done.mark.read_text())["state"] == "done"
    assert os.path.isfile(done.folder / "notebook.ipynb")
