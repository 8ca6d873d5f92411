"""Test images are found by the ids of a sample submission, wherever they lie, and training images are not taken for them."""

import pytest

from kitlib.datasets.test_images import read_test_images
from kitlib.errors import DatasetError

FILES = (
    *("train/a.dicom", "test/a.dicom", "test/b.dicom", "test/b.png", "test/extra.dicom", "test/b.json"),
    *("stage_2_images/ID_c.dcm", "train/1.2.9.jpg", "x/1.2.8.jpg", "test/1.2.7"),
)


def test_files_are_found_and_what_is_missing_or_more_is_counted(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images, faults = read_test_images(tmp_path, ["b", "a", "missing", "ID_c", "1.2.8", "1.2.7"], "vinbigdata")
    assert [(row.image_id, row.path.removeprefix(f"{tmp_path}/")) for row in images.itertuples()] == [
        ("b", "test/b.dicom"),
        ("a", "test/a.dicom"),
        ("ID_c", "stage_2_images/ID_c.dcm"),
        ("1.2.8", "x/1.2.8.jpg"),
        ("1.2.7", "test/1.2.7"),
    ]
    assert set(images["rows"]) == set(images["columns"]) == {0} and set(images.source) == {"vinbigdata"}
    assert images.study_id.tolist() == images.patient_id.tolist() == images.image_id.tolist()
    assert faults[["row", "problem"]].to_numpy().tolist() == [
        ["test/b.png", "and 1 other files have the name of another file; left out"],
        ["test/extra.dicom", "and 0 other files are test images that the sample submission does not list"],
        ["missing", "and 0 other images have no file, but still get a row"],
    ]


def test_an_id_may_be_the_name_of_a_file(tmp_path):
    for name in ("test1/a.jpg", "test1/b.jpg", "train1/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images, faults = read_test_images(tmp_path, ["a.jpg", "d.jpg"])
    assert images[["image_id", "path"]].to_numpy().tolist() == [["a.jpg", f"{tmp_path}/test1/a.jpg"]]
    assert faults["row"].tolist() == ["test1/b.jpg", "d.jpg"]


def test_without_any_file_there_is_an_empty_table_and_without_a_folder_an_error(tmp_path):
    images, faults = read_test_images(tmp_path, ["a"])
    assert images.empty and len(faults) == 1
    with pytest.raises(DatasetError, match=r"no is not a folder"):
        read_test_images(tmp_path / "no", ["a"])
