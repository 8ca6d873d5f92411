"""The demos of the further competitions: their steps fit together, and RANZCR CLiP's is carried out at its smallest."""

from dataclasses import replace

import pandas as pd
import pytest

from kitlib.competitions.registry import find_competition
from kitlib.kernels.build import build_kernel
from kitlib.kernels.spec import read_spec
from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.plans.trainings import count_trainings
from tests.small_kernels import make_wheel
from tests.small_plans import carry_out

ROOT = project_root()
SUBMISSIONS = ROOT / "submissions"
DEMOS = {
    "demo_ranzcr": "ranzcr-clip",
    "demo_vinbigdata": "vinbigdata",
    "demo_rsna": "rsna-pneumonia",
    "demo_siim_acr": "siim-acr",
}
SMALLEST = {"images": 24, "test_images": 8, "side": 64, "folds": [0, 1]}


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_leads_from_phantoms_to_a_scored_submission(name):
    competition, spec = find_competition(DEMOS[name]), read_spec(SUBMISSIONS / f"{name}.yaml", owner="someone")
    planned = read_plan(SUBMISSIONS / "plans" / f"{name}.yaml").planned
    models = [run for run in planned.values() if count_trainings(run)]
    assert list(planned) == ["phantoms", "prepare", *(run.name for run in models), "fuse", "kernel", "report"]
    fuse, kernel, report = planned["fuse"], planned["kernel"], planned["report"]
    folds = {run.folder / f"fold{fold}" for run in models for fold in run.parameters["folds"]}
    assert {ROOT / run for run in spec.runs} == folds and spec.rules is competition
    assert set(fuse.parameters["runs"]) == {str(run.folder) for run in models}
    assert find_competition(fuse.parameters["competition"]) is competition
    assert ROOT / spec.fusion == fuse.folder / "fusion.json" and set(kernel.needs) == {*(run.name for run in models), "fuse"}
    assert report.parameters["submission"] == str(kernel.result) and "kernel" in report.needs


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory, quick_processes):
    """The folder of RANZCR CLiP's demo, in which notebook 70 has run with the built kernel's weights."""
    folder = tmp_path_factory.mktemp("ranzcr")
    spec = (SUBMISSIONS / "demo_ranzcr.yaml").read_text().replace("runs/demo_ranzcr", str(folder / "runs"))
    (folder / "submission.yaml").write_text(spec)
    smallest = {**SMALLEST, "inputs": str(folder / "inputs"), "truth": str(folder / "truth")}
    planned = read_plan(SUBMISSIONS / "plans" / "demo_ranzcr.yaml", folder / "runs", smallest).planned
    smaller = {"prepare": {"workers": 1}, "classifier": {"epochs": 1}, "report": {"shown": 2}}
    for run in planned.values():
        if run.step != "kernel":
            carry_out(run, **smaller.get(run.step, {}))
            continue
        wheel = make_wheel(folder / "wheels", "kit_extra", "1.2")
        weights = build_kernel(read_spec(folder / "submission.yaml"), run.folder, [wheel])["weights"]
        values = {"competition": planned["prepare"].parameters["competition"], "rules": "ranzcr-clip"}
        values |= {"weights": str(weights), "output": str(run.result), "workers": 1, "processes": 1, "time_limit_s": 600.0}
        carry_out(replace(run, notebook=ROOT / "notebooks" / "70_submit.ipynb", parameters=values))
    return folder


def test_every_model_predicts_every_test_image(carried_out):
    ledger = pd.read_csv(carried_out / "runs/kernel/working/ledger.csv").set_index("stage")
    assert [ledger.files[f"classifier-fold{fold}"] for fold in (0, 1)] == [8, 8]


def test_the_submission_is_valid_and_no_row_is_the_baselines(carried_out):
    competition = find_competition("ranzcr-clip")
    submission, sample = carried_out / "runs/kernel/working/submission.csv", carried_out / f"inputs/{competition.slug}"
    assert competition.validate_file(submission, sample / "sample_submission.csv") == []
    table = pd.read_csv(submission)
    assert len(table) == 8 and not table.iloc[:, 1:].duplicated().any()


def test_the_report_has_the_submissions_score_beside_the_baselines(carried_out):
    for name in ("out_of_fold", "submission"):
        scores = pd.read_csv(carried_out / f"runs/report/{name}.csv").set_index("part")
        assert scores.loc["score", "baseline"] == 0.5  # equal values for all images
    known = scores["submission"].dropna()
    assert list(scores.index) == ["score", *find_competition("ranzcr-clip").image_classes]
    assert known["score"] == pytest.approx(known.drop("score").mean())
    assert (carried_out / "runs/report/figures/examples.png").is_file()
