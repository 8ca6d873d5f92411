"""SIIM-ACR's reader: run lengths, empty masks, patients, and images without annotation."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.classes import MASK_CODES
from kitlib.datasets.mask_file import fill_masks
from kitlib.datasets.siim_acr import read_siim_acr
from kitlib.errors import DatasetError
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore

# Column 0, rows 0 to 511, and of column 512 the rows 0 to 1023.
HALF, COLUMN = "0 512", f"{512 * 1024} 1024"


@pytest.fixture
def folder(tmp_path):
    rows = [("1.2.3", HALF), ("1.2.3", COLUMN), ("1.2.4", "-1"), ("1.2.5", "0"), ("1.2.6", f"0 {512 * 1024}")]
    text = "ImageId, EncodedPixels\n" + "".join(f"{name}, {runs}\n" for name, runs in rows)
    (tmp_path / "train-rle.csv").write_text(text)
    for place in ("dicom-images-train/1.2.3", "dicom-images-test/1.2.4", "dicom-images-train/1.2.5", "1.2.6", "1.2.7"):
        path = tmp_path / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.zeros((256, 256), np.uint8))
    return tmp_path


def test_every_annotated_image_has_a_mask_which_may_be_empty(folder, tmp_path):
    """Images of the first stage's test set are training images of the second."""
    data = read_siim_acr(folder, progress=False)
    assert data.labels.to_numpy().tolist() == [["1.2.3", 1.0], ["1.2.4", 0.0], ["1.2.6", 1.0]]
    # Counted in stage_2_train.csv.
    assert data.published == {"images": 12047, "patients": 6171, "masks": 12047, "Pneumothorax": 2669}
    assert data.masks[["image_id", "structure", "runs"]].to_numpy().tolist() == [
        ["1.2.3", "pneumothorax", HALF],
        ["1.2.3", "pneumothorax", COLUMN],
        ["1.2.4", "pneumothorax", "-1"],
        ["1.2.6", "pneumothorax", f"0 {512 * 1024}"],
    ]
    assert data.faults.problem.tolist() == [
        "and 0 other images have run lengths that are not a mask of 1,024 x 1,024 pixels; left out",
        "the file is missing; images of one NIH patient may fall into several folds",
        "and 1 other files have no usable row in train-rle.csv; left out",
    ]
    cache, store = XrayCache(tmp_path / "xrays", 128), MaskStore.create_empty(tmp_path / "masks")
    cache.fill(data.images, workers=1)
    assert fill_masks(store, data.masks, data.images, cache, progress=False).empty
    # A line of one pixel is less than half of a pixel of eight; the left half of the image stays the left half.
    assert not store.read("1.2.3").any() and not store.read("1.2.4").any()
    expected = np.zeros((128, 128), np.uint8)
    expected[:, :64] = MASK_CODES["pneumothorax"]
    assert np.array_equal(store.read("1.2.6"), expected)


@pytest.mark.parametrize(
    ("image_id", "runs", "is_valid"),
    [
        ("x", ["-1"], True),
        ("x", [HALF, COLUMN], True),
        ("x", [HALF, "1 a"], False),
        ("x", [f"{1024 * 1024 - 1} 2"], False),
        ("x", [""], False),
        ("", ["-1"], False),
    ],
)
def test_invalid_run_lengths_cost_their_image_alone(tmp_path, image_id, runs, is_valid):
    lines = ["ImageId,EncodedPixels", "y,-1", *(f"{image_id},{text}" for text in runs)]
    (tmp_path / "stage_2_train.csv").write_text("\n".join(lines) + "\n")
    for name in "xy":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((3, 4), np.uint8))
    data = read_siim_acr(tmp_path, progress=False)
    expected = ["x", "y"] if is_valid else ["y"]
    assert data.images.image_id.tolist() == data.labels.id.tolist() == sorted(set(data.masks.image_id)) == expected
    told = data.faults["row"][data.faults.problem.str.contains("are not a mask")].tolist()
    assert told == ([] if is_valid else [image_id])


def test_patients_are_nihs(folder):
    (folder / "nih_id.csv").write_text("Kaggle_ID,NIH_ID\n1.2.3,00028864_007.png\n1.2.4,images\\00028864_001.png\n")
    data = read_siim_acr(folder, progress=False)
    assert data.images.patient_id.tolist() == ["nih-00028864", "nih-00028864", "1.2.6"]
    assert "and 0 other images have no row; their patients may be in several folds" in data.faults.problem.tolist()


def test_a_table_of_another_kind_is_an_error_that_names_its_columns(folder):
    (folder / "stage_2_train.csv").write_text("ImageId,Label\na,1\n")
    with pytest.raises(DatasetError, match=r"stage_2_train\.csv has no column 'EncodedPixels', only 'ImageId', 'Label'"):
        read_siim_acr(folder, progress=False)


@pytest.mark.real_data
def test_real_run_lengths_are_masks_within_the_image(real_data, tmp_path):
    """1,500 rows of the real table, all of images with a pneumothorax; each has between 0.001 and 20 % of the pixels."""
    table = pd.read_csv(real_data / "competitions" / "siimacr_rle_positive_part.csv", dtype=str)
    table.to_csv(tmp_path / "train-rle.csv", index=False)
    cv2.imwrite(str(tmp_path / f"{table.ImageId[0]}.png"), np.zeros((8, 8), np.uint8))
    data = read_siim_acr(tmp_path, progress=False)
    assert not data.faults.problem.str.contains("run lengths").any() and data.labels.Pneumothorax.tolist() == [1.0]
