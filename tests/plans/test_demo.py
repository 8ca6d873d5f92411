"""The demo's two plans, and the score below which its models have not learned."""

import io

import pandas as pd
import pytest
from rich.console import Console

from kitlib.classes import STUDY_LABEL_COLUMNS
from kitlib.errors import PlanError
from kitlib.paths import project_root
from kitlib.plans.demo import demo_plan, run_demo
from kitlib.plans.plan import read_plan
from kitlib.scoring.submission_csv import write_all_negative

IDS = ["s1_study", "s2_study", "i1_image", "i2_image"]
RIGHT = ["negative 1 0 0 1 1", "typical 1 0 0 1 1", "none 1 0 0 1 1", "opacity 1 1 2 4 6"]
ELSEWHERE = [*RIGHT[:3], "opacity 1 50 50 60 60"]


def test_the_whole_demo_has_every_step_of_the_short_one_and_more():
    short, whole = demo_plan().planned, demo_plan(whole=True).planned
    assert short.keys() < whole.keys()
    assert "lung_phantoms" in whole and not any("lung" in name for name in short)


# The sample predicts all as negative. Its average precisions are 1/2 for `negative` and `none`, and 0 for `typical` and
# `opacity`, the other two classes of the ground truth: a score of 1/4. Three times that is 3/4.
@pytest.mark.parametrize(
    ("predictions", "limit", "passes"),
    [
        (RIGHT, {}, True),  # score 1
        (ELSEWHERE, {}, False),  # 3/4, exactly the limit
        (ELSEWHERE, {"times_the_floor": 2.5}, True),
        (RIGHT, {"times_the_floor": 4.0}, False),
    ],
)
def test_a_submission_must_score_above_a_multiple_of_the_samples_score(tmp_path, monkeypatch, predictions, limit, passes):
    inputs, truth = tmp_path / "inputs", tmp_path / "truth"
    competition = inputs / "siim-covid19-detection"
    for folder in (competition, truth):
        folder.mkdir(parents=True)
    labels = pd.DataFrame(0, index=range(2), columns=list(STUDY_LABEL_COLUMNS))
    labels.loc[0, "Negative for Pneumonia"] = labels.loc[1, "Typical Appearance"] = 1
    labels.insert(0, "id", IDS[:2])
    labels.to_csv(truth / "train_study_level.csv", index=False)
    (truth / "train_image_level.csv").write_text(
        "id,boxes,label,StudyInstanceUID\ni1_image,,none 1 0 0 1 1,s1\n"
        "i2_image,\"[{'x': 1, 'y': 2, 'width': 3, 'height': 4}]\",opacity 1 1 2 4 6,s2\n"
    )
    write_all_negative(competition / "sample_submission.csv", IDS)
    changes = {"inputs": str(inputs), "truth": str(truth)}
    plan = read_plan(project_root() / "submissions" / "plans" / "demo.yaml", tmp_path / "runs", changes)

    def run_plan(plan, console, cores, afresh):
        assert afresh and cores >= 3  # three trainings run at the same time
        submission = plan.runs / "kernel" / "working" / "submission.csv"
        submission.parent.mkdir(parents=True)
        pd.DataFrame({"id": IDS, "PredictionString": predictions}).to_csv(submission, index=False)

    monkeypatch.setattr("kitlib.plans.demo.run_plan", run_plan)
    printed = Console(file=io.StringIO(), width=100)
    if passes:
        assert run_demo(plan, printed, **limit)["score"] == (1.0 if predictions == RIGHT else 0.75)
    else:
        with pytest.raises(PlanError, match="the models have not learned"):
            run_demo(plan, printed, **limit)
    written = pd.read_csv(tmp_path / "runs" / "submission.csv")
    assert written.PredictionString.tolist() == predictions
    (row,) = [line.split() for line in printed.file.getvalue().splitlines() if " score " in line]
    assert row[-2] == "0.2500"
