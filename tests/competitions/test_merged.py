"""Merged predictions as a table of boxes, as one probability for each image, and of some images alone."""

import numpy as np
import pandas as pd
import pytest

from kitlib.competitions.merged import MergedPredictions, weighted_mean
from kitlib.tables import BOX

NAN = float("nan")


@pytest.fixture
def merged():
    """Images a to d of the studies s and t; no detector has seen d, and the classifier has seen only b and c."""
    images = pd.DataFrame({"image_id": list("abcd"), "study_id": list("sstt")})
    studies = pd.DataFrame({"study_id": ["t", "s"], "negative": [0.1, 0.2]})
    scores = pd.DataFrame({"image_id": ["c", "b"], "none": [0.3, 0.4]})
    places = [(2, "x", 0.5, 1, 2, 3, 4), (0, "y", 0.7, 5, 6, 7, 8), (2, "y", 0.25, 0, 0, 9, 9)]
    boxes = pd.DataFrame(places, columns=["row", "finding", "score", *BOX]).astype({"row": np.int32})
    masks = pd.DataFrame({"image_id": ["a", "c"], "finding": "x", "map": [b"1", b"2"]})
    return MergedPredictions(images, studies, scores, boxes, np.array([True, True, True, False]), masks)


def test_boxes_have_the_ids_of_their_images(merged):
    table = merged.detections()
    assert list(table) == ["image_id", "finding", "score", *BOX]
    assert table["image_id"].tolist() == ["c", "a", "c"] and table["score"].tolist() == [0.5, 0.7, 0.25]


def test_each_image_has_a_probability_or_nan(merged):
    np.testing.assert_array_equal(merged.probability("none"), [NAN, 0.4, 0.3, NAN])
    np.testing.assert_array_equal(merged.probability("other"), [NAN] * 4)
    np.testing.assert_allclose(merged.no_box(), [0.3, 1, 0.5, NAN])


def test_a_part_has_the_rows_of_its_images_and_their_studies(merged):
    part = merged.part(np.array([False, True, True, False]))
    assert part.images["image_id"].tolist() == ["b", "c"] and part.seen.tolist() == [True, True]
    assert part.detections().to_numpy().tolist() == [["c", "x", 0.5, 1, 2, 3, 4], ["c", "y", 0.25, 0, 0, 9, 9]]
    assert part.boxes["row"].tolist() == [1, 1]
    assert part.scores["image_id"].tolist() == ["c", "b"] and part.masks["image_id"].tolist() == ["c"]
    alone = merged.part(np.array([True, False, False, False]))
    assert alone.studies["study_id"].tolist() == ["s"] and alone.scores.empty and alone.boxes["row"].tolist() == [0]


def test_a_weighted_mean_ignores_nan_and_prefers_the_first_if_no_weight_is_left():
    parts = np.array([[0.2, NAN, NAN, 0.2], [0.6, 0.6, NAN, NAN], [0.9, 0.9, NAN, 0.9]])
    np.testing.assert_allclose(weighted_mean(parts, np.array([1.0, 3.0, 0.0])), [0.5, 0.6, NAN, 0.2])
    np.testing.assert_allclose(weighted_mean(parts, np.array([0.0, 0.0, 2.0])), [0.9, 0.9, NAN, 0.9])
    np.testing.assert_allclose(weighted_mean(parts, np.zeros(3)), [0.2, 0.6, NAN, 0.2])
