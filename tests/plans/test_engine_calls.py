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
from kitlib.plans.plan import RECORD, read_plan
from tests.plans.test_engine import shell, write_plan


@pytest.fixture
def engine(monkeypatch):
    """A replacement of Snakemake: each time it is polled, it does the next of its `steps`; then it ends with its `code`."""

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


@pytest.fixture
def plan(tmp_path):
    """A plan of `first`, which states what it needs, and `last`, which does not, and waits for `first`."""
    steps = {"first": shell("true", gpus=3, memory_gb=2.0, minutes=1.5, threads=3), "last": shell("true", needs=["first"])}
    return read_plan(write_plan(tmp_path, steps))


def becomes(plan, name, state, **more):
    """Return a step of the engine, after which a run has another state."""

    def step():
        run = plan.planned[name]
        if state == "done":
            write_json(run.folder / RECORD, {"key": run.key})
            write_json(run.done_file, {})
        write_json(state_file(plan.runs / ".plan" / "runs.json", name), {"state": state, "host": "here", **more})

    return step


def run(plan, successful_engine=None, /, console=None, **options):
    """Run the plan; if an engine is given, it finishes all runs."""
    if successful_engine:
        successful_engine.steps = [becomes(plan, name, "done") for name in plan.planned]
    return run_plan(plan, console or Console(file=io.StringIO()), **options)


def configuration(plan):
    return json.loads((plan.runs / ".plan" / "config.json").read_text())


def values_of(command, option):
    """Return what follows an option, up to the next one."""
    values = command[command.index(option) + 1 :]
    return values[: next((n for n, word in enumerate(values) if word.startswith("-")), None)]


def test_the_engine_gets_what_the_runs_and_the_machine_need(engine, plan):
    run(plan, engine, cores=5, gpus=2, retries=2, engine=["--printshellcmds"])
    command = engine.command
    assert values_of(command, "--cores") == ["5"] and values_of(command, "--resources") == ["gpu=2", "mem_mb=3000"]
    assert command[-1] == "--printshellcmds" and engine.environment[SHARED_GPUS] == "3,5"
    first, last = configuration(plan)["runs"]
    done = [str(each.done_file) for each in plan.planned.values()]
    assert (configuration(plan)["targets"], configuration(plan)["retries"]) == (done, 2)
    assert (first["input"], first["done_file"], last["input"]) == ([], done[0], [done[0]])
    # At most what the machine has; 1.5 minutes are rounded up to whole ones.
    assert first["resources"] == {"mem_mb": 2048, "gpu": 2, "runtime": 2} and last["resources"] == {"mem_mb": 3000}
    assert (first["threads"], last["threads"]) == (3, 1)


def test_all_cores_and_gpus_are_used_unless_limited(engine, plan):
    run(plan, engine)
    assert values_of(engine.command, "--cores") == [str(len(os.sched_getaffinity(0)))]
    assert engine.environment[SHARED_GPUS] == "3,5,7"


@pytest.mark.parametrize("executor", [["--executor", "slurm"], ["--executor=slurm"], ["-e", "slurm"], ["--profile", "x"]])
def test_the_limits_of_this_machine_are_not_those_of_a_cluster(engine, plan, executor):
    run(plan, engine, engine=executor)
    assert not {"--cores", "--resources"} & set(engine.command) and SHARED_GPUS not in engine.environment
    _, last = configuration(plan)["runs"]
    assert last["resources"] == {"mem_mb": 4096}


@pytest.mark.parametrize(("gpus", "requested"), [(None, 3), (2, 2), (0, None)])
def test_a_run_on_a_cluster_requests_at_most_the_given_number_of_gpus(engine, plan, gpus, requested):
    run(plan, engine, gpus=gpus, engine=["--executor", "slurm"])
    first, _ = configuration(plan)["runs"]
    assert first["resources"].get("gpu") == requested


def test_each_change_of_a_run_and_each_epoch_is_one_line(engine, plan):
    first_epoch = becomes(plan, "first", "running", epoch="epoch 1 [of nine]")
    second_epoch = becomes(plan, "first", "running", epoch="epoch 2 [of nine]")
    done = [becomes(plan, name, "done") for name in ("first", "last")]
    engine.steps, printed = [first_epoch, first_epoch, second_epoch, *done], io.StringIO()
    run(plan, console=Console(file=printed, width=100))
    assert "0 trainings in 0 of 2 runs" in printed.getvalue()
    timed_lines = re.findall(r"^\d\d:\d\d:\d\d (.*?) *$", printed.getvalue(), re.MULTILINE)
    assert timed_lines == [
        "first: epoch 1 [of nine]",
        "first running, 0/2 done",
        "first: epoch 2 [of nine]",
        "first done, 1/2 done",
        "last done, 2/2 done",
    ]


def test_a_terminal_shows_bars_instead_of_lines(engine, plan):
    running, printed = becomes(plan, "first", "running", cell=2, cells=5), io.StringIO()
    engine.steps = [running, becomes(plan, "first", "done"), becomes(plan, "last", "done")]
    run(plan, console=Console(file=printed, width=100, force_terminal=True))
    shown = printed.getvalue()
    assert "first" in shown and "2/2 done" in shown and "first running" not in shown


def test_an_engine_that_breaks_is_quoted_and_earlier_records_do_not_count(engine, plan):
    becomes(plan, "first", "failed", problem="an earlier one")()
    engine.code = 1
    with pytest.raises(PlanError) as failed:
        run(plan)
    message = str(failed.value)
    assert "0 of 2 runs are done" in message and "not started: first, last" in message and "earlier" not in message
    assert "engine.log, ends with:" in message and "the engine's own words" in message


def test_failed_and_killed_runs_are_told_apart(engine, plan):
    engine.steps = [becomes(plan, "first", "running"), becomes(plan, "last", "failed", problem="no memory")]
    engine.code = 1
    with pytest.raises(PlanError) as failed:
        run(plan)
    _, *lines, _ = str(failed.value).splitlines()
    assert lines == [
        "last failed on here: no memory",
        f"first was killed on here without an error message; its folder: {plan.runs}/first",
    ]


def test_an_engine_that_ends_before_all_is_done_is_an_error(engine, plan):
    engine.steps = [becomes(plan, "first", "done")]
    with pytest.raises(PlanError, match="1 of 2 runs are done"):
        run(plan)


def test_runs_start_afresh_without_touching_what_links_lead_to(engine, plan, tmp_path):
    outside = tmp_path / "outside"
    for folder in (outside, plan.runs / "old"):
        folder.mkdir(parents=True)
        (folder / "metrics.json").touch()
    (plan.runs / "submission.csv").touch()
    (plan.runs / "link").symlink_to(outside)
    run(plan, engine, afresh=True)
    assert sorted(path.name for path in plan.runs.iterdir()) == [".plan", "first", "last"]
    assert (outside / "metrics.json").exists()


def test_a_plan_is_listed_with_what_its_steps_ask_for(plan):
    listed = Console(file=io.StringIO(), width=140)
    listed.print(describe_plan(plan))
    rows = [re.split(r"  +", line.strip()) for line in listed.file.getvalue().splitlines()]
    assert ["first", "new", "sh -c true", "3 CPU, 3 GPU, 2 GB, 1.5 min"] in rows
    assert ["last", "new", "sh -c true", "1 CPU, 4 GB"] in rows


def test_names_that_differ_only_in_a_hyphen_are_two_rules(tmp_path):
    plan = read_plan(write_plan(tmp_path, {"a": shell("true", matrix={"of": [1]}), "a_1": shell("true")}))
    assert set(plan.planned) == {"a-1", "a_1"}
    rules = [each["rule"] for each in make_configuration(plan, tmp_path / "runs.json", [], {}, 0)["runs"]]
    assert len(set(rules)) == 2 and all(map(str.isidentifier, rules))
