"""Splits of folds, extra images, the identity of a run folder, and its curves."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import STUDY_CLASSES
from kitlib.errors import TrainingError
from kitlib.runs.finished_run import ExtraImages
from kitlib.tables import check_table
from kitlib.training.fold_folder import FitResult, continue_from, draw_curves, mean_curves, open_run
from kitlib.training.split import split, with_extra
from kitlib.training.xray_dataset import XrayDataset
from tests.small_tasks import small_task
from tests.small_xrays import RECIPE, SmallXrays


def test_the_split_keeps_folds_apart_and_drops_false_none_images():
    small = SmallXrays(32)
    marked = small.images.assign(false_none=small.images.image_id == "image002")
    train, validation = split(marked, small.fold_table, 1, seed=0)
    assert len(train) == 15 and len(validation) == 16
    for part in (train, validation, split(marked, small.fold_table, 1, 0, limit_train=4)[0]):
        assert part.columns.equals(marked.columns) and part.index.tolist() == list(range(len(part)))
    assert set(train.patient_id).isdisjoint(validation.patient_id)
    assert set(validation.image_id) == set(small.fold_table.id[small.fold_table.fold == 1])


SMALL = SmallXrays(32)  # four images a patient


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 16), st.integers(0, 20))
def test_limits_keep_patients_whole(limit, seed):
    train, validation = split(SMALL.images, SMALL.fold_table, 0, seed, limit_train=limit, limit_validation=4)
    assert len(train) == limit // 4 * 4 and len(validation) == 4
    assert (train.patient_id.value_counts() == 4).all()


def test_an_impossible_split_raises_an_error_that_lists_the_folds():
    small = SmallXrays(16)
    with pytest.raises(ValueError, match=r"fold 7 leaves no images for validation .*available folds: \[0, 1\]"):
        split(small.images, small.fold_table, 7, seed=0)
    with pytest.raises(ValueError, match="1 ids in `folds` are not in the `images` table; the first is 'image000"):
        split(small.images[1:], small.fold_table, 0, seed=0)


def test_a_run_folder_belongs_to_one_run(tmp_path):
    identity = {"fold": 0, "recipe": {"epochs": 3, "rates": (1, 2)}, "data_fingerprint": "abc"}
    begin(tmp_path, identity)
    assert open_run(tmp_path, identity, resume=True) is False
    # Neither the place of the weights nor another format of the curves makes another run.
    moved = {"epochs": 3, "rates": (1, 2), "curves": "wandb", "starting_weights": "elsewhere"}
    assert open_run(tmp_path, identity | {"recipe": moved}, resume=True) is False
    other = identity | {"recipe": {"epochs": 5, "rates": (1, 2)}, "data_fingerprint": "abd"}
    listing = r"data_fingerprint: 'abc' recorded, 'abd' requested; recipe\.epochs: 3 recorded, 5 requested"
    advice = f"to keep it, set run_folder to another name; to replace it, delete {tmp_path}"
    with pytest.raises(TrainingError, match=rf"{listing}.*{advice}"):
        open_run(tmp_path, other, resume=True)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(TrainingError, match=listing):
        open_run(tmp_path, other, resume=True)
    assert open_run(tmp_path, identity, resume=True) is True
    assert open_run(tmp_path, other, resume=False) is False
    assert not (tmp_path / "metrics.json").exists()
    assert open_run(tmp_path, other, resume=True) is False


def test_a_folder_without_a_checkpoint_is_taken_over_by_another_run(tmp_path):
    # Training that failed within its first epoch, for example because of a wrong value, can start again with another value.
    wrong, right = {"fold": 0, "recipe": {"epochs": 3}}, {"fold": 0, "recipe": {"epochs": 5}}
    assert open_run(tmp_path, wrong, resume=True) is False
    (tmp_path / "checkpoints" / ".last.ckpt.half").touch()
    assert open_run(tmp_path, right, resume=True) is False
    for result in ("last.ckpt", "lungs-000000.parquet"):  # of training and of segmenting
        (tmp_path / "checkpoints" / result).touch()
        assert open_run(tmp_path, right, resume=True) is False
        with pytest.raises(TrainingError, match=r"recipe\.epochs: 5 recorded, 3 requested"):
            open_run(tmp_path, wrong, resume=True)
        (tmp_path / "checkpoints" / result).unlink()


def write_fold(fold, epoch, finished):
    """Write a fold's folder with the last complete epoch `epoch` (from 0), or none."""
    (fold / "checkpoints").mkdir(parents=True)
    (fold / "checkpoints" / "run.json").write_text("{}")
    if epoch is not None:
        torch.save({"epoch": epoch}, fold / "checkpoints" / "last.ckpt")
    if finished:
        (fold / "metrics.json").write_text("{}")


@pytest.mark.parametrize(
    ("earlier", "own", "copied"),
    [
        ((0, False), None, True),
        ((0, False), (None, False), True),
        ((1, False), (0, False), True),
        ((1, False), (1, False), False),
        ((1, False), (2, False), False),
        ((1, True), (1, False), True),
        ((5, False), (1, True), False),  # a finished fold may have ended early
    ],
)
def test_a_fold_is_copied_if_the_earlier_session_has_trained_it_further(tmp_path, earlier, own, copied):
    write_fold(tmp_path / "earlier" / "fold1", *earlier)
    if own:
        write_fold(tmp_path / "run" / "fold1", *own)
    leftover = tmp_path / "run" / ".fold1.copying" / "leftover"  # of a copy that was killed
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    (line,) = continue_from(tmp_path / "earlier", tmp_path / "run")
    assert line.startswith("fold1: resumes from" if copied else "fold1: not copied")
    files = {path.name for path in (tmp_path / "run" / "fold1").rglob("*") if path.is_file()}
    epoch, is_finished = earlier if copied else own
    assert files == {"run.json", *["last.ckpt"] * (epoch is not None), *["metrics.json"] * is_finished}


def begin(folder, identity):
    """Create a run folder with one completed epoch."""
    assert open_run(folder, identity, resume=True) is False
    (folder / "checkpoints" / "last.ckpt").touch()


def history():
    columns = {"epoch": [1, 2], "seconds": [1.006, 2.0], "images_per_s": [9.0, 10.999], "learning_rate": [0.1, 0.05]}
    return pd.DataFrame(columns | {"train_loss": [2.0, 1.0], "score": [0.4, 0.5], "typical": [math.nan, 0.5]})


def test_a_run_is_described_by_its_best_epoch_its_seconds_and_its_mean_speed():
    fitted = FitResult(history().assign(atypical=math.inf), 1)
    assert fitted.metrics(torch.device("cpu")) == {
        **{"best_epoch": 1, "epochs": 2, "seconds": 3.01, "images_per_s": 10.0, "device": "cpu", "precision": "32-true"},
        "best": {"train_loss": 2.0, "score": 0.4},  # without unknown values
    }


def test_curves_show_what_was_logged(tmp_path):
    draw_curves(FitResult(history(), 2), tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_over_folds_has_a_band_and_ends_with_the_longest_fold():
    columns = {"seconds": 1.0, "images_per_s": 9.0, "learning_rate": 0.1}
    long = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "score": [0.4, 0.6]}).assign(**columns)
    short = pd.DataFrame({"epoch": [1], "train_loss": [4.0], "score": [0.2]}).assign(**columns)
    losses, scores = mean_curves([long, short]).axes
    assert [line.get_ydata().tolist() for line in (*losses.lines, *scores.lines)] == [[3.0, 1.0], pytest.approx([0.3, 0.6])]
    # The standard deviation of 2 and 4 is sqrt(2); one fold alone has no spread.
    band = losses.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1.0, pytest.approx(3 + 2**0.5))


def renamed(small, columns=("image_id", "study_id", "patient_id"), prefix="x"):
    """Return the images as extra images, with new ids in `columns`."""
    images = small.images.assign(**{column: prefix + small.images[column] for column in columns})
    labels, boxes = small.labels, small.boxes
    if "study_id" in columns:
        labels = labels.assign(id=prefix + labels.id)
    if "image_id" in columns:
        boxes = boxes.assign(image_id=prefix + boxes.image_id)
        small.pixels = {prefix + image_id: pixels for image_id, pixels in small.pixels.items()}
    return ExtraImages(images, labels, boxes, small)


def joined(small, extra):
    train, validation = split(small.images, small.fold_table, 0, seed=0)
    small.boxes = check_table(small.boxes, "boxes")  # as in a task
    return with_extra(train, small.labels, small.boxes, small, extra, validation)


def test_extra_images_are_trained_on_and_read_from_their_own_cache():
    small, brighter = SmallXrays(16), SmallXrays(8)
    brighter.pixels = {image_id: pixels // 2 for image_id, pixels in brighter.pixels.items()}
    extra = renamed(brighter)
    soft = extra.labels.assign(negative=0.25)
    extra = ExtraImages(extra.images.assign(none=0.4), soft, extra.boxes, extra.cache)
    images, labels, boxes, cache = joined(small, extra)
    assert images.image_id.tolist() == [*small.image_ids[8:], *("x" + each for each in small.image_ids[:8])]
    examples = XrayDataset(images, labels, boxes, cache, RECIPE)
    alone = XrayDataset(small.images, small.labels, small.boxes, small, RECIPE)
    ours, theirs = examples[2], examples[10]
    assert np.array_equal(ours["pixels"], alone[10]["pixels"]) and ours["none"] == alone[10]["none"]
    assert theirs["pixels"].max() == 127 and theirs["none"] == pytest.approx(0.4)
    assert theirs["label"].tolist() == [0.25, 1, 0, 0] and len(theirs["boxes"]) == 1
    assert cache.longest_side == small.longest_side
    assert joined(small, None)[1:] == (small.labels, small.boxes, small)


@pytest.mark.parametrize("shared", ["image_id", "study_id", "patient_id"])
def test_extra_images_that_are_validated_on_are_refused(shared):
    others = [column for column in ("image_id", "study_id", "patient_id") if column != shared]
    with pytest.raises(
        ValueError, match=f"8 of 16 extra images have the same {shared} as validation images; .* '{shared[:5]}"
    ):
        joined(SmallXrays(16), renamed(SmallXrays(16), others))


def test_extra_images_that_are_trained_on_already_are_refused_and_false_none_ones_left_out():
    small, extra = SmallXrays(16), renamed(SmallXrays(16))
    train, _ = split(small.images, small.fold_table, 0, seed=0)
    again = ExtraImages(train, small.labels, small.boxes, small)
    with pytest.raises(ValueError, match=r"8 of 8 extra images have the same image_id as training images; .* 'image008'"):
        joined(small, again)
    marked = ExtraImages(
        extra.images.assign(false_none=[True] * 12 + [False] * 3 + [None]), extra.labels, extra.boxes, extra.cache
    )
    assert len(joined(small, marked)[0]) == 8 + 4
    none = ExtraImages(extra.images.assign(false_none=True), extra.labels, extra.boxes, extra.cache)
    with pytest.raises(ValueError, match="the extra run has no image to train this model on"):
        joined(small, none)


def test_extra_tables_do_not_change_other_images(caplog):
    # A box and a label of the extra run for other images must not be added to validation images.
    small, extra = SmallXrays(16), renamed(SmallXrays(16))
    stray = pd.concat([extra.boxes, small.boxes], ignore_index=True)
    opacity = extra.labels[["id"]].assign(opacity=1.0)
    _, labels, boxes, _ = joined(small, ExtraImages(extra.images, opacity, stray, extra.cache))
    assert len(boxes) == 2 * len(small.boxes) and not boxes.duplicated().any()
    assert list(labels.columns) == ["id", *STUDY_CLASSES] and labels.iloc[len(small.labels) :, 1:].isna().all(axis=None)
    assert "no labels for negative, typical, indeterminate, atypical" in caplog.text
    caplog.clear()
    joined(small, ExtraImages(extra.images, extra.labels.assign(typical=math.nan), extra.boxes, extra.cache))
    assert "no labels for typical;" in caplog.text


def identity(extra=None, lungs=None):
    return small_task(SMALL, RECIPE, extra=extra, lungs=lungs).identity(0)


def test_the_lungs_are_part_of_a_runs_identity(tmp_path):
    one, other = (SimpleNamespace(fingerprint=digest, segmenter="ef" * 32) for digest in ("ab" * 32, "cd" * 32))
    assert "lungs_fingerprint" not in identity()
    begin(tmp_path, identity(lungs=one))
    assert open_run(tmp_path, identity(lungs=one), resume=True) is False
    for differs, requested in ((identity(lungs=other), "cd" * 32), (identity(), "-")):
        with pytest.raises(TrainingError, match=rf"lungs_fingerprint: 'abab\w+' recorded, '{requested}' requested"):
            open_run(tmp_path, differs, resume=True)


def test_extra_images_are_part_of_a_runs_identity(tmp_path):
    extra = renamed(SmallXrays(8))
    softer = ExtraImages(extra.images.assign(none=0.5), extra.labels, extra.boxes, extra.cache)
    relabelled = ExtraImages(extra.images, extra.labels.assign(typical=0.5), extra.boxes, extra.cache)
    assert "extra" not in identity()
    records = [identity(each)["extra"] for each in (extra, softer, relabelled)]
    assert all(first != other for index, first in enumerate(records) for other in records[:index])
    assert identity(renamed(SmallXrays(8))) == identity(extra)
    begin(tmp_path, identity(extra))
    with pytest.raises(TrainingError, match=r"extra\.none_fingerprint: '\w+' recorded, '\w+' requested"):
        open_run(tmp_path, identity(softer), resume=True)
    with pytest.raises(TrainingError, match=r"extra\.images: 8 recorded, '-' requested"):
        open_run(tmp_path, identity(), resume=True)
