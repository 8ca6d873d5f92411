"""Run the whole kit on a phantom competition, from DICOM files to a scored submission.csv, in minutes on two CPU cores."""

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

TRAININGS = 3  # training steps of the plan that can run at the same time


def demo_plan(whole: bool = False) -> Plan:
    """Return the plan of `make demo`, read from submissions/plans.

    If `whole`, the plan also segments lungs, pre-trains on phantoms stored like the NIH and RSNA data sets, and trains on
    pseudo-labels for the test set.
    """
    return read_plan(project_root() / "submissions" / "plans" / ("demo_whole.yaml" if whole else "demo.yaml"))


def run_demo(plan: Plan, console: Console, times_the_floor: float = 3.0) -> dict[str, float]:
    """Run the demo's plan from scratch, copy submission.csv into the runs folder, and return the submission's scores.

    The keys of the returned dict are "score", "opacity_boxed" and the names of the classes. Raises PlanError if a run fails,
    or if the submission's score is not above `times_the_floor` times that of the sample submission. The sample predicts
    every study as negative. A model that ignores its images does not exceed this limit.
    """
    started = time.monotonic()
    # The trainings run at the same time with one thread each, because small models gain little from a second thread. The
    # plan starts afresh, because otherwise runs of an earlier version of kitlib would count as done.
    run_plan(plan, console, cores=max(TRAININGS, os.cpu_count() or 1), afresh=True)
    parameters = plan.planned["report"].parameters
    submission = plan.runs / "submission.csv"
    with replacing(submission) as temporary_path:
        shutil.copyfile(parameters["submission"], temporary_path)
    sample = project_root() / parameters["competition"] / "sample_submission.csv"
    return _compare_with_floor(
        project_root() / parameters["truth"], submission, sample, times_the_floor, console, time.monotonic() - started
    )


def _compare_with_floor(
    truth: Path, submission: Path, sample: Path, times_the_floor: float, console: Console, seconds: float
) -> dict[str, float]:
    """Print the scores of `submission` and of `sample` as a table; return the scores of `submission`, keyed by name.

    `seconds` is the demo's duration, for the table's title. Raises PlanError if the submission's score is not above
    `times_the_floor` times the sample's.
    """
    scores, floor = score_files(truth, submission), score_files(truth, sample)
    table = Table("", "submission", "all-negative floor", title=f"after {seconds:.0f} s")
    for name in (*SCORED_CLASSES, "opacity_boxed", "score"):
        table.add_row(name, f"{scores[name]:.4f}", f"{floor[name]:.4f}")
    console.print(table)
    console.print(f"{submission}\nNotebooks, tables and pictures: {submission.parent}/STAGE/", soft_wrap=True)
    if not scores["score"] > times_the_floor * floor["score"]:
        raise PlanError(
            f"{submission}: the score {scores['score']:.4f} is not above {times_the_floor:g} times {floor['score']:.4f}, "
            "the score of the all-negative sample; the models have not learned"
        )
    return scores
