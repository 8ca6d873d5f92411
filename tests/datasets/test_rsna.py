"""RSNA Pneumonia Detection Challenge: classes, boxes, NIH's patients, and what is broken is listed."""

import gzip
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.classes import RSNA_CLASSES
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.rsna import CLASSES, IMAGES, LABELS, MAPPING, read_label_tables, read_rsna
from kitlib.errors import DatasetError
from kitlib.xrays.writing import write_xray
from tests import PROJECT, REAL_DATA

SHARED = REAL_DATA


@pytest.fixture
def layout(tmp_path):
    rows = [
        "patientId,x,y,width,height,Target",
        "a,256,512,512,256,1",
        "a,896,512,160,256,1",
        "b,,,,,0",
        "c,,,,,0",
        "d,1,1,5,5,1",
    ]
    (tmp_path / LABELS).write_text("\n".join(rows))
    names = ["Lung Opacity", "Lung Opacity", "Normal", "No Lung Opacity / Not Normal", "Normal"]
    classes = ["patientId,class", *map(",".join, zip("aabcd", names, strict=True))]
    (tmp_path / CLASSES).write_text("\n".join(classes))
    for name in "abd":
        path = tmp_path / IMAGES / f"{name}.dcm"
        write_xray(path, np.zeros((30, 40), np.uint8), transfer_syntax=ExplicitVRLittleEndian, patient_id=name)
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / IMAGES / "c.png")
    mapping = [{"subset_img_id": "a", "img_id": "00000007_001.png"}, {"subset_img_id": "b", "img_id": "00000007_002.png"}]
    (tmp_path / MAPPING).write_text(json.dumps([*mapping, {"subset_img_id": "", "img_id": "00000009_000.png"}]))
    return tmp_path


def test_images_classes_boxes_and_patients(layout):
    data = read_rsna(layout, progress=False)
    assert data.images.image_id.tolist() == ["a", "b", "c"]
    assert data.images.patient_id.tolist() == ["nih-00000007", "nih-00000007", "c"]
    assert (data.images["rows"] == 30).all() and (data.images["columns"] == 40).all()
    assert data.labels[list(RSNA_CLASSES)].idxmax(axis=1).tolist() == [
        "Lung Opacity",
        "Normal",
        "No Lung Opacity / Not Normal",
    ]
    # Shih et al. 2019; label rows and boxes of the challenge's table.
    assert data.published == {"images": 26684, "label_rows": 30227, "boxes": 9555} | dict(
        zip(RSNA_CLASSES, (8851, 11821, 6012), strict=True)
    )
    # The table is of images of 1024 x 1024 pixels, these have 40 x 30. The second box reaches 1.25 pixels beyond the image.
    assert data.boxes[["xmin", "ymin", "xmax", "ymax"]].to_numpy().tolist() == [[10, 15, 30, 22.5], [35, 15, 40, 22.5]]


def test_what_is_broken_is_listed(layout):
    told = read_rsna(layout, progress=False).faults
    assert told.problem[told.row == "d"].str.contains("'Normal' is invalid or contradicts").any()
    assert told.problem[told.row == "a"].str.contains("1.2 pixels beyond").any()
    (layout / MAPPING).unlink()
    assert "may fall into several folds" in " ".join(read_rsna(layout, progress=False).faults.problem)


@pytest.mark.parametrize(
    ("rows", "classes", "problem"),
    [
        ("x,,,,,0", "x,Normal", ""),
        ("x,1,1,5,5,1", "x,Lung Opacity", ""),
        ("x,,,,,1", "x,Lung Opacity", "Target must be"),
        ("x,1,1,5,5,0", "x,Normal", "Target must be"),
        ("x,1,1,0,5,1", "x,Lung Opacity", "Target must be"),
        ("x,1,1,a,5,1", "x,Lung Opacity", "Target must be"),
        ("x,,,,,2", "x,Normal", "Target must be"),
        ("x,1,1,5,5,1\nx,,,,,0", "x,Lung Opacity", "Target must be"),
        ("x,,,,,0", "x,Normal\nx,Lung Opacity", "two different classes"),
        ("x,,,,,0", "x,Normal\nx,Normal", ""),
        ("x,,,,,0", "x,Pneumonia", "the class 'Pneumonia' is invalid"),
        ("x,,,,,0", "y,Normal", "the class '' is invalid"),
        ("x,,,,,0", "x,Lung Opacity", "contradicts the boxes"),
        ("x,1,1,5,5,1", "x,Normal", "contradicts the boxes"),
    ],
)
def test_each_kind_of_broken_label_costs_its_image_alone(tmp_path, rows, classes, problem):
    good = "good,2,2,5,5,1"
    (tmp_path / LABELS).write_text(f"patientId,x,y,width,height,Target\n{good}\n{rows}\n")
    (tmp_path / CLASSES).write_text(f"patientId,class\ngood,Lung Opacity\n{classes}\n")
    source = DataFolder(tmp_path)
    labels, boxes = read_label_tables(source)
    faults = source.faults
    kept = {"good"} if problem else {"good", "x"}
    assert set(labels.id) == kept and set(boxes.image_id) <= kept
    assert [row for _, row, _ in faults.rows] == (["x"] if problem else [])
    if problem:
        assert re.search(problem, faults.rows[0][2])


def test_a_file_without_a_row_is_a_fault_and_no_file_with_one_an_error(layout):
    files = sorted(path for path in (layout / IMAGES).iterdir() if path.suffix == ".dcm")
    shutil.copy(files[0], layout / IMAGES / "z.dcm")
    faults = read_rsna(layout, progress=False).faults
    # One is the image d, whose row is not valid.
    assert faults.problem[faults.row == "d"].tolist()[1:] == [f"and 1 other files have no usable row in {LABELS}; left out"]
    for path in (layout / IMAGES).iterdir():
        path.unlink() if path.name != "z.dcm" else None
    with pytest.raises(DatasetError, match=r"lists \d images .*, but none of them is among the 1 images .*z\.dcm\) in "):
        read_rsna(layout, progress=False)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (LABELS, "stage_2_train_labels.* is missing"),
        (IMAGES, "among the 0 images .* outside folders with 'test' in their names"),
    ],
)
def test_a_missing_piece_names_itself_and_where_it_is_got(layout, tmp_path_factory, name, problem):
    shutil.move(layout / name, tmp_path_factory.mktemp("away"))
    with pytest.raises(DatasetError, match=f"{problem}.*rsna-pneumonia-detection-challenge"):
        read_rsna(layout, progress=False)


def test_without_a_table_of_classes_only_opacities_are_known(layout):
    (layout / CLASSES).unlink()
    data = read_rsna(layout, progress=False)
    labels = data.labels.set_index("id")
    assert labels.loc["a"].tolist() == [0, 0, 1] and labels["Lung Opacity"].to_dict() == {"a": 1, "b": 0, "c": 0}
    assert labels.loc[["b", "c"], ["Normal", "No Lung Opacity / Not Normal"]].isna().all(axis=None)
    assert "whether an image without an opacity is normal is unknown" in " ".join(data.faults.problem)


def test_a_mapping_of_another_kind_is_refused(layout):
    (layout / MAPPING).write_text('{"a": 1}')
    with pytest.raises(DatasetError, match="subset_img_id"):
        read_rsna(layout, progress=False)


@pytest.mark.real_data
def test_the_real_label_table(tmp_path):
    tables = SHARED / "label_tables"
    if not tables.is_dir():
        pytest.skip(f"{tables} is missing")
    with gzip.open(tables / "rsna_stage_2_train_labels.csv.gz", "rb") as packed:
        (tmp_path / LABELS).write_bytes(packed.read())
    mapped = pd.read_csv(tables / "rsna_to_nih.csv.gz", dtype=str)
    mapped.rename(columns={"rsna_patientId": "patientId", "rsna_class": "class"}).to_csv(tmp_path / CLASSES, index=False)
    source = DataFolder(tmp_path)
    labels, boxes = read_label_tables(source)
    # Shih et al. 2019; 30,227 rows of which 9,555 are boxes.
    assert len(pd.read_csv(tmp_path / LABELS)) == 30227
    assert len(labels) == 26684 and len(boxes) == 9555 and not source.faults.rows
    assert labels[list(RSNA_CLASSES)].sum().tolist() == [8851, 11821, 6012]


@pytest.mark.real_data
def test_the_real_images_have_their_own_boxes(tmp_path):
    table = SHARED / "cxr_det" / "boxes.csv"
    if not table.is_file():
        pytest.skip(f"{table} is missing")
    spec = importlib.util.spec_from_file_location("layouts", PROJECT / "benchmarks" / "real" / "layouts.py")
    layouts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layouts)
    layouts.main(SHARED, tmp_path)
    data = read_rsna(tmp_path / "rsna", progress=False)
    assert len(data.images) == 339 and len(data.faults) == 0
    assert data.labels[list(RSNA_CLASSES)].sum().tolist() == [76, 134, 129]
    # The boxes as another hand joined them to the NIH images.
    expected = pd.read_csv(table)
    expected = expected[expected.annotator == "rsna"]
    nih = {
        entry["subset_img_id"]: Path(entry["img_id"]).stem for entry in json.loads((tmp_path / "rsna" / MAPPING).read_text())
    }
    ours = {
        (nih[box.image_id], box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin) for box in data.boxes.itertuples()
    }
    theirs = {(Path(box.image).stem, box.x, box.y, box.width, box.height) for box in expected.itertuples()}
    assert ours == theirs and len(theirs) == 205
    # What a backbone is pre-trained on shares no patient with them.
    others = pd.read_csv(tmp_path / "nih" / "Data_Entry_2017.csv", dtype=str)
    assert len(others) == 516 and not set("nih-" + others["Patient ID"]) & set(data.images.patient_id)
