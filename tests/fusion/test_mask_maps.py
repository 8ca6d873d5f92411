"""Maps of probabilities are averaged as by hand, whatever their sizes."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.errors import MaskError
from kitlib.fusion.mask_maps import fuse_maps
from kitlib.xrays.mask_store import decode_grey, encode_grey


def table(*rows):
    """Return a `mask_maps` table of rows (image, model, fold, level or pixels)."""
    pixels = [np.full((4, 6), each, np.uint8) if np.isscalar(each) else each for *_, each in rows]
    names = pd.DataFrame([row[:3] for row in rows], columns=["image_id", "model", "fold"])
    return names.assign(finding="pneumothorax", map=[encode_grey(each) for each in pixels])


def test_folds_are_averaged_first_then_models_by_their_weights():
    maps = table(("a", "x", 0, 100), ("a", "x", 1, 200), ("a", "y", 0, 50), ("b", "y", 0, 30), ("c", "z", 0, 9))
    fused = fuse_maps(maps, {"x": 1.0, "y": 3.0, "z": 0.0}.get)
    # a: x is 150, y is 50: (1 x 150 + 3 x 50) / 4; c has only a model without weight.
    assert fused["image_id"].tolist() == ["a", "b"] and set(fused["finding"]) == {"pneumothorax"}
    assert [np.unique(decode_grey(png)).tolist() for png in fused["map"]] == [[75], [30]]
    assert fused["map"][1] == maps["map"][3]  # a single map stays as it is
    assert fuse_maps(maps[:0], lambda model: 1.0).columns.tolist() == ["image_id", "finding", "map"]


def test_maps_of_several_sizes_get_the_size_of_the_largest_area():
    small, large = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.full((12, 4), 40, np.uint8)
    (png,) = fuse_maps(table(("a", "x", 0, small), ("a", "y", 0, large)), lambda model: 1.0)["map"]
    resized = cv2.resize(small, (4, 12), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(decode_grey(png), ((resized + 40.0) / 2).round())


def test_a_damaged_map_is_an_error():
    maps = table(("a", "x", 0, 1), ("a", "y", 0, 1))
    maps.loc[1, "map"] = b"no PNG"
    with pytest.raises(MaskError, match="6 bytes are not a PNG file of an 8-bit grey image"):
        fuse_maps(maps, lambda model: 1.0)
