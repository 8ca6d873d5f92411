"""Makes a table of the scores of a plan's finished runs; the table is shown after the plan's last run."""

import json
import math
from statistics import fmean
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from kitlib.plans.plan import Plan

# Path of a score in metrics.json -> how the table names it. Trainings and fusions write the first, reports the others.
SCORES = {("score",): "score", ("out_of_fold", "score"): "out of fold", ("submission", "score"): "submission"}


def describe_scores(plan: Plan) -> Table:
    """Return a table of the scores in the metrics.json files of the plan's finished runs.

    A row is about one score of one step: the number of runs with this score, the mean and, for several runs, the range.
    """
    table = Table("step", "score", "runs", "mean", "range", title=f"Scores of {plan.path}", box=SIMPLE)
    found: dict[tuple[str, str], list[float]] = {}
    states = plan.states()
    for name, run in plan.planned.items():
        if states[name] == "done" and run.result.name == "metrics.json" and run.result.is_file():
            try:
                metrics = json.loads(run.result.read_text(encoding="utf-8"))
            except ValueError:  # the result of a command may be any text
                continue
            for path, label in SCORES.items():
                score = _look_up(metrics, path)
                if isinstance(score, int | float) and math.isfinite(score):
                    found.setdefault((run.step, label), []).append(score)
    for (step, label), scores in found.items():
        spread = f"{min(scores):.4f} to {max(scores):.4f}" if len(scores) > 1 else ""
        table.add_row(step, label, str(len(scores)), f"{fmean(scores):.4f}", spread)
    return table


def _look_up(value: Any, path: tuple[str, ...]) -> Any:
    """Return the value at the end of a path of keys in nested dicts, or None if it does not exist."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
