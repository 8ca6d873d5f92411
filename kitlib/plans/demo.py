"""The whole kit on a phantom competition: from DICOM files to a scored submission.csv, in minutes, on two CPU cores."""

import os
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kitlib.atomic import replacing
from kitlib.classes import SCORED_CLASSES
from kitlib.errors import PlanError
from kitlib.paths import project_root
from kitlib.plans.engine import run_plan
from kitlib.plans.plan import Plan, read_plan
from kitlib.scoring.score import score_files

TRAININGS = 3  # of the plan, which need nothing of each other


def demo_plan(whole: bool = False) -> Plan:
    """The plan of `make demo`; `whole` pre-trains on phantoms of NIH and RSNA and pseudo-labels the test set, too."""
    return read_plan(project_root() / "submissions" / "plans" / ("demo_whole.yaml" if whole else "demo.yaml"))


def run_demo(plan: Plan, console: Console, times_the_floor: float = 3.0) -> dict[str, float]:
    """Carry out the demo's plan from its beginning and judge what it submits.

    Leaves `submission.csv` among the plan's runs; returns its score and the parts. Raises PlanError unless the score is
    more than `times_the_floor` times that of the sample, which a model that ignores its images does not reach; PlanError.
    """
    began = time.monotonic()
    # All at once, with a thread each: small models gain little from a second thread, and the system shares the cores evenly.
    # Afresh, as what an earlier kitlib has made would count as done.
    run_plan(plan, console, cores=max(TRAININGS, os.cpu_count() or 1), afresh=True)
    made = plan.planned["report"].parameters
    submission = plan.runs / "submission.csv"
    with replacing(submission) as beside:
        shutil.copyfile(made["submission"], beside)
    sample = project_root() / made["competition"] / "sample_submission.csv"
    return _judge(project_root() / made["truth"], submission, sample, times_the_floor, console, time.monotonic() - began)


def _judge(
    truth: Path, submission: Path, sample: Path, times_the_floor: float, console: Console, seconds: float
) -> dict[str, float]:
    scores, floor = score_files(truth, submission), score_files(truth, sample)
    table = Table("", "submission", "all-negative floor", title=f"{submission}, after {seconds:.0f} s")
    for name in (*SCORED_CLASSES, "opacity_boxed", "score"):
        table.add_row(name, f"{scores[name]:.4f}", f"{floor[name]:.4f}")
    console.print(table)
    if not scores["score"] > times_the_floor * floor["score"]:
        raise PlanError(f"score {scores['score']:.4f} does not clearly beat the floor {floor['score']:.4f}")
    return scores
