import pandas as pd
import pytest

from kitlib.atomic import write_json
from kitlib.runs import RunError, read_metrics, read_out_of_fold
from kitlib.tables import write_table

SCORES = pd.DataFrame({"image_id": ["a", "b"], "model": "study", "fold": [0, 1], "none": [0.25, 0.5]})


def make_run(folder, model, **tables):
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {"model": model})
    return folder


def test_predictions_of_several_runs_come_together(tmp_path):
    first = make_run(tmp_path / "1", "study", image_scores=SCORES)
    second = make_run(tmp_path / "2", "other", image_scores=SCORES.assign(model="other"))
    found = read_out_of_fold([first, second])
    assert found.image_scores[["image_id", "model"]].to_numpy().tolist() == [
        ["a", "study"],
        ["b", "study"],
        ["a", "other"],
        ["b", "other"],
    ]
    assert len(found.detections) == len(found.study_scores) == 0


def test_a_run_that_is_unfinished_or_of_another_kind_is_named(tmp_path):
    run = make_run(tmp_path / "run", "study", image_scores=SCORES)
    with pytest.raises(RunError, match=r"metrics\.json is missing: .*no such folder"):
        read_metrics(tmp_path / "nothing")
    with pytest.raises(RunError, match="has no tables of predictions"):
        read_out_of_fold([make_run(tmp_path / "prepare", None)])
    with pytest.raises(RunError, match="both call their model 'study'"):
        read_out_of_fold([run, make_run(tmp_path / "again", "study", image_scores=SCORES)])
