"""Notebook 50 from trained runs and another data set's images to an extra run, and training on that."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import STUDY_CLASSES
from kitlib.lungs.finders import StoredLungs
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.recipes.fields import DetectorRecipe
from kitlib.runs.finished_run import read_extra, read_metrics, read_prepared
from kitlib.tables import read_table
from kitlib.training.apply_lungs import apply_lungs
from kitlib.training.driver import train_fold
from kitlib.training.task import Task
from kitlib.xrays.cache import XrayCache
from tests.executed_notebook import check_shown
from tests.runs.test_finished_run import prepared_run
from tests.small_lungs import bright_segmenter
from tests.small_xrays import RECIPE, SmallXrays

NOTEBOOK = project_root() / "notebooks" / "50_pseudo_label.ipynb"
QUICK = replace(RECIPE, epochs=1)
OF_LUNGS = replace(QUICK, lungs="masks", trained_on="lungs", views=("lungs",))
DETECTOR = DetectorRecipe(
    backbone="test_resnet",
    image_size=64,
    epochs=1,
    batch_size=4,
    fpn_channels=16,
    box_hidden=16,
    box_samples=8,
    proposals=20,
)


def other_images(small):
    """Another data set: new names, other noise; one image is a copy of a training image, one is of a known patient."""
    other = SmallXrays(8)
    rng = np.random.default_rng(99)
    names = {old: f"other{old[5:]}" for old in other.image_ids}
    other.pixels = {names[old]: (rng.integers(0, 255, (40, 50))).astype(np.uint8) for old in other.image_ids}
    other.pixels["other000"] = small.pixels["image010"]
    other.image_ids = list(names.values())
    other.images = other.images.assign(
        image_id=other.image_ids, study_id=other.image_ids, patient_id=[f"q{name}" for name in other.image_ids]
    )
    other.images.loc[7, "patient_id"] = "patient003"
    other.labels = pd.DataFrame({"id": other.image_ids, "Mass": 1.0})
    other.boxes = other.boxes.head(0)
    other.fold_table = pd.DataFrame({"id": other.image_ids, "fold": 0})
    return other


@pytest.fixture(scope="module")
def ended(tmp_path_factory, quick_processes):
    folder, small = tmp_path_factory.mktemp("pseudo"), SmallXrays(16)
    small.pixels["image010"] = np.random.default_rng(5).integers(0, 255, (40, 50)).astype(np.uint8)  # like no other
    prepare, other = folder / "prepare", folder / "other"
    prepared_run(prepare, small)
    others = other_images(small)
    prepared_run(other, others)
    xrays = XrayCache(prepare / "xrays", 50)
    apply_lungs(small.images, xrays, bright_segmenter(folder / "bright"), folder / "lungs", progress=False)
    lungs = StoredLungs(folder / "lungs")
    assert sum(frame.tolist() != [0, 0, 50, 40] for frame in lungs.frames.values()) >= 10  # crops, around the blocks
    tables = read_prepared(prepare)
    common = tables, XrayCache(prepare / "xrays", 50)
    for fold in (0, 1):
        train_fold(Task(*common, OF_LUNGS, "study", lungs=lungs), fold, folder / f"study/fold{fold}")
    train_fold(Task(*common, DETECTOR, "rcnn"), 0, folder / "rcnn/fold0")
    done = folder / "done"
    parameters = {
        "prepare_run": str(prepare),
        "runs": [str(folder / "study"), str(folder / "rcnn")],
        "source_run": str(other),
        "lungs_run": str(folder / "lungs"),
        "run_folder": str(done),
        "thresholds": [0.0, 0.0, 0.0],
        "workers": 1,
    }
    run_notebook(NOTEBOOK, folder / "executed.ipynb", parameters, done / "metrics.json", threads=1)
    return folder, tables, small


def test_what_one_folds_models_have_seen_is_left_to_the_other_folds(ended):
    folder, _, _ = ended
    metrics = read_metrics(folder / "done")
    assert metrics["images"] == 8 and metrics["left_out"] == 0 and metrics["judged_by_folds"] == [0, 1]
    assert (folder / "done" / "figures" / "examples.png").is_file()
    check_shown(folder / "executed.ipynb")
    images = read_table("images", folder / "done" / "tables" / "images.parquet").set_index("image_id")
    assert images["none"].between(0, 1).all()
    # A copy of image010 and an image of patient003, both in fold 1: the only detector, of fold 0, has seen them.
    assert images.index[images["unsure"]].tolist() == ["other000", "other007"]
    labels = read_table("labels", folder / "done" / "tables" / "labels.parquet").set_index("id")
    assert list(labels.columns) == list(STUDY_CLASSES) and labels.sum(axis=1).to_numpy() == pytest.approx(1)
    # The study model of fold 1 says of the copy what it said of the original, out of fold.
    told = read_table("image_scores", folder / "study/fold1/tables/image_scores.parquet").set_index("image_id")
    assert images.loc["other000", "none"] == pytest.approx(told.loc["image010", "none"], abs=1e-4)


def test_the_labelled_images_are_trained_on(ended, tmp_path):
    folder, tables, small = ended
    extra = read_extra(folder / "done")
    # One is of a patient of the training data, whom another fold would validate on.
    keep = ~extra.images["patient_id"].isin(small.images["patient_id"])
    extra = type(extra)(extra.images[keep], extra.labels, extra.boxes, extra.cache)
    study = train_fold(Task(tables, small, QUICK, "study", extra=extra), 0, tmp_path)
    assert study.metrics["extra"]["images"] == 7
