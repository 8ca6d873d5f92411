"""Which files folders and tables list, the ids of the files, and the order of their studies."""

import os
import re

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.errors import DatasetError
from kitlib.inference.listed_files import list_files
from kitlib.xrays.writing import write_xray


def write_dicoms(folder, **studies):
    """Write one DICOM file for each name, with this StudyInstanceUID."""
    for name, study in studies.items():
        write_xray(folder / name, np.zeros((8, 8), np.uint8), transfer_syntax=ExplicitVRLittleEndian, study_id=study)


def test_a_folder_lists_dicom_files_of_any_name_and_pictures(tmp_path, caplog):
    caplog.set_level("INFO")
    write_dicoms(tmp_path, DICOMDIR="1", IM1="1.2", IM2="1.3")
    (tmp_path / "DICOM").write_bytes(bytes(127) + b"DICM")  # the mark is one byte too early
    (tmp_path / ".hidden.png").touch()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.PNG").touch()
    table = list_files([tmp_path, tmp_path / "IM1"])  # a file that is given twice has one row
    studies = {f"{tmp_path}/IM1": "1.2", f"{tmp_path}/IM2": "1.3", f"{tmp_path}/below/x.PNG": "x"}
    assert len(table) == 3 and dict(zip(table.file, table.study_id, strict=True)) == studies
    assert table.file.tolist() == table.path.tolist() and set(table.error) == {""}
    assert f"{tmp_path}: 3 files are neither DICOM nor pictures" in caplog.text
    assert list_files(tmp_path / "pipe").error.tolist() == ["there is no such file"]


def test_files_of_a_study_follow_one_another_from_its_first_file_on(tmp_path):
    write_dicoms(tmp_path, a="2", b="1", c="2", d="1", e="3")
    table = list_files([tmp_path / name for name in "bacde"])
    assert table.image_id.tolist() == ["b", "d", "a", "c", "e"]
    assert table.study_id.tolist() == ["1", "1", "2", "2", "3"]
    assert table.index.tolist() == [0, 1, 2, 3, 4]


def test_ids_are_unique_and_can_be_file_names():
    """Files that do not exist are listed too."""
    uid, long = "1.2.840.10", "y" * 250
    given = ["x.png", "x-2.png", "b/x.png", "c/x.jpg", uid, f"{uid}.dcm", ".png", f"{long}.png", f"b/{long}.dcm"]
    table = list_files(given)
    assert table.file.tolist() == given and set(table.error) == {"there is no such file"}
    *short, first, second = table.image_id
    assert short == ["x", "x-2", "x-3", "x-4", uid, f"{uid}-2", "png"]
    # With the suffix of a decoded copy, a file name has at most 255 bytes.
    assert 100 < len(first) < 200 and long.startswith(first) and second == f"{first}-2"
    assert table.study_id.tolist() == table.image_id.tolist()


def test_bytes_of_a_name_that_are_not_utf_8_are_escaped():
    (row,) = list_files(["\udcff.png"]).itertuples()  # Python's name of a file whose first byte, FF, is not UTF-8
    assert (row.file, row.image_id) == ("\\udcff.png", "\\udcff")


def test_a_table_lists_files_relative_to_its_folder_and_its_studies_prevail(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    write_dicoms(tmp_path / "images", a="1.2", b="1.3", c="1.4")
    path = tmp_path / "list.csv"
    path.write_text("file,study_id\nimages/a,s\n,t\n,u\nimages/b,\nimages/c,s\n")
    table = list_files(path)
    assert table.file.tolist() == ["images/a", "images/c", "images/b"]
    assert table.path.tolist() == [f"{tmp_path}/images/{name}" for name in "acb"]
    assert table.study_id.tolist() == ["s", "s", "1.3"]
    assert "list.csv: 2 rows without a file are left out, the first in line 3" in caplog.text
    path.write_text("file\nimages/a\nimages/b\n")
    assert list_files([str(path)]).study_id.tolist() == ["1.2", "1.3"]
    path.write_text("Image;Study\nimages/a;s\n")
    assert list_files(path, "Image", "Study").study_id.tolist() == ["s"]
    with pytest.raises(DatasetError, match="no column 'file' of files; it has: Image, Study"):
        list_files(path)


def test_without_a_file_the_error_has_what_was_given(tmp_path):
    for given, named in (([], "an empty list"), ([tmp_path, str(tmp_path)], f"{tmp_path}, {tmp_path}")):
        with pytest.raises(DatasetError, match=re.escape(f"no image file in: {named}; give DICOM")):
            list_files(given)
