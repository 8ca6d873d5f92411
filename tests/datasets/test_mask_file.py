"""Masks in all file formats of the data sets, stored at the size of the decoded copy, and their faults."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kitlib.classes import MASK_CODES
from kitlib.datasets import mask_file
from kitlib.datasets.mask_file import fill_masks, read_mask
from kitlib.errors import MaskError
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.mask_store import MaskStore

INSIDE = np.zeros((30, 40), bool)
INSIDE[5:25, 4:16] = INSIDE[5:25, 22:36] = True


def palette(*colours):
    image = Image.fromarray(INSIDE.astype(np.uint8), mode="P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def rgb(colour):
    return Image.fromarray((INSIDE[..., None] * np.array(colour)).astype(np.uint8))


FORMS = {
    "255.png": Image.fromarray(INSIDE.astype(np.uint8) * 255),
    "1.png": Image.fromarray(INSIDE.astype(np.uint8)),
    "bits.png": Image.fromarray(INSIDE),
    # 1 = right, 2 = left.
    "codes.png": Image.fromarray((INSIDE * np.where(np.arange(40) < 20, 1, 2)).astype(np.uint8)),
    # V7's: 127 is to be ignored.
    "ignored.png": Image.fromarray(np.where(INSIDE, 255, 127).astype(np.uint8)),
    "16_bits.png": Image.fromarray(INSIDE.astype(np.uint16) * 65535),
    "half_of_16_bits.png": Image.fromarray(INSIDE.astype(np.uint16) * 32768),
    "1_of_16_bits.png": Image.fromarray(INSIDE.astype(np.uint16)),
    "red.png": rgb((255, 0, 0)),
    "dark_red.png": rgb((128, 0, 0)),
    "rgba.png": Image.fromarray(np.dstack([INSIDE * np.uint8(255)] * 3 + [np.full((30, 40), 255, np.uint8)])),
    "transparent.png": Image.fromarray(np.dstack([INSIDE * np.uint8(255)] * 3 + [np.zeros((30, 40), np.uint8)])),
    "palette.png": palette((0, 0, 0), (0, 200, 0)),
    "palette.gif": palette((0, 0, 0), (255, 255, 255)),
    "grey.gif": Image.fromarray(INSIDE.astype(np.uint8) * 255),
    "lossy.jpg": Image.fromarray(INSIDE.astype(np.uint8) * 255),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_mask_is_the_same_in_every_form(tmp_path, name):
    FORMS[name].save(tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, INSIDE)


@pytest.mark.parametrize("value", [0, 16, 127])
def test_what_is_not_brighter_than_half_is_an_empty_mask(tmp_path, value):
    """The threshold is half of the scale, not of the brightest pixel: an image with only 127 (ignored) has no lung."""
    Image.fromarray((INSIDE * value).astype(np.uint8)).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").shape == (30, 40) and not read_mask(tmp_path / "a.png").any()


def test_a_blank_jpeg_with_noise_is_empty(tmp_path):
    noise = np.random.default_rng(0).integers(0, 5, (30, 40)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=95)
    assert not read_mask(tmp_path / "a.jpg").any()


@pytest.mark.parametrize("name", ["cut.png", "cut.gif", "text.png", "gone.png"])
def test_a_damaged_file_names_itself(tmp_path, name):
    # Noise, so that the file is longer than the part that is left.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8))
    if name.startswith("cut"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    elif name == "text.png":
        (tmp_path / name).write_text("no image")
    with pytest.raises(MaskError, match=rf"{name}.*fetch the mask again"):
        read_mask(tmp_path / name)


# ---- a prepared run's masks


class Set:
    """A cache of copies of 60 x 80 pixels at half their size, a mask store, and the mask files that a test writes."""

    def __init__(self, folder):
        self.folder, self.rows = folder, []
        self.cache, self.store = XrayCache(folder / "xrays", 40), MaskStore(folder / "masks")

    def add(self, image_id, structure, mask, name=None):
        self.cache.put(CachedXray(image_id, np.zeros((30, 40), np.uint8), 60, 80))
        path = self.folder / (name or f"{structure}_{len(self.rows)}.png")
        if mask is not None:
            Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).save(path)
        self.rows.append((image_id, structure, str(path)))

    def fill(self):
        masks = pd.DataFrame(self.rows, columns=["image_id", "structure", "path"])
        images = pd.DataFrame({"image_id": list(dict.fromkeys(masks.image_id))})
        return fill_masks(self.store, masks, images, self.cache, progress=False)


@pytest.fixture
def drawn(tmp_path):
    return Set(tmp_path)


def large(*areas):
    """Return a bool mask of 60 x 80 with the areas (top, bottom, left, right) inside."""
    mask = np.zeros((60, 80), bool)
    for top, bottom, left, right in areas:
        mask[top:bottom, left:right] = True
    return mask


LEFT, RIGHT, HEART = (10, 50, 44, 72), (10, 50, 8, 32), (24, 50, 28, 52)


def test_structures_have_their_codes_and_lungs_cover_the_heart(drawn):
    for structure, area in (("left_lung", LEFT), ("heart", HEART), ("right_lung", RIGHT)):
        drawn.add("a", structure, large(area))
    assert drawn.fill().empty
    expected = np.zeros((30, 40), np.uint8)
    # At half the size, computed by hand.
    expected[12:25, 14:26] = MASK_CODES["heart"]
    expected[5:25, 22:36], expected[5:25, 4:16] = MASK_CODES["left_lung"], MASK_CODES["right_lung"]
    np.testing.assert_array_equal(drawn.store.read("a"), expected)


def test_rows_of_one_structure_are_united(drawn):
    drawn.add("a", "lungs", large(LEFT))
    drawn.add("a", "lungs", large(RIGHT))
    assert drawn.fill().empty
    np.testing.assert_array_equal(drawn.store.read("a"), INSIDE * np.uint8(MASK_CODES["lungs"]))


@pytest.mark.parametrize("size", [(30, 40), (60, 80), (120, 160), (90, 120), (15, 20)])
def test_masks_of_any_size_of_the_same_shape_fit(drawn, size):
    """The same mask is written at each size; the result may differ only in a border of one pixel."""
    rows, columns = size
    whole = cv2.resize(INSIDE.astype(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST)
    drawn.add("a", "lungs", whole)
    assert drawn.fill().empty
    found = drawn.store.read("a") > 0
    border = cv2.dilate(INSIDE.astype(np.uint8), np.ones((3, 3))) - cv2.erode(INSIDE.astype(np.uint8), np.ones((3, 3)))
    np.testing.assert_array_equal(found[border == 0], INSIDE[border == 0])


def test_a_pixel_is_inside_from_one_half(drawn):
    # Copy's pixel 5 covers columns 10 and 11 of rows 10 and 11: two, then one of its four pixels.
    both = large(LEFT, RIGHT)
    half, quarter = both.copy(), both.copy()
    half[2, 2:4] = quarter[2, 2] = True
    drawn.add("half", "lungs", half)
    drawn.add("quarter", "lungs", quarter)
    # Of masks of four times the size, the copy's pixel 1, 1 covers 16 pixels: all but the inner four, then only these.
    inner = cv2.resize(both.astype(np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
    outer = inner.copy()
    inner[5:7, 5:7] = 1
    outer[4:8, 4:8] = 1
    outer[5:7, 5:7] = 0
    drawn.add("outer", "lungs", outer)
    drawn.add("inner", "lungs", inner)
    drawn.fill()
    found = {name: drawn.store.read(name)[1, 1] for name in ("half", "quarter", "outer", "inner")}
    assert found == {"half": 1, "quarter": 0, "outer": 1, "inner": 0}


def test_an_incomplete_mask_is_not_stored(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_file, "IMAGES_PER_PART", 2)
    for image_id in ("missing", "damaged", "aspect"):
        drawn.add(image_id, "lungs", large(LEFT))
    drawn.add("missing", "lungs", None)
    drawn.add("damaged", "heart", None, "damaged.png")
    (tmp_path / "damaged.png").write_text("no image")
    drawn.add("aspect", "lungs", np.ones((60, 79), bool))
    drawn.add("empty", "lungs", large())
    drawn.add("kept", "lungs", large(LEFT, RIGHT))
    table = drawn.fill().set_index("row")
    faults = table.problem
    assert table.file["missing"] == f"{tmp_path.name}/lungs_3.png"
    assert drawn.store.ids == ["kept"] and sorted(faults.index) == ["aspect", "damaged", "empty", "missing"]
    assert faults.str.endswith("; the image gets no mask").all()
    assert "lungs_3.png" in faults.missing and "damaged.png" in faults.damaged and "no pixel is lung" in faults["empty"]
    assert "60 x 79 pixels, but its image has 60 x 80: the aspect ratios differ" in faults.aspect


def test_a_percent_of_aspect_ratio_is_rounding(drawn):
    # 606 x 800 fits 60 x 80 within 1 %.
    drawn.add("a", "lungs", cv2.resize(large(LEFT, RIGHT).astype(np.uint8), (800, 606)))
    assert drawn.fill().empty and "a" in drawn.store


def test_one_lung_is_a_fault_and_stored(drawn):
    # As narrow as real lungs: the median of width / height in 1,035 pairs is 0.47.
    lone = (6, 54, 46, 68)
    drawn.add("united", "lungs", large(lone))
    # A small part next to it is not a second lung.
    drawn.add("crumb", "lungs", large(lone, (10, 12, 8, 10)))
    drawn.add("sides", "left_lung", large(lone))
    drawn.add("sides", "right_lung", large())
    drawn.add("with_heart", "lungs", large(LEFT, RIGHT, HEART))
    drawn.add("both", "lungs", large(LEFT, RIGHT))
    faults = drawn.fill().set_index("row").problem
    assert dict(faults) == {
        "united": "only one lung is drawn; the mask is used",
        "crumb": "only one lung is drawn; the mask is used",
        "sides": "the mask of the right lung is empty; the image's mask is used",
    }
    assert sorted(drawn.store.ids) == ["both", "crumb", "sides", "united", "with_heart"]


def test_masks_of_other_images_are_not_read_and_stored_ones_do_not_change(drawn):
    drawn.add("a", "lungs", large(LEFT, RIGHT))
    drawn.add("other", "lungs", None)
    masks = pd.DataFrame(drawn.rows, columns=["image_id", "structure", "path"])
    images = pd.DataFrame({"image_id": ["a", "unmasked"]})
    for _ in range(2):
        assert fill_masks(drawn.store, masks, images, drawn.cache, progress=False).empty
    assert drawn.store.ids == ["a"] and len(list((drawn.folder / "masks").iterdir())) == 1
    with pytest.raises(ValueError, match=r"'spleen'.*heart, lungs"):
        fill_masks(drawn.store, masks.assign(structure="spleen"), images, drawn.cache)


def test_darwins_lungs_are_read_from_their_polygons(drawn, tmp_path):
    def polygon(area):
        top, bottom, left, right = area
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return {"name": "Lung", "polygon": {"path": [{"x": x, "y": y} for x, y in corners]}}

    told = {"image": {"width": 80, "height": 60, "filename": "a.jpeg"}, "annotations": [polygon(LEFT), polygon(RIGHT)]}
    (tmp_path / "1.json").write_text(json.dumps(told))
    drawn.add("a", "lungs", None, "1.json")
    assert drawn.fill().empty
    np.testing.assert_array_equal(drawn.store.read("a") > 0, INSIDE)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_shrinking_keeps_the_area(tmp_path_factory, seed, factor):
    """An ellipse of `factor` times the copy's size has a Dice above 0.97 with the same ellipse drawn small."""
    rng = np.random.default_rng(seed)
    axes, centre = rng.uniform(12, 18, 2), rng.uniform(30, 34, 2)

    def ellipse(scale):
        y, x = (np.mgrid[: 64 * scale, : 64 * scale] + 0.5) / scale
        return ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 < 1

    folder = tmp_path_factory.mktemp("set")
    cache, store = XrayCache(folder / "xrays", 64), MaskStore(folder / "masks")
    cache.put(CachedXray("a", np.zeros((64, 64), np.uint8), 64, 64))
    Image.fromarray(ellipse(factor)).save(folder / "a.png")
    masks = pd.DataFrame([("a", "lungs", str(folder / "a.png"))], columns=["image_id", "structure", "path"])
    fill_masks(store, masks, pd.DataFrame({"image_id": ["a"]}), cache, progress=False)
    found, small = store.read("a") > 0, ellipse(1)
    assert 2 * (found & small).sum() / (found.sum() + small.sum()) > 0.97


@pytest.mark.real_data
def test_real_masks_have_the_area_that_their_table_says(real_data):
    table = pd.read_csv(real_data / "cxr_seg" / "labels.csv")
    table = table[table["mask"].str.contains("/shenzhen/|/lung_v7/")]
    assert len(table) == 11 + 401
    shares = [read_mask(real_data / path).mean() for path in table["mask"]]
    np.testing.assert_allclose(shares, table.area_fraction, atol=1e-3)
