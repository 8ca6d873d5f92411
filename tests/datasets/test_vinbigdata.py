"""VinBigData's reader: readers and their boxes, images without a finding, invalid rows, slips of the tool."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.vinbigdata import PUBLISHED, read_label_table, read_vinbigdata
from kitlib.errors import DatasetError

ROWS = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
a,Cardiomegaly,3,R8,10,20,50,60
a,Cardiomegaly,3,R9,12,20,50,61
a,Cardiomegaly,3,R9,12,22,50,61
a,Nodule/Mass,8,R10,70,70,90,130
b,No finding,14,R8,,,,
b,No finding,14,R9,0,0,1,1
b,No finding,14,R10,,,,
c,ILD,5,R8,10,10,10,20
d,No finding,14,R1,,,,
d,Calcification,2,R2,1,2,9,8
e,Oedema,15,R2,1,2,9,8
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "train_meta.csv").write_text("image_id,dim0,dim1\n" + "".join(f"{name},120,100\n" for name in "abcde"))
    for name in "abd":
        path = tmp_path / "train" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.zeros((60, 100), np.uint8))
    return tmp_path


def test_boxes_have_their_readers_and_an_image_has_what_any_reader_found(folder):
    data = read_vinbigdata(folder, progress=False)
    assert data.images[["image_id", "patient_id", "study_id", "source"]].to_numpy().tolist() == [
        [name, name, name, "vinbigdata"] for name in "abd"
    ]
    # The copies have half of the rows; the box of a that ends at 130 of 120 rows is cut.
    columns = ["image_id", "finding", "xmin", "ymin", "xmax", "ymax", "reader"]
    assert data.boxes[columns].to_numpy().tolist() == [
        ["a", "Cardiomegaly", 10, 10, 50, 30, "R8"],
        ["a", "Cardiomegaly", 12, 10, 50, 30.5, "R9"],
        ["a", "Cardiomegaly", 12, 11, 50, 30.5, "R9"],
        ["a", "Nodule/Mass", 70, 35, 90, 60, "R10"],
        ["d", "Calcification", 1, 1, 9, 4, "R2"],
    ]
    assert data.labels.columns.name is None
    labels = data.labels.set_index("id")
    assert list(labels)[-2:] == ["Pulmonary fibrosis", "No finding"] and len(list(labels)) == 15
    assert {name: list(labels.columns[row == 1]) for name, row in labels.iterrows()} == {
        "a": ["Cardiomegaly", "Nodule/Mass"],
        "b": ["No finding"],
        "d": ["Calcification"],
    }
    faults = data.faults.problem.tolist()
    for expected in (
        "and 1 other images have a row whose class_id is not 0 to 14, or a finding without a box; left out",
        "and 0 other images have a second Aortic enlargement or Cardiomegaly by one reader, although there can be only one; "
        "kept",
        "and 0 other images have no finding for one reader and boxes of another; the boxes count",
        "there are no patient ids; each image is its own patient, so a patient may be in several folds",
    ):
        assert expected in faults
    # An image that is left out has no usable row, so its missing file is no fault of its own.
    assert len(faults) == 6 and "a box reaches 5.0 pixels beyond the image; cut at its edge" in faults


@pytest.mark.parametrize(
    ("image_id", "cells", "is_valid"),
    [
        ("x", "2,R1,1,2,9,8", True),
        ("x", "0,R1,1.5,2,2,2.5", True),
        ("x", "13,R1,1,2,9,8", True),
        ("x", "14,R1,a,b,c,d", True),  # no finding, so the corners do not matter
        ("x", "2,R1,1,2,1,8", False),  # no width
        ("x", "2,R1,1,2,9,2", False),  # no height
        ("x", "2,R1,9,2,1,8", False),
        ("x", "2,R1,a,2,9,8", False),
        ("x", "2,R1,1,2,inf,8", False),
        ("x", "2,R1,,,,", False),
        ("x", ",R1,1,2,9,8", False),
        ("x", "1.5,R1,1,2,9,8", False),
        ("x", "-1,R1,1,2,9,8", False),
        ("x", "b,R1,1,2,9,8", False),
        ("", "14,R1,,,,", False),
    ],
)
def test_an_invalid_row_costs_its_image_alone(tmp_path, image_id, cells, is_valid):
    header = "image_id,class_id,rad_id,x_min,y_min,x_max,y_max"
    (tmp_path / "train.csv").write_text(f"{header}\n{image_id},14,R9,,,,\n{image_id},{cells}\ny,2,R1,1,2,9,8\n")
    source = DataFolder(tmp_path)
    labels, boxes = read_label_table(source)
    assert labels.id.tolist() == (["x", "y"] if is_valid else ["y"])
    assert set(boxes.image_id) <= set(labels.id)
    assert [row for _, row, problem in source.faults.rows if "left out" in problem] == ([] if is_valid else [image_id])


@pytest.mark.parametrize("size", ["", "d,0,100\n", "d,120,x\n"])
def test_a_copy_of_unknown_size_is_left_out_with_its_boxes(folder, size):
    sizes = "image_id,dim0,dim1\na,120,100\nb,120,100\n" + size
    (folder / "train_meta.csv").write_text(sizes)
    data = read_vinbigdata(folder, progress=False)
    assert data.images.image_id.tolist() == data.labels.id.tolist() == ["a", "b"] and set(data.boxes.image_id) == {"a"}
    assert data.faults["row"][data.faults.file == "train_meta.csv"].tolist() == ["d"]


def test_a_copy_without_sizes_or_columns_says_what_is_missing(folder):
    (folder / "train_meta.csv").unlink()
    with pytest.raises(DatasetError, match=r"train_meta\.csv is missing.*dim0 and dim1"):
        read_vinbigdata(folder, progress=False)
    (folder / "train.csv").write_text("image_id,class_id\na,1\n")
    with pytest.raises(DatasetError, match=r"lacks the columns \['rad_id'"):
        read_label_table(folder)


@pytest.mark.real_data
def test_the_real_table_has_the_published_counts(real_data, tmp_path):
    parts = [pd.read_csv(real_data / "competitions" / f"vinbig_train_part{number}.csv") for number in range(5)]
    pd.concat(parts).to_csv(tmp_path / "train.csv", index=False)
    labels, boxes = read_label_table(tmp_path)
    counts = {"images": len(labels), "boxes": len(boxes), **labels.drop(columns="id").sum().astype(int)}
    assert counts == PUBLISHED
