"""ieee8023's table: which rows become images with a diagnosis, and the faults of all others."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.classes import DIAGNOSES
from kitlib.datasets.covid_chestxray import diagnosis_of, read_covid_chestxray
from kitlib.errors import DatasetError
from kitlib.phantoms.diagnoses import plan_diagnoses, write_diagnoses

ROW = {"patientid": "1", "offset": "", "sex": "M", "age": "65", "finding": "Pneumonia/Viral/COVID-19", "view": "PA"}
ROW |= {"modality": "X-ray", "folder": "images", "license": "CC BY 4.0"}


def write(folder, rows):
    (folder / "images").mkdir(exist_ok=True)
    rows = [ROW | {"filename": f"{place}.png"} | row for place, row in enumerate(rows)]
    for row in rows:
        if row["folder"] in ("", "images"):
            cv2.imwrite(str(folder / "images" / row["filename"]), np.full((20, 24), 90, np.uint8))
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.mark.parametrize(
    ("finding", "diagnosis"),
    [
        ("Pneumonia/Viral/COVID-19", "COVID-19"),
        ("COVID-19, ARDS", "COVID-19"),
        ("Pneumonia/Viral/Influenza/H1N1", "viral"),
        ("Pneumonia/Viral/Herpes ", "viral"),
        ("SARS", "viral"),
        ("Pneumonia/Bacterial/Staphylococcus/MRSA", "bacterial"),
        ("Mycoplasma Bacterial Pneumonia", "bacterial"),
        # A germ that is not listed has the diagnosis of its kind.
        ("Pneumonia/Bacterial/Acinetobacter", "bacterial"),
        ("Pneumonia/Fungal/Pneumocystis", "pneumonia"),
        ("Pneumonia, Streptococcus", "bacterial"),
        ("Pneumonia", "pneumonia"),
        ("No Finding", "normal"),
        ("ARDS", "other"),
        ("todo", ""),
        ("Unknown", ""),
    ],
)
def test_findings_of_all_releases(finding, diagnosis):
    assert diagnosis_of(finding) == diagnosis


@pytest.mark.parametrize("finding", ["COVID-19, Streptococcus", "No Finding, SARS", "No Finding, Pneumonia", "Broken rib"])
def test_contradictory_and_unknown_findings(finding):
    with pytest.raises(ValueError, match=r"exclude one another|does not know"):
        diagnosis_of(finding)


def test_a_row_becomes_an_image(tmp_path):
    rows = [
        {"offset": "-2", "sex": "Male", "age": "65.5"},
        {"sex": "", "age": "", "view": "AP Supine", "finding": "No Finding", "license": ""},
        {"patientid": "", "folder": "", "age": "old", "finding": "Pneumonia", "offset": "soon"},
    ]
    data = read_covid_chestxray(write(tmp_path, rows), progress=False)
    images = data.images
    assert images.patient_id.tolist() == ["ieee-1", "ieee-1", "ieee-unknown-2"]
    assert images.sex.tolist() == ["M", "", "M"] and images["view"].tolist() == ["PA", "AP Supine", "PA"]
    assert images.age[0] == 65.5 and images.age[1:].isna().all()
    assert images.offset[0] == -2 and images.offset[1:].isna().all()
    assert images.licence.tolist() == ["CC BY 4.0", "", "CC BY 4.0"] and set(images.source) == {"ieee8023"}
    assert list(data.labels) == ["id", *DIAGNOSES] and (data.labels[list(DIAGNOSES)].sum(axis=1) == 1).all()
    assert images.diagnosis.tolist() == ["COVID-19", "normal", "pneumonia"]
    problems = data.faults.problem.tolist()
    assert len(problems) == 2 and "no patient" in problems[0] and "not a number of years" in problems[1]


def test_what_is_left_out_is_listed(tmp_path):
    rows = [{}, {"view": "L"}, {"view": "Axial", "modality": "CT", "folder": "volumes"}, {"finding": "todo"}]
    rows += [{"finding": "No Finding, SARS"}, {"filename": "0.png"}, {"filename": "8.png", "folder": "images"}, {}]
    rows += [{"filename": "7.jpg"}]
    write(tmp_path, rows)
    (tmp_path / "images" / "8.png").unlink()
    data = read_covid_chestxray(tmp_path, progress=False)
    # Two files that differ only in their suffix are two images.
    assert data.images.image_id.tolist() == ["0", "7.jpg", "7.png"]
    told = " | ".join(data.faults.row + " " + data.faults.problem)
    for words in (
        *("2.png and 0 others are not X-rays", "1.png and 0 others have the view 'L'", "3.png and 0 others have no finding"),
        *(
            "4.png the findings 'No Finding, SARS' exclude",
            "0.png and 0 others repeat the file",
            "8.png and 0 others have no file",
        ),
    ):
        assert words in told
    assert len(data.faults) == 6
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    assert read_covid_chestxray(tmp_path, progress=False).faults.row.tolist()[-1] == "0"


def test_a_file_is_one_image_however_its_name_is_written(tmp_path):
    write(tmp_path, [{"filename": "x.png"}, {"filename": "y.png", "finding": "SARS"}])
    rows = [
        {"filename": "x.png"},
        {"filename": "X.PNG", "finding": "SARS"},
        {"filename": "../images/y.png", "finding": "SARS"},
    ]
    pd.DataFrame([ROW | row for row in rows]).to_csv(tmp_path / "metadata.csv", index=False)
    data = read_covid_chestxray(tmp_path, progress=False)
    assert data.images[["image_id", "diagnosis"]].to_numpy().tolist() == [["x", "COVID-19"], ["y", "viral"]]
    assert data.faults["row"].tolist() == ["X.PNG"] and "the first row is used" in data.faults.problem.item()


def test_blanks_and_capitals_in_names_of_columns_do_not_matter(tmp_path):
    expected = read_covid_chestxray(write(tmp_path, [{"offset": "3"}, {}]), progress=False)
    table = pd.read_csv(tmp_path / "metadata.csv", dtype=str)
    table.rename(columns=lambda name: f" {name.title()} ").map(lambda cell: f" {cell}", na_action="ignore").to_csv(
        tmp_path / "metadata.csv", index=False
    )
    data = read_covid_chestxray(tmp_path, progress=False)
    assert data.images.equals(expected.images) and data.labels.equals(expected.labels) and data.faults.empty


def test_a_missing_piece_names_itself(tmp_path):
    with pytest.raises(DatasetError, match=r"metadata\.csv is missing.*git clone"):
        read_covid_chestxray(tmp_path, progress=False)
    (tmp_path / "metadata.csv").write_text("patientid,finding\n1,COVID-19\n")
    with pytest.raises(DatasetError, match=r"lacks the columns \['view', 'modality', 'filename'\]"):
        read_covid_chestxray(tmp_path, progress=False)
    write(tmp_path, [{"finding": "todo"}])
    with pytest.raises(DatasetError, match="no frontal X-ray"):
        read_covid_chestxray(tmp_path, progress=False)
    write(tmp_path, [{}])
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DatasetError, match=r"none of the 1 frontal X-rays listed .*; the first listed is '0\.png'"):
        read_covid_chestxray(tmp_path, progress=False)


def test_phantoms_are_read_as_planned(tmp_path):
    folder = write_diagnoses(tmp_path, "covid_chestxray", seed=1, images=40, side=48, progress=False)
    data = read_covid_chestxray(folder, progress=False)
    planned = [image for image in plan_diagnoses("covid_chestxray", 40, seed=1) if not image.damaged]
    assert sorted(data.images.diagnosis) == sorted(image.diagnosis for image in planned)
    assert data.images.patient_id.nunique() == len({image.patient for image in planned})
    # A lateral image, a slice, one without a finding, and the damaged file.
    assert len(data.faults) == 4
