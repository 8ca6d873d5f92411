"""Submissions beside the ground truth: which X-rays are chosen, and what is drawn on them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import MASK_CODES, STUDY_CLASSES
from kitlib.competitions.registry import find_competition
from kitlib.reports.answers import RunMasks, answered_boxes, answers_figure, score_table, submitted_ids, varied_sample
from kitlib.tables import BOX
from kitlib.xrays.run_lengths import NO_RUNS, runs_of
from tests.small_xrays import COLUMNS, ROWS, SmallXrays

SMALL = SmallXrays(8)  # image000 and image001 have no box, the others have one


@settings(max_examples=25, deadline=None)
@given(usual=st.integers(5, 8), others=st.integers(0, 4), count=st.integers(0, 14), seed=st.integers(0, 9))
def test_half_of_a_sample_has_the_most_frequent_labels_if_there_are_enough_of_both_kinds(usual, others, count, seed):
    kinds = np.array([0] * usual + [1, 2, 3, 1][:others])
    studies = [f"s{number}" for number in range(len(kinds))]
    images = pd.DataFrame({"image_id": [f"i{number}" for number in range(len(kinds))], "study_id": studies})
    labels = pd.DataFrame(np.eye(4)[kinds], columns=list(STUDY_CLASSES))
    labels.insert(0, "id", studies)
    sample = varied_sample(images, labels.sample(frac=1, random_state=seed), count, seed)
    assert sample.image_id.is_unique and len(sample) == min(count, len(images))
    # The larger half is of the others; what one kind lacks is taken from the other kind.
    assert (kinds[sample.index] > 0).sum() == min(others, max(count - count // 2, count - usual))
    assert sample.equals(varied_sample(images, labels, count, seed))


def test_samples_of_different_seeds_differ():
    samples = [varied_sample(SMALL.images, SMALL.labels, 4, seed).image_id.tolist() for seed in range(5)]
    assert len(set(map(tuple, samples))) > 1


def test_images_without_a_label_are_one_of_the_kinds():
    images = SMALL.images[["image_id", "study_id"]].replace({"study_id": {"study000": "elsewhere"}})
    assert sorted(varied_sample(images, SMALL.labels, 8, 0)["image_id"]) == SMALL.image_ids


def test_submissions_are_scored_side_by_side(tmp_path):
    truth = {"a": NO_RUNS, "b": np.array([[0, 4]])}
    for name, of_b in (("half", "2 4"), ("empty", "-1")):
        (tmp_path / f"{name}.csv").write_text(f"ImageId,EncodedPixels\nb,{of_b}\na,-1\n")
    files = {name: tmp_path / f"{name}.csv" for name in ("half", "empty")}
    table = score_table(find_competition("siim-acr"), truth, files)
    assert table["half"].to_dict() == {"score": 0.75, "with_pneumothorax": 0.5, "without": 1}
    assert table["empty"].to_dict() == {"score": 0.5, "with_pneumothorax": 0, "without": 1}
    assert submitted_ids(files["half"]) == ["b", "a"]


def found(*rows):
    return pd.DataFrame(rows, columns=["image_id", "finding", "score", *BOX])


def test_boxes_of_a_submission_are_in_pixels_of_the_image_files():
    rows = found(
        ("image000", "opacity", 0.5, 512.0, 512.0, 1024.0, 1024.0), ("image001", "No finding", 0.5, 0.0, 0.0, 1.0, 1.0)
    )
    # The published images have 1024 x 1024 pixels, the files 100 x 80.
    boxes = answered_boxes(find_competition("rsna-pneumonia"), rows, SMALL.images)
    assert boxes.columns.tolist() == rows.columns.tolist()
    assert boxes.image_id.tolist() == ["image000"] and boxes[list(BOX)].to_numpy().tolist() == [[50, 40, 100, 80]]
    unscaled = answered_boxes(
        find_competition("vinbigdata"), rows.assign(finding=["Cardiomegaly", "No finding"]), SMALL.images
    )
    assert unscaled[list(BOX)].to_numpy().tolist() == [[512, 512, 1024, 1024]] and unscaled.finding.tolist() == [
        "Cardiomegaly"
    ]


def test_every_submitted_box_is_drawn_however_low_its_confidence():
    images = SMALL.images.iloc[[0, 2]]
    boxes = found(("image000", "opacity", 0.0, 20.0, 10.0, 40.0, 30.0))
    figure = answers_figure(find_competition("rsna-pneumonia"), SMALL, images, SMALL.tables(), None, boxes)
    healthy, ill = figure.axes[:2]
    # The decoded copy has half the size of the original, and the first pixel begins at -0.5.
    assert [patch.get_bbox().extents.tolist() for patch in healthy.patches] == [
        pytest.approx([9.5, 4.5, 19.5, 14.5], abs=0.5)
    ]
    assert len(ill.patches) == 1 and healthy.texts and not ill.texts
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["annotated", "predicted, with confidence"]


def test_submitted_masks_are_drawn_in_the_size_of_the_decoded_copy():
    left = np.zeros((1024, 1024), bool)
    left[:, :502] = True  # interpolated, the last column would get another structure's code
    runs = {"image001": runs_of(left)}
    masks = RunMasks(runs, SMALL, MASK_CODES["pneumothorax"])
    expected = np.zeros((ROWS // 2, COLUMNS // 2))
    expected[:, : COLUMNS // 4] = MASK_CODES["pneumothorax"]
    assert np.array_equal(masks.read("image001"), expected) and "image001" in masks and "image000" not in masks
    figure = answers_figure(find_competition("siim-acr"), SMALL, SMALL.images[:2], SMALL.tables(), None, runs)
    assert [len(axis.collections) for axis in figure.axes[:2]] == [0, 1]


def test_probabilities_are_written_beside_the_chosen_images_alone():
    answers = pd.DataFrame({"image_id": SMALL.image_ids, **dict.fromkeys(STUDY_CLASSES, 0.1), "typical": 0.7})
    figure = answers_figure(find_competition("ranzcr-clip"), SMALL, SMALL.images[2:3], SMALL.tables(), None, answers)
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == ["image002\nground truth: typical"]
    assert drawn[0].texts[0].get_text().startswith("typical 0.70")
