"""The table of scores after a plan's last run."""

import json

import pytest
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.atomic import write_json
from kitlib.plans.one_run import run_planned
from kitlib.plans.plan import read_plan
from kitlib.plans.scores import describe_scores
from tests.plans.test_engine import shell, write_plan

TEXT = 'echo done > "{run}/metrics.json"'


def write(metrics):
    return shell(f"echo '{json.dumps(metrics)}' > \"{{run}}/metrics.json\"")


@pytest.fixture
def without_snakemake(monkeypatch):
    def run_in_order(plan, *_):
        write_json(plan.runs / "runs.json", {name: run.as_json() for name, run in plan.planned.items()})
        for name in plan.planned:
            run_planned(plan.runs / "runs.json", name)

    monkeypatch.setattr("kitlib.plans.engine.run_plan", run_in_order)


def test_after_the_last_run_the_scores_of_each_step_are_listed(tmp_path, without_snakemake):
    """The mean of 0.5 and 0.75 is 0.625; a step without a score, and a score that is null or no JSON, have no row."""
    train = shell('echo \'{ "score": 0.{digits} }\' > "{run}/metrics.json"', matrix={"digits": [50, 75]})
    report = write({"out_of_fold": {"score": 0.6, "ap": 0.1}, "submission": {"score": None}, "other": {"score": 1}})
    others = {"prepare": write({"images": 3}), "list": write([1]), "text": shell(TEXT)}
    path = write_plan(tmp_path, {"train": train, "report": report, **others})
    (tmp_path / "runs").mkdir()
    assert describe_scores(read_plan(path)).row_count == 0
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["train", "score", "2", "0.6250", "0.5000", "to", "0.7500"] in rows
    assert ["report", "out", "of", "fold", "1", "0.6000"] in rows
    assert describe_scores(read_plan(path)).row_count == 2
