"""Counts a plan's trainings, and those that start from random weights; shown before the plan's first run."""

from collections.abc import Iterable

from kitlib.parameters import read_parameters
from kitlib.plans.plan import Plan, PlannedRun
from kitlib.recipes.named import RECIPES


def count_trainings(run: PlannedRun) -> int:
    """Return how many networks a run trains: one per fold or, with outer folds, one per outer fold and each other fold."""
    values = read_parameters(run.notebook) | run.parameters if run.notebook else {}
    if values.get("recipe") not in RECIPES:
        return 0
    folds = set(values["folds"])
    return sum(len(folds - {outer}) for outer in values.get("outer_folds", [])) or len(folds)


def starts_from_scratch(run: PlannedRun) -> bool:
    """Return whether a run trains networks of which all starting weights are random."""
    values = read_parameters(run.notebook) | run.parameters if run.notebook else {}
    if not count_trainings(run):
        return False
    return not (values["overrides"].get("starting_weights") or RECIPES[values["recipe"]].starting_weights)


def describe_trainings(plan: Plan, names: Iterable[str]) -> str:
    """Return a text on the trainings in the runs `names`: their number, steps from scratch, and published duration."""
    names, states = list(names), plan.states()
    counts = {name: count_trainings(plan.planned[name]) for name in names}
    total, runs = sum(counts.values()), sum(map(bool, counts.values()))
    done = sum(counts[name] for name in names if states[name] == "done")
    text = f"{total} {'training' if total == 1 else 'trainings'} in {runs} of {len(names)} runs"
    text += f", {done} of them done" if done else ""
    text += f"; published duration: {plan.published_time}" if plan.published_time else ""
    scratch = [plan.planned[name].step for name in names if starts_from_scratch(plan.planned[name])]
    return text + (f"\nfrom scratch, with random weights: {', '.join(dict.fromkeys(scratch))}" if scratch else "")
