"""Notebook 25 from a prepared run to nested models: each image is judged by those that have not met its fold."""

import json

import pandas as pd
import pytest

from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.tables import read_table
from kitlib.xrays.cache import XrayCache
from tests.executed_notebook import check_shown
from tests.small_runs import prepare, tables_of
from tests.training.test_findings import SmallFindings

NOTEBOOK = project_root() / "notebooks" / "25_train_classifier.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_processes):
    folder, small = tmp_path_factory.mktemp("classifier"), SmallFindings(48, folds=3)
    prepared = prepare(folder / "prepare", tables_of(small))
    cache = XrayCache(prepared / "xrays", small.longest_side)
    for image_id in small.image_ids:
        cache.put(small.read(image_id))
    parameters = {
        "prepare_run": str(prepared),
        "run_folder": str(folder / "learner"),
        "recipe": "small_learner",
        "overrides": {"image_size": 32, "class_weights": True},
        "epochs": 1,
        "folds": [0, 1, 2],
        "outer_folds": [0, 2],
        "in_sample": True,
    }
    run_notebook(NOTEBOOK, folder / "executed.ipynb", parameters, folder / "learner" / "metrics.json", threads=1)
    return folder / "learner", small


def test_every_pair_of_an_outer_and_an_inner_fold_has_a_model(run):
    folder, _ = run
    bundles = sorted({str(path.relative_to(folder).parent) for path in folder.glob("*/*/bundle")})
    assert bundles == ["outer0/fold1", "outer0/fold2", "outer2/fold0", "outer2/fold1"]
    trained = json.loads((folder / "outer0" / "fold1" / "metrics.json").read_text())
    # Of 44 images in three folds, 16 are in fold 0 and 16 in fold 1; four of the last fold are the set's own test images.
    assert (trained["train_images"], trained["validation_images"], trained["test_images"]) == (12, 16, 20)


def test_class_scores_are_of_models_that_had_not_seen_the_image(run):
    folder, small = run
    own = small.fold_table.set_index("id").fold
    nested = read_table("nested_scores", folder / "tables" / "nested_scores.parquet")
    place = nested.image_id.map(own)
    # Every one of the four models has answered for all 44 images: its training images, its own fold, the outer fold.
    assert len(nested) == 4 * 44
    assert ((place != nested.outer) & (place != nested.fold)).sum() == 12 + 16 + 16 + 16
    judged = read_table("class_scores", folder / "tables" / "class_scores.parquet").set_index("image_id")
    assert set(judged.index) == set(own.index[own.isin([0, 2])]) and (judged.fold == own[judged.index]).all()
    of_first = nested[(nested.outer == 0) & (place == 0)].groupby("image_id").Mass.mean()
    pd.testing.assert_series_equal(judged.Mass[of_first.index], of_first, check_names=False)
    test = read_table("class_scores", folder / "tables" / "test_scores.parquet")
    assert set(test.image_id) == set(small.image_ids) - set(own.index)


def test_a_finished_run_has_its_metrics_and_pictures(run):
    folder, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (
        metrics["outer_folds"] == [0, 2]
        and 0 <= metrics["score"] <= 1
        and set(metrics["test"]) == set(metrics["out_of_fold"])
    )
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures == {"confusion", "curves", "examples", "test_confusion"}
    check_shown(folder.parent / "executed.ipynb", pictures=4 + 4)  # the curves of each of four models
