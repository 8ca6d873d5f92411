"""What the engine of plans is told, what is shown of it, and what is reported. Snakemake is replaced, so nothing runs."""

import io
import json
import os
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from kitlib.atomic import write_json
from kitlib.errors import PlanError
from kitlib.plans.engine import describe_plan, make_configuration, run_plan
from kitlib.plans.one_run import SHARED_GPUS, state_file
from kitlib.plans.plan import read_plan
from tests.plans.test_engine import NOTE, shell, write_plan


@pytest.fixture
def engine(monkeypatch):
    """Replaces Snakemake: whenever it is looked at, it does the next of its `steps`, and then it ends with its `code`."""

    class Engine:
        steps, code, pid = [], 0, None

        def __init__(self, command, *, env, stdout, **_):
            Engine.command, Engine.environment = command, env
            stdout.write("the engine's own words\n")

        def poll(self):
            return Engine.steps.pop(0)() if Engine.steps else Engine.code

    monkeypatch.setattr("kitlib.plans.engine.subprocess.Popen", Engine)
    monkeypatch.setattr("kitlib.plans.engine.POLL_S", 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=3000 * 2**20))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.delenv(SHARED_GPUS, raising=False)
    return Engine


def becomes(plan, name, state, **more):
    """Return a step of the engine, after which a run has another state."""

    def step():
        run = plan.planned[name]
        if state == "done":
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "plan.json").write_text(json.dumps({"key": run.key}))
            run.done_file.write_text("{}")
        write_json(state_file(plan.runs / ".plan" / "runs.json", name), {"state": state, "host": "here", **more})

    return step


@pytest.fixture
def two(tmp_path):
    """A plan of `first`, which states what it needs, and `last`, which does not, and waits for `first`."""
    steps = {"first": shell("true", gpus=3, memory_gb=2.0, minutes=1.5, threads=3), "last": shell("true", needs=["first"])}
    return read_plan(write_plan(tmp_path, steps))


def finish(engine, plan):
    engine.steps = [becomes(plan, name, "done") for name in plan.planned]


def told(command, option):
    """Return what follows an option, up to the next one."""
    values = command[command.index(option) + 1 :]
    return values[: next((n for n, word in enumerate(values) if word.startswith("-")), None)]


def test_the_engine_gets_what_the_runs_and_the_machine_need(engine, two):
    finish(engine, two)
    run_plan(two, Console(file=io.StringIO()), cores=5, gpus=2, retries=2, engine=["--printshellcmds"])
    command = engine.command
    assert told(command, "--cores") == ["5"] and told(command, "--resources") == ["gpu=2", "mem_mb=3000"]
    assert {"--keep-going", "--nolock", "--rerun-incomplete"} <= set(command) and command[-1] == "--printshellcmds"
    assert engine.environment[SHARED_GPUS] == "3,5"
    configuration = json.loads((two.runs / ".plan" / "config.json").read_text())
    first, last = configuration["runs"]
    done = [str(run.done_file) for run in two.planned.values()]
    assert (configuration["targets"], configuration["retries"]) == (done, 2)
    assert (first["input"], first["done_file"], last["input"]) == ([], done[0], [done[0]])
    # At most what the machine has; 1.5 minutes are stated as whole ones.
    assert first["resources"] == {"mem_mb": 2048, "gpu": 2, "runtime": 2} and last["resources"] == {"mem_mb": 3000}
    assert (first["threads"], last["threads"]) == (3, 1)
    assert re.search(r"^cd \S+ && \S+ -m kitlib run-planned \S+/runs\.json first$", first["command"])


def test_all_cores_and_gpus_are_used_unless_limited(engine, two):
    finish(engine, two)
    run_plan(two, Console(file=io.StringIO()))
    assert told(engine.command, "--cores") == [str(len(os.sched_getaffinity(0)))]
    assert engine.environment[SHARED_GPUS] == "3,5,7"


@pytest.mark.parametrize("executor", [["--executor", "slurm"], ["--executor=slurm"], ["-e", "slurm"], ["--profile", "x"]])
@pytest.mark.parametrize(("gpus", "requested"), [(None, 3), (2, 2), (0, None)])
def test_a_cluster_has_its_own_limits(engine, two, executor, gpus, requested):
    finish(engine, two)
    run_plan(two, Console(file=io.StringIO()), gpus=gpus, engine=executor)
    assert not {"--cores", "--resources"} & set(engine.command) and SHARED_GPUS not in engine.environment
    first, last = json.loads((two.runs / ".plan" / "config.json").read_text())["runs"]
    assert first["resources"].get("gpu") == requested and last["resources"] == {"mem_mb": 4096}


def test_each_change_of_a_run_is_one_line_and_each_epoch_too(engine, two):
    going = {"cell": 2, "cells": 5, "epoch": "epoch 1 [of nine]"}
    engine.steps = [
        *(becomes(two, "first", "running", **going), becomes(two, "first", "running", **going)),
        becomes(two, "first", "running", **going | {"epoch": "epoch 2 [of nine]"}),
        *(becomes(two, "first", "done"), becomes(two, "last", "done")),
    ]
    printed = io.StringIO()
    run_plan(two, Console(file=printed, width=100))
    assert "0 trainings in 0 of 2 runs" in printed.getvalue()
    assert re.findall(r"^\d\d:\d\d:\d\d (.*?) *$", printed.getvalue(), re.MULTILINE) == [
        *("first: epoch 1 [of nine]", "first running, 0/2 done", "first: epoch 2 [of nine]", "first done, 1/2 done"),
        "last done, 2/2 done",
    ]


def test_a_terminal_shows_bars_and_the_cells_of_notebooks(engine, two):
    engine.steps = [
        becomes(two, "first", "running", cell=2, cells=5),
        *map(becomes, [two] * 2, ["first", "last"], ["done"] * 2),
    ]
    printed = io.StringIO()
    run_plan(two, Console(file=printed, width=100, force_terminal=True))
    shown = printed.getvalue()
    assert "first" in shown and "2/2 done" in shown and "first running" not in shown


def test_an_engine_that_breaks_is_quoted_and_earlier_records_do_not_count(engine, two):
    becomes(two, "first", "failed", problem="an earlier one")()
    engine.code = 1
    with pytest.raises(PlanError) as failed:
        run_plan(two, Console(file=io.StringIO()))
    message = str(failed.value)
    assert "0 of 2 runs are done" in message and "not started: first, last" in message and "earlier" not in message
    assert "engine.log, ends with:" in message and "the engine's own words" in message


def test_failed_and_killed_runs_are_told_apart(engine, two):
    engine.steps = [becomes(two, "first", "running"), becomes(two, "last", "failed", problem="no memory")]
    engine.code = 1
    with pytest.raises(PlanError) as failed:
        run_plan(two, Console(file=io.StringIO()))
    killed, ending = f"first was killed on here without an error message; its folder: {two.runs}/first", "to resume the plan"
    lines = str(failed.value).splitlines()
    assert lines[1:3] == ["last failed on here: no memory", killed] and len(lines) == 4 and lines[3].endswith(ending)


def test_an_engine_that_ends_before_all_is_done_is_an_error(engine, two):
    engine.steps = [becomes(two, "first", "done")]
    with pytest.raises(PlanError, match="1 of 2 runs are done"):
        run_plan(two, Console(file=io.StringIO()))


def test_runs_start_afresh_without_touching_what_links_lead_to(engine, two, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (two.runs / "old").mkdir(parents=True)
    (two.runs / "old" / "metrics.json").touch()
    (two.runs / "submission.csv").touch()
    (two.runs / "link").symlink_to(tmp_path / "outside")
    finish(engine, two)
    run_plan(two, Console(file=io.StringIO()), afresh=True)
    assert sorted(path.name for path in two.runs.iterdir()) == [".plan", "first", "last"]
    assert (tmp_path / "outside" / "kept").exists()


def test_a_plan_is_listed_with_what_its_steps_ask_for(two):
    listed = Console(file=io.StringIO(), width=140)
    listed.print(describe_plan(two))
    rows = [re.split(r"  +", line.strip()) for line in listed.file.getvalue().splitlines()]
    assert ["first", "new", "sh -c true", "3 CPU, 3 GPU, 2 GB, 1.5 min"] in rows
    assert ["last", "new", "sh -c true", "1 CPU, 4 GB"] in rows


def test_names_that_differ_only_in_a_hyphen_are_two_rules(tmp_path):
    plan = read_plan(write_plan(tmp_path, {"a": shell(NOTE, matrix={"of": [1]}), "a_1": shell(NOTE)}))
    runs = make_configuration(plan, tmp_path / "runs.json", [], {}, 0)["runs"]
    assert [run["rule"] for run in runs] == ["r0_a_1", "r1_a_1"]
