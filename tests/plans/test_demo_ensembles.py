"""The plan `demo_ensembles` at its smallest: its phantoms, data preparation, ensemble and report, with made-up learners."""

import json

import numpy as np
import pandas as pd
import pytest

from kitlib.paths import project_root
from kitlib.plans.plan import read_plan
from kitlib.runs.finished_run import read_prepared
from kitlib.tables import write_table
from tests.small_plans import carry_out

PLAN = project_root() / "submissions" / "plans" / "demo_ensembles.yaml"
CLASSES = ["COVID-19", "not COVID-19"]


def write_learner(run, tables, sure):
    """Write the run of a learner of fold 0 that gives true classes the probability `sure`, but not for one image in four."""
    images = tables["images"].merge(tables["folds"], left_on="image_id", right_on="id", how="left")
    truth = tables["labels"].set_index("id").loc[images.study_id, CLASSES].to_numpy()
    wrong = np.arange(len(images)) % 4 == 0
    probabilities = np.where((truth == 1) ^ wrong[:, None], sure, 1 - sure)
    rows = pd.DataFrame(probabilities, columns=CLASSES)
    rows = rows.assign(image_id=images.image_id, model=run.parameters["model_name"], fold=0)
    for name, chosen in (("class_scores", images.fold == 0), ("test_scores", images["split"] == "test")):
        write_table(rows[chosen], "class_scores", run.folder / "tables" / f"{name}.parquet")
    write_table(rows[images.fold == 0].assign(outer=-1), "nested_scores", run.folder / "tables" / "nested_scores.parquet")
    (run.folder / "metrics.json").write_text(json.dumps({"model": run.parameters["model_name"]}))


@pytest.fixture(scope="module")
def planned(tmp_path_factory, quick_processes):
    folder = tmp_path_factory.mktemp("demo")
    smallest = {"inputs": str(folder / "inputs"), "images": 40, "fewer": 24, "side": 32}
    planned = read_plan(PLAN, folder / "runs", smallest).planned
    for name in ("covidx", "ricord", "bimcv", "covidgr"):
        carry_out(planned[f"{name}_phantoms"])
    for name in ("prepare_two", "ensemble_two", "report_two"):
        # Training, lungs and heat maps have their own tests.
        carry_out(planned[name], **({"lungs_run": None, "samples": 10} if name == "report_two" else {}))
        if name == "prepare_two":
            tables = read_prepared(planned[name].folder)
            learners = [each for each in planned.values() if each.step == "learner_two"]
            for learner, sure in zip(learners, (0.9, 0.8, 0.7), strict=True):
                write_learner(learner, tables, sure)
    return planned


def test_covidgr_is_put_aside_whole_and_no_patient_is_on_both_sides(planned):
    images = read_prepared(planned["prepare_two"].folder)["images"]
    aside = images[images.source == "covidgr"]
    # 24 phantoms, one of them damaged.
    assert len(aside) == 23 and (aside["split"] == "test").all()
    others = images[images.source != "covidgr"]
    assert set(others["split"]) == {"train", "test"}
    assert images.groupby("patient_id")["split"].nunique().max() == 1


def test_a_report_prints_the_documents_tables_above_what_the_plan_keeps(planned):
    folder = planned["report_two"].folder
    published = pd.read_csv(folder / "published.csv")
    assert set(published.table) == {"ensemble_two", "radiologists", "pipelines"}
    for _, rows in published.groupby("table"):
        assert rows["from"].tolist() == sorted(rows["from"], reverse=True)  # "published" above "here"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["pictured"] == planned["report_two"].parameters["pictured"]
    assert {"confusion", "class_curves"} <= {path.stem for path in (folder / "figures").glob("*.png")}
    # `source: not covidgr`
    images = read_prepared(planned["prepare_two"].folder)["images"]
    assert metrics["images"] == ((images["split"] == "test") & (images.source != "covidgr")).sum() > 0
