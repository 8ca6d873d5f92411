"""CheXpert's tables: patients and studies from paths, uncertain and blank observations, a broken row for each fault."""

import cv2
import numpy as np
import pytest

from kitlib.classes import CHEXPERT_OBSERVATIONS
from kitlib.datasets.chexpert import read_chexpert
from kitlib.datasets.pool import read_pool
from kitlib.errors import DatasetError

HEADER = ",".join(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_OBSERVATIONS])
ARCHIVE = "CheXpert-v1.0-small"


def row(path, sex="Female", age="68", projection="Frontal", view="AP", **observations):
    cells = [observations.get(name.replace(" ", "_"), "") for name in CHEXPERT_OBSERVATIONS]
    return ",".join([f"{ARCHIVE}/train/{path}", sex, age, projection, view, *cells])


def write(folder, rows, table="train.csv", files=None):
    (folder / table).parent.mkdir(parents=True, exist_ok=True)
    (folder / table).write_text("\n".join([HEADER, *rows]) + "\n")
    for path in files if files is not None else [line.split(",")[0].removeprefix(f"{ARCHIVE}/") for line in rows]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / path), np.zeros((32, 39), np.uint8))


GOOD = [
    row("patient00001/study1/view1_frontal.jpg", No_Finding="1.0"),
    row("patient00001/study2/view1_frontal.jpg", sex="Male", age="69", view="PA", No_Finding="1.0", Support_Devices="1.0"),
    row("patient00002/study1/view1_frontal.jpg", sex="Unknown", age="0", Pneumonia="1.0", Edema="-1.0", Fracture="0.0"),
    row("patient00003/study1/view1_frontal.jpg", age="1", Pneumonia="-1.0", No_Finding="0"),
]


def test_rows_become_images_with_a_stated_rule_for_uncertain_and_blank_cells(tmp_path):
    write(tmp_path, GOOD)
    data = read_chexpert(tmp_path, progress=False)
    images, labels = data.images.set_index("image_id"), data.labels.set_index("id")
    assert (
        images.index.tolist()
        == labels.index.tolist()
        == [f"patient0000{patient}-study{study}-view1_frontal" for patient, study in ((1, 1), (1, 2), (2, 1), (3, 1))]
    )
    assert images.patient_id.tolist() == [f"chexpert-patient0000{patient}" for patient in (1, 1, 2, 3)]
    assert images["rows"].tolist() == [32] * 4 and images["columns"].tolist() == [39] * 4
    # Equipment is no finding, but such images are not normal; an uncertain pneumonia is no pneumonia.
    assert images.diagnosis.tolist() == ["normal", "other", "pneumonia", "other"]
    assert images.sex.tolist() == ["F", "M", "", "F"] and images["view"].tolist() == ["AP", "PA", "AP", "AP"]
    assert np.array_equal(images.age, [68, 69, np.nan, 1], equal_nan=True)
    third = labels.iloc[2]
    assert (third["Pneumonia"], third["Fracture"], third["Cardiomegaly"]) == (1, 0, 0)
    assert np.isnan(third["Edema"]) and np.isnan(labels.iloc[3]["Pneumonia"])
    assert data.faults.empty and data.published == {"patients": 65240}  # abstract of Irvin et al. 2019


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (row("patient00004/view1_frontal.jpg"), "do not have a path with patient, study and file"),
        (row("patient00004/study1/view2_lateral.jpg", projection="Lateral", view=""), "are lateral"),
        (row("patient00004/study1/view1_frontal.jpg", projection="Oblique"), "are neither Frontal nor Lateral"),
        (row("patient00004/study1/view1_frontal.jpg", Edema="2.0"), "an observation that is not 1, 0, -1 or blank"),
        (row("patient00001/study1/view1_frontal.jpg", Edema="1.0"), "repeat an earlier row; the first row is used"),
        (row("patient00004/study1/missing.jpg"), "have no file"),
        (row("patient00004/study1/view1_frontal.jpg", age="old"), "age that is not a number of years"),
        (row("patient00004/study1/damaged.jpg"), "damaged"),
    ],
)
def test_a_broken_row_is_one_fault_and_the_others_are_read(tmp_path, line, problem):
    path = line.split(",")[0].removeprefix(f"{ARCHIVE}/")
    write(tmp_path, [*GOOD, line])
    if "missing" in path:
        (tmp_path / path).unlink()
    if "damaged" in path:
        (tmp_path / path).write_bytes(b"\xff\xd8\xff\xe0 cut off")
    data = read_chexpert(tmp_path, progress=False)
    (told,) = data.faults.itertuples(index=False)
    assert problem in told.problem or "damaged" in path
    assert len(data.images) == (5 if "old" in line else 4) and data.labels.loc[0, "Edema"] == 0
    assert data.labels.id.tolist() == data.images.image_id.tolist()


def test_the_order_of_the_rows_and_the_strokes_of_windows_do_not_matter(tmp_path):
    write(tmp_path, GOOD)
    expected = read_chexpert(tmp_path, progress=False)
    write(tmp_path, [line.replace("/", "\\") for line in GOOD[::-1]], files=[])
    data = read_chexpert(tmp_path, progress=False)
    assert data.images.equals(expected.images) and data.labels.equals(expected.labels) and data.faults.empty


def test_the_archive_may_be_a_folder_and_missing_tables_or_images_are_an_error(tmp_path):
    write(tmp_path / ARCHIVE, GOOD[:1])
    lateral = row("patient00002/study1/view2_lateral.jpg", projection="Lateral", view="")
    write(tmp_path / ARCHIVE, [line.replace("/train/", "/valid/") for line in (lateral, GOOD[2])], "valid.csv")
    data = read_chexpert(tmp_path, progress=False)
    assert data.images.diagnosis.tolist() == ["normal", "pneumonia"] and len(data.faults) == 1
    with pytest.raises(DatasetError, match=r"contains neither train\.csv nor valid\.csv: CheXpert"):
        read_chexpert(tmp_path / ARCHIVE / "train", progress=False)
    write(tmp_path / "bare", GOOD[:1], files=[])
    with pytest.raises(DatasetError, match=r"no row of train.* is a valid frontal X-ray with a file"):
        read_chexpert(tmp_path / "bare", progress=False)


def test_a_pool_takes_its_normal_images(tmp_path):
    write(tmp_path, GOOD)
    data = read_pool({"chexpert": tmp_path}, "covid_normal", progress=False)
    assert data.images.image_id.tolist() == ["patient00001-study1-view1_frontal"]
