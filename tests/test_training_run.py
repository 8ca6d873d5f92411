"""The split, who may use a run folder, and what one holds at the end."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_xrays import SmallXrays

from kitlib.training_run import Fitted, ResumeError, draw_curves, open_run, split


def test_the_split_keeps_folds_apart_and_drops_false_none_images():
    small = SmallXrays(32)
    marked = small.images.assign(false_none=small.images.image_id == "image002")
    train, validation = split(marked, small.fold_table, 1, seed=0)
    assert len(train) == 15 and len(validation) == 16
    assert set(train.patient_id).isdisjoint(validation.patient_id)
    assert set(validation.image_id) == set(small.fold_table.id[small.fold_table.fold == 1])


SMALL = SmallXrays(32)  # four images a patient


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 16), st.integers(0, 20))
def test_limits_keep_patients_whole(limit, seed):
    train, validation = split(SMALL.images, SMALL.fold_table, 0, seed, limit_train=limit, limit_validation=4)
    assert len(train) == limit // 4 * 4 and len(validation) == 4
    assert (train.patient_id.value_counts() == 4).all()


def test_an_impossible_split_is_named():
    small = SmallXrays(16)
    with pytest.raises(ValueError, match=r"fold 7 leaves nothing.*folds: \[0, 1\]"):
        split(small.images, small.fold_table, 7, seed=0)
    with pytest.raises(ValueError, match="1 images of the folds are not in the table images, first image000"):
        split(small.images[1:], small.fold_table, 0, seed=0)


def test_a_run_folder_belongs_to_one_run(tmp_path):
    identity = {"fold": 0, "recipe": {"epochs": 3, "rates": (1, 2)}, "data_fingerprint": "abc"}
    assert open_run(tmp_path, identity, resume=True) is False
    assert open_run(tmp_path, identity, resume=True) is False
    other = identity | {"recipe": {"epochs": 5, "rates": (1, 2)}, "data_fingerprint": "abd"}
    with pytest.raises(ResumeError, match=r"data_fingerprint: 'abc' there, 'abd' here; recipe\.epochs: 3 there, 5 here"):
        open_run(tmp_path, other, resume=True)
    (tmp_path / "metrics.json").write_text("{}")
    assert open_run(tmp_path, identity, resume=True) is True
    assert open_run(tmp_path, other, resume=False) is False
    assert not (tmp_path / "metrics.json").exists()
    assert open_run(tmp_path, other, resume=True) is False


def test_curves_show_what_was_logged(tmp_path):
    columns = {"epoch": [1, 2], "seconds": [1.0, 1.0], "images_per_s": [9.0, 9.0], "learning_rate": [0.1, 0.05]}
    history = pd.DataFrame(columns | {"train_loss": [2.0, 1.0], "score": [0.4, 0.5], "typical": [math.nan, 0.5]})
    draw_curves(Fitted(history, 2), tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
