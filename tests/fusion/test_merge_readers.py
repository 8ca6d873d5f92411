"""Boxes of several readers: those that overlap become their mean, with the number of readers."""

import numpy as np
import pandas as pd

from kitlib.fusion.merge_readers import merge_reader_boxes
from kitlib.tables import BOX

IMAGES = pd.DataFrame({"image_id": ["a", "b"], "rows": [200, 100], "columns": [100, 400]})


def table(*rows):
    return pd.DataFrame(rows, columns=["image_id", "finding", *BOX, "reader"])


def merged(*rows, **options):
    result = merge_reader_boxes(table(*rows), IMAGES, **options)
    return result[["image_id", "finding", *BOX, "readers"]].round(3).to_numpy().tolist()


def test_boxes_of_one_finding_that_overlap_become_their_mean():
    """IoU of the first two is 1600 / (2000 + 2000 - 1600) = 2/3; the third reader's box is elsewhere."""
    rows = [("a", "ILD", 10, 20, 50, 70, "R8"), ("a", "ILD", 18, 20, 58, 70, "R9"), ("a", "ILD", 70, 150, 90, 190, "R10")]
    expected = [["a", "ILD", 14, 20, 54, 70, 2], ["a", "ILD", 70, 150, 90, 190, 1]]
    for order in (rows, rows[::-1]):
        assert merged(*order) == expected
    assert len(merged(*rows, iou=0.7)) == 3
    # Another finding in the same place, or the same finding in another image, is not merged.
    others = [("a", "Nodule/Mass", 10, 20, 50, 70, "R8"), ("b", "ILD", 100, 20, 200, 70, "R8")]
    assert merged(*rows, *others) == [
        *expected,
        ["a", "Nodule/Mass", 10, 20, 50, 70, 1],
        ["b", "ILD", 100, 20, 200, 70, 1],
    ]


def test_readers_are_counted_not_boxes():
    """R9 drew two boxes of what R8 drew once: two readers."""
    rows = [("b", "ILD", 0, 0, 400, 100, "R8"), ("b", "ILD", 0, 0, 400, 97, "R9"), ("b", "ILD", 0, 0, 400, 94, "R9")]
    assert merged(*rows) == [["b", "ILD", 0, 0, 400, 97, 2]]


def test_one_readers_boxes_and_no_boxes_are_unchanged():
    rows = [("a", "ILD", 10, 20, 50, 70, "R8"), ("a", "ILD", 11, 20, 50, 70, "R8")]
    assert merged(*rows) == [["a", "ILD", 10, 20, 50, 70, 1], ["a", "ILD", 11, 20, 50, 70, 1]]
    assert merged() == []


def test_as_many_readers_as_agree_within_a_few_pixels():
    """Three readers, 50 findings far from one another, corners off by up to a pixel: 50 boxes within a pixel of the mean."""
    rng = np.random.default_rng(0)
    images = pd.DataFrame({"image_id": [f"i{number}" for number in range(50)], "rows": 2000, "columns": 1500})
    corners = np.array([300, 400, 500, 900]) + rng.uniform(-200, 200, (50, 1))
    rows = [
        (f"i{number}", "ILD", *(corners[number] + rng.uniform(-1, 1, 4)), f"R{reader}")
        for number in range(50)
        for reader in range(3)
    ]
    result = merge_reader_boxes(table(*rows), images, 0.4).sort_values("image_id", key=lambda ids: ids.str[1:].astype(int))
    assert set(result.readers) == {3}
    np.testing.assert_allclose(result[list(BOX)], corners, atol=1)
