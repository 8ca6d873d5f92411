"""Training images are found by the ids of a table; folders of masks and of test images are told apart by their names."""

import cv2
import numpy as np
import pytest

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.train_images import read_train_images
from kitlib.errors import DatasetError

FILES = ("train/a.png", "train/b.png", "train/masks/a.png", "latest/c.png", "stage_2_test_images/d.png", "x/Test1/e.png")


@pytest.fixture
def source(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 9), np.uint8))
    return DataFolder(tmp_path)


def read(source, ids, **options):
    return read_train_images(source, ids, "t.csv", name="mine", how_to_get="get it", progress=False, **options)


@pytest.mark.parametrize(
    ("in_test_folders", "expected", "faults", "count"),
    [
        (
            False,
            ["a", "c"],
            [
                ("d", "and 1 other listed images lie in a folder of test images"),
                ("d", "and 2 other images have no file"),
                ("b", "and 0 other files have no usable row"),
            ],
            3,
        ),
        (
            True,
            ["a", "c", "d", "e"],
            [("f", "and 0 other images have no file"), ("b", "and 0 other files have no usable row")],
            5,
        ),
    ],
)
def test_listed_images_are_read_and_all_others_are_told(source, in_test_folders, expected, faults, count):
    images = read(source, list("fedca"), in_test_folders=in_test_folders, patients={"a": "p"})
    assert images.image_id.tolist() == images.study_id.tolist() == expected and set(images.source) == {"mine"}
    assert images.patient_id.tolist() == ["p", *expected[1:]]
    assert images.path[0] == str(source.folder / "train" / "a.png")
    for (_, row, problem), (expected_row, start) in zip(source.faults.rows, faults, strict=True):
        assert row == expected_row and problem.startswith(start)
    assert source.count_images() == count  # without test images, unless they are training images, and without masks


def test_images_in_a_folder_beside_the_masks_are_no_masks(tmp_path):
    for name in ("lungs with masks/images/a.png", "lungs with masks/masks/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 9), np.uint8))
    images = read(DataFolder(tmp_path), ["a"])
    assert images.path.tolist() == [str(tmp_path / "lungs with masks" / "images" / "a.png")]


def test_without_a_listed_image_the_error_says_what_there_is(source):
    with pytest.raises(
        DatasetError, match=r"t\.csv lists 2 images .the first is d., .* the 3 images .*a\.png.* outside folders .*: get"
    ):
        read(source, ["d", "e"])
