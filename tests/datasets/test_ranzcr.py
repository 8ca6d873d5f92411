"""RANZCR CLiP's reader: labels, patients and invalid rows."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.classes import RANZCR_LABELS
from kitlib.datasets.base import Dataset
from kitlib.datasets.ranzcr import PUBLISHED, read_ranzcr
from kitlib.datasets.registry import compare_with_published


def row(image_id, positive, patient="p1", value="1"):
    return ",".join([image_id, *(value if label in positive else "0" for label in RANZCR_LABELS), patient])


def test_labels_and_patients_are_those_of_valid_rows(tmp_path):
    rows = [row("1.2.9", ("CVC - Normal", "CVC - Borderline")), row("1.2.10", ()), row("c", ("ETT - Normal",), value="2")]
    rows += [row("d", ()), row("d", ("ETT - Normal",)), row("e", (), ""), row("f", ()), row("f", ())]
    header = ",".join(["StudyInstanceUID", *RANZCR_LABELS, "PatientID"])
    (tmp_path / "train.csv").write_text("\n".join([header, *rows]))
    (tmp_path / "train_annotations.csv").write_text('StudyInstanceUID,label,data\n1.2.9,CVC - Normal,"[[1, 2], [3, 4]]"\n')
    for name in ("1.2.9", "1.2.10", "c", "d", "e", "f"):
        path = tmp_path / "train" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.zeros((30, 20), np.uint8))
    data = read_ranzcr(tmp_path, progress=False)
    assert data.images[["image_id", "study_id", "patient_id", "rows", "columns"]].to_numpy().tolist() == [
        [name, name, "p1", 30, 20] for name in ("1.2.10", "1.2.9", "f")
    ]
    labels = data.labels.set_index("id")
    assert tuple(labels) == RANZCR_LABELS and labels.sum().sum() == 2
    assert labels.loc["1.2.9", ["CVC - Normal", "CVC - Borderline"]].tolist() == [1, 1]
    assert data.faults.to_numpy().tolist() == [
        ["train.csv", "c", "and 2 other images have a label that is neither 0 nor 1, no patient, or several rows; left out"],
        ["train_annotations.csv", "", "the courses of 1 lines are not used"],
        ["the folder", "c", "and 2 other files have no usable row in train.csv; left out"],
    ]


@pytest.mark.parametrize(
    ("rows", "is_valid"),
    [
        ([row("x", ())], True),
        ([row("x", (), "p2")], True),
        ([row("x", ("ETT - Normal",), value="1.0")], True),
        *[([row("x", ("ETT - Normal",), value=value)], False) for value in ("2", "-1", "0.5", "", "yes")],
        ([row("x", (), "")], False),
        ([row("x", ()), row("x", (), "p2")], False),
        ([row("", ())], False),
    ],
)
def test_an_invalid_row_costs_its_image_alone(tmp_path, rows, is_valid):
    header = ",".join(["StudyInstanceUID", *RANZCR_LABELS, "PatientID"])
    (tmp_path / "train.csv").write_text("\n".join([header, row("y", ()), *rows]))
    for name in "xy":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((3, 4), np.uint8))
    data = read_ranzcr(tmp_path, progress=False)
    assert data.images.image_id.tolist() == data.labels.id.tolist() == (["x", "y"] if is_valid else ["y"])
    listed = [fault.row for fault in data.faults.itertuples() if fault.file == "train.csv"]
    assert listed == ([] if is_valid else [rows[0].split(",")[0]])


@pytest.mark.real_data
def test_the_real_table_has_the_published_counts(real_data, tmp_path, monkeypatch):
    """With a table of image sizes instead of 30,083 files."""
    shutil.copy(real_data / "competitions" / "ranzcr_train.csv", tmp_path / "train.csv")

    def list_images(source, ids, table, patients, **options):
        ids = sorted(ids)
        columns = {"image_id": ids, "study_id": ids, "patient_id": [patients[name] for name in ids], "path": "x.jpg"}
        return pd.DataFrame(columns | {"rows": 1, "columns": 1, "source": "ranzcr", "view": ""})

    monkeypatch.setattr("kitlib.datasets.ranzcr.read_train_images", list_images)
    data: Dataset = read_ranzcr(tmp_path, progress=False)
    table = compare_with_published(data).set_index("what")
    assert (table.here == table.published).loc[list(PUBLISHED)].all() and data.faults.empty
