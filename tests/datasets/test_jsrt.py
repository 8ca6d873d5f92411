"""JSRT with SCR's masks: names, labels, the three structures, and what is broken is listed."""

import re

import numpy as np
import pytest
from PIL import Image

from kitlib.datasets.jsrt import read_jsrt
from kitlib.datasets.mask_file import fill_masks
from kitlib.errors import DatasetError
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.image_file import JSRT_BYTES
from kitlib.xrays.mask_store import MaskStore

NAMES = ("JPCLN001", "JPCLN002", "JPCNN003")
# In the masks' 1024 pixels: rows, columns. The patient's right is at the image's left.
AREAS = {"right lung": np.s_[200:800, 150:420], "left lung": np.s_[200:800, 600:880], "heart": np.s_[450:800, 420:640]}


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "All247images").mkdir()
    for number, name in enumerate(NAMES):
        # A sparse file of zeros takes no room.
        with open(tmp_path / "All247images" / f"{name}.IMG", "wb") as file:
            file.truncate(JSRT_BYTES)
        for structure, area in {**AREAS, "left clavicle": np.s_[0:9, 0:9]}.items():
            mask = np.zeros((1024, 1024), np.uint8)
            mask[area] = 255
            folder = tmp_path / "scratch" / f"fold{1 + number % 2}" / "masks" / structure
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / f"{name}.gif")
    return tmp_path


def mask_path(layout, name, structure="heart", fold=1):
    return layout / "scratch" / f"fold{fold}" / "masks" / structure / f"{name}.gif"


def test_images_labels_and_masks(layout):
    data = read_jsrt(layout, progress=False)
    assert data.faults.empty and data.images.image_id.tolist() == list(NAMES)
    assert data.labels[["nodule", "no nodule"]].to_numpy().tolist() == [[1, 0], [1, 0], [0, 1]]
    assert (data.images[["rows", "columns"]] == 2048).all(axis=None) and set(data.images.convention) == {"lung_fields"}
    assert data.images.patient_id.is_unique and data.boxes.empty
    assert list(data.masks) == ["image_id", "structure", "path"] and data.masks.index.tolist() == list(range(9))
    assert set(data.masks.structure) == {"heart", "left_lung", "right_lung"}
    # Shiraishi et al. 2000; van Ginneken et al. 2006 for the masks.
    assert data.published == {"images": 247, "nodule": 154, "no nodule": 93, "masks": 247}


def test_a_prepared_set_has_each_structure_at_its_side(layout):
    data = read_jsrt(layout, progress=False)
    cache, store = XrayCache(layout / "xrays", 256), MaskStore(layout / "masks")
    assert cache.fill(data.images, workers=1).status.tolist() == ["decoded"] * 3
    assert fill_masks(store, data.masks, data.images, cache, progress=False).empty
    codes = store.read("JPCLN002")
    # A quarter of 1024 pixels; the lung covers what the heart shares with it.
    expected = np.zeros((256, 256), np.uint8)
    expected[112:200, 105:160] = 2
    expected[50:200, 150:220], expected[50:200, 38:105] = 3, 4
    differing = codes != expected
    # Columns 37.5 are half inside.
    differing[:, 37] = False
    assert not differing.any()


def test_what_is_broken_is_listed(layout):
    (layout / "All247images" / "holiday.img").write_bytes(b"")
    with open(layout / "All247images" / "JPCNN003.IMG", "ab") as file:
        file.truncate(JSRT_BYTES - 2)
    mask_path(layout, "JPCLN002", fold=2).rename(mask_path(layout, "JPCLN001", fold=2))
    data = read_jsrt(layout, progress=False)
    assert data.images.image_id.tolist() == ["JPCLN001", "JPCLN002"] and set(data.masks.image_id) == {"JPCLN001"}
    told = data.faults.groupby("row").problem.agg(" ".join)
    assert "no name such as JPCLN001" in told["holiday.img"] and "have a second mask of the heart" in told.JPCLN001
    assert "8388606 bytes" in told.JPCNN003 and "and 0 others have masks but no image" in told.JPCNN003
    assert "no mask of the heart; its other masks are left out" in told.JPCLN002


def test_images_without_masks_are_counted(layout):
    for structure in AREAS:
        mask_path(layout, "JPCLN001", structure).unlink()
        mask_path(layout, "JPCNN003", structure).unlink()
    data = read_jsrt(layout, progress=False)
    assert len(data.images) == 3 and set(data.masks.image_id) == {"JPCLN002"}
    assert data.faults.problem.tolist() == ["and 1 other images have no mask"]


@pytest.mark.parametrize("kept", [["heart"], ["heart", "left lung"], ["heart", "left lung", "right lung"]])
def test_masks_of_the_heart_alone_are_an_error(layout, kept):
    for structure in set(AREAS) - set(kept):
        for folder in layout.glob(f"scratch/*/masks/{structure}"):
            folder.rename(layout / "scratch" / f"{folder.parts[-3]} {structure} unused")
    if kept == ["heart"]:
        with pytest.raises(DatasetError, match="masks of the heart, but none in folders named 'left lung' or 'right lung'"):
            read_jsrt(layout, progress=False)
    else:
        masks = read_jsrt(layout, progress=False).masks
        assert set(masks.structure) == {structure.replace(" ", "_") for structure in kept} and len(masks) == 3 * len(kept)


def test_a_missing_piece_names_itself_and_where_it_is_got(layout):
    (layout / "scratch").rename(layout.parent / "elsewhere")
    data = read_jsrt(layout, progress=False)
    assert data.masks is None and re.search(r"no masks; .*scratch.*isi\.uu\.nl", data.faults.problem.item())
    (layout / "All247images").rename(layout.parent / "images_elsewhere")
    with pytest.raises(DatasetError, match=r"no image of JSRT.*All247images.*db\.jsrt\.or\.jp"):
        read_jsrt(layout, progress=False)
