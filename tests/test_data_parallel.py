"""What two processes that train one model must have in common."""

import numpy as np
import pytest
from small_xrays import RECIPE, SmallXrays

from kitlib.data_parallel import train_together
from kitlib.recipes import override
from kitlib.train_study import train_study


def arguments(recipe):
    small = SmallXrays(16)
    tables = {"images": small.images, "labels": small.labels, "boxes": small.boxes, "folds": small.fold_table}
    return {**tables, "fold": 1, "cache": small, "recipe": recipe, "model_name": "small", "progress": False}


def test_the_model_that_is_kept_is_the_one_that_both_have_judged(tmp_path):
    # Each process's batch norm has met other images, and one process predicts with the bundle of the first.
    recipe = override(RECIPE, epochs=2, ema_decay=0.9, outputs="none", learning_rate=1e-2)
    run = train_together(train_study, tmp_path, 2, **arguments(recipe))
    truth = ~run.image_scores.image_id.isin(SmallXrays(16).boxes.image_id)
    probability = np.where(truth, run.image_scores.none, 1 - run.image_scores.none)
    assert run.metrics["best"]["validation_loss"] == pytest.approx(-np.log(probability).mean(), rel=1e-5)
