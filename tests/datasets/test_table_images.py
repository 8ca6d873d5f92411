"""Which files are the images of a user's own data: by cells of a table or without one; their ids; classes from folders."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.table_images import LONGEST_ID, make_image_ids
from kitlib.datasets.table_reader import read_own
from kitlib.errors import DatasetError
from kitlib.xrays.writing import write_xray
from tests.small_own_images import COLUMNS, ROWS, six_images, write_image

NAMED = {"file": "Image", "label": "Class"}


@pytest.fixture
def folder(tmp_path):
    """The data set `mine`: six images, x0 to x5, in its folder `images`."""
    return six_images(tmp_path / "mine")


def read(folder, text):
    (folder / "t.csv").write_text(text)
    return read_own(folder, False, table="t.csv", columns=NAMED)


@pytest.mark.parametrize(
    "cell",
    [
        *("x0.png", "x0", "X0.PNG", "x0.dcm", "images/x0.png", "C:\\data\\mine\\images\\x0.png", "/home/me/mine/images/x0"),
        *("./x0.png", "images//x0.png", "./images/./x0.png"),
    ],
)
def test_a_cell_names_its_file_in_many_ways(folder, cell):
    data = read(folder, f"Image,Class\n{cell},A\nx1,B\n")
    assert data.images.path.iloc[0] == str(folder / "images" / "x0.png")


def test_a_cell_of_another_folder_names_no_file(folder):
    with pytest.raises(DatasetError, match=r"no cell of the column 'Image', such as 'other/x0.png', names exactly one of"):
        read(folder, "Image,Class\nother/x0.png,A\n")


@pytest.mark.parametrize(
    ("cell", "table", "found"),
    [
        # Several files agree with the cell; the one at exactly this path counts, first from the table's folder.
        ("images/x0.png", "t.csv", "images/x0.png"),
        ("images/x0", "t.csv", "images/x0.png"),
        ("images/x0.png", "more/t.csv", "more/images/x0.png"),
        ("x0.png", "more/t.csv", None),
        ("x9.png", "more/t.csv", "more/x9.png"),
        ("more/images/x0.png", "t.csv", "more/images/x0.png"),
    ],
)
def test_of_several_files_the_one_at_the_stated_path_is_used(folder, cell, table, found):
    for name in ("more/images/x0.png", "more/x9.png", "images/x9.png"):
        write_image(folder / name)
    (folder / table).write_text(f"Image,Class\n{cell},A\nx1,A\n")
    data = read_own(folder, False, table=table, columns=NAMED)
    paths = {Path(path).relative_to(folder).as_posix() for path in data.images.path}
    assert paths == {"images/x1.png", *([found] if found else [])}
    assert any("2 files have this name" in problem for problem in data.faults.problem) == (found is None)


def test_a_long_name_becomes_an_id_that_fits_into_a_file_name():
    longest = "n" * LONGEST_ID
    names = [f"a/{longest}.png", f"a/{longest}1.png", f"{'a' * 100}/{'b' * 100}/1.png", f"{'a' * 100}/{'c' * 100}/1.png"]
    ids = make_image_ids(pd.Series([*names, "a/short.png"])).tolist()
    assert ids[0] == longest and ids[4] == "short" and len(set(ids)) == 5 and max(map(len, ids)) == LONGEST_ID
    # What tells a name from its neighbours is usually its end.
    assert f"{longest[:100]}1-" in ids[1] and f"{'b' * 100}-1-" in ids[2] and f"{'c' * 100}-1-" in ids[3]


def test_names_that_repeat_get_their_folders_as_ids(tmp_path):
    for name in ("a/x.png", "b/x.png", "b/y.png", "a-x.png"):
        write_image(tmp_path / "mine" / name)
    data = read_own(tmp_path / "mine", False)
    names = [Path(path).relative_to(tmp_path / "mine").as_posix() for path in data.images.path]
    ids = dict(zip(names, data.images.image_id, strict=True))
    # a/x.png cannot be a-x, which another file is.
    assert ids == {"a-x.png": "a-x.png", "a/x.png": "a-x.png-1", "b/x.png": "b-x", "b/y.png": "y"}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("A/1", "A/2", "B/1"), ["A", "A", "B"]),
        (("A/images/1", "A/images/2", "B/images/1"), ["A", "A", "B"]),
        (("A/1", "A/2", "B/1", "B/2", "C/1", "C/2"), ["A", "A", "B", "B", "C", "C"]),
        (("A/1", "B/2", "C/3"), "seem to be patients or studies"),
        # More classes than half of the images.
        (("A/1", "A/2", "B/1", "B/2", "C/1", "C/2", "D/1"), "seem to be patients or studies"),
        (("A/images/1", "A/images/2"), "all 2 images lie in the folder 'A/images'"),
        (("1", "2"), r"all 2 images lie in the folder '\.'"),
        (("1", "A/2", "B/3"), ["", "A", "B"]),
    ],
)
def test_classes_are_folders_unless_there_are_too_many(tmp_path, names, classes):
    for name in names:
        write_image(tmp_path / "mine" / f"{name}.png")
    if isinstance(classes, str):
        with pytest.raises(DatasetError, match=classes):
            read_own(tmp_path / "mine", False, class_folders=True)
    else:
        data = read_own(tmp_path / "mine", False, class_folders=True)
        found = {
            Path(path).relative_to(tmp_path / "mine").with_suffix("").as_posix(): name
            for path, name in zip(
                data.images.path, data.labels.set_index("id").idxmax(axis=1)[data.images.study_id], strict=True
            )
        }
        assert found == {name: class_name for name, class_name in zip(names, classes, strict=True) if class_name}


def test_dicom_files_state_their_patient_and_need_no_suffix(tmp_path):
    pixels = np.full((ROWS, COLUMNS), 90, np.uint16)
    for name, patient in (("1.2.3", "p"), ("1.2.4", "p"), ("a.dcm", "")):
        path = tmp_path / "mine" / name
        path.parent.mkdir(exist_ok=True)
        write_xray(path, pixels, transfer_syntax=ExplicitVRLittleEndian, patient_id=patient)
    (tmp_path / "mine" / "README").write_text("no image")
    (tmp_path / "mine" / "damaged.png").write_text("no image")
    write_image(tmp_path / "beside" / "b.png")
    data = read_own(DataFolder(tmp_path / "mine", [tmp_path / "beside"]), False)
    images = data.images
    # The README is no X-ray that cannot be read, and images of another input need a table.
    assert data.faults["row"].tolist() == ["damaged", "a"]  # a has no patient
    assert images.image_id.tolist() == ["1.2.3", "1.2.4", "a"]
    assert images.patient_id.tolist() == ["mine-p", "mine-p", "mine-a"]
