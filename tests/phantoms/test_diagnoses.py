"""Phantoms in the layouts with diagnoses: their classes, near-duplicates, damaged files and patients."""

import hashlib

import pandas as pd
import pytest
from pydicom import dcmread

from kitlib.datasets.near_duplicates import MAX_DISTANCE, group_hashes, perceptual_hash
from kitlib.datasets.registry import read_dataset
from kitlib.errors import UnreadableXray
from kitlib.phantoms.diagnoses import CHEXPERT, LAYOUTS, plan_diagnoses, write_diagnoses
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.image_file import decode_image

SMALL = {"images": 48, "side": 64, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {layout: write_diagnoses(folder, layout, **SMALL, workers=1) for layout in LAYOUTS}


def image_files(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".dcm"))


def decode(path):
    return (decode_xray if path.suffix == ".dcm" else decode_image)(path).pixels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_there_and_one_is_damaged(layout, written):
    files = image_files(written[layout])
    assert len(files) == 48
    damaged = []
    for path in files:
        try:
            assert max(decode(path).shape) in range(61, 65)
        except UnreadableXray:
            damaged.append(path.name)
    assert len(damaged) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_has_several_images_of_a_patient_and_one_image_twice(layout, written):
    planned = plan_diagnoses(layout, 48, seed=3)
    table = pd.DataFrame([vars(image) for image in planned])
    # By largest remainder of the shares, at least one of each.
    for diagnosis, share in LAYOUTS[layout].shares.items():
        assert abs((table.diagnosis == diagnosis).sum() - 48 * share) < 1
    assert table.groupby("patient").size().max() == 4 and not table.groupby("patient").diagnosis.nunique().gt(1).any()
    assert table.is_copy.sum() == table.damaged.sum() == 1
    copy = int(table.is_copy.to_numpy().argmax())
    assert table.patient[copy] != table.patient[copy - 1]
    one, other = (
        perceptual_hash(decode(written[layout] / LAYOUTS[layout].make_path(planned[index]))) for index in (copy - 1, copy)
    )
    assert group_hashes([one, other], MAX_DISTANCE).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        # 48 images by the published shares; COVIDGR's negatives are "other".
        ("covidx", {"normal": 27, "pneumonia": 19, "COVID-19": 2}),
        ("covidgr", {"COVID-19": 24, "other": 24}),
        ("ricord", {"COVID-19": 48}),
        ("bimcv", {"COVID-19": 29, "normal": 10, "pneumonia": 9}),
        ("chexpert", {"normal": 29, "pneumonia": 10, "other": 9}),
    ],
)
def test_every_diagnosis_is_read_and_only_the_damaged_image_is_left_out(layout, counts, written):
    images = read_dataset(layout, written[layout], progress=False).images
    # The damaged image is one of the first diagnosis.
    first = next(iter(LAYOUTS[layout].shares))
    assert images.diagnosis.value_counts().to_dict() == counts | {first: counts[first] - 1}
    patients = {image.patient for image in plan_diagnoses(layout, 48, seed=3) if not image.damaged}
    assert images.patient_id.nunique() == (47 if layout == "covidgr" else len(patients))
    assert layout != "covidx" or images["split"].value_counts().index.tolist() == ["train", "test"]


def test_shares_of_diagnoses_sum_to_1():
    for layout in LAYOUTS.values():
        assert sum(layout.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        (34, [1] * 17),  # 17 images of a diagnosis: each has its own patient, so that every fold gets one
        (36, [4, 2, 2] + [1] * 10),
        (60, [4, 2, 2] + [1] * 22),
    ],
)
def test_the_first_patients_of_a_frequent_diagnosis_have_several_images(images, sizes):
    table = pd.DataFrame([vars(image) for image in plan_diagnoses("covidgr", images, seed=1)])
    for diagnosis in ("COVID-19", "normal"):
        own = table[table.diagnosis == diagnosis]
        assert own.groupby("patient").size().tolist() == sizes
        for _, rows in own.groupby("patient"):
            assert rows.follow_up.tolist() == list(range(len(rows)))
            assert len({*zip(rows.age, rows.sex, rows.test, strict=True)}) == 1
    assert table.number.tolist() == list(range(1, images + 1))
    assert set(table.patient) == set(range(1, 2 * len(sizes) + 1))


def test_patients_have_ages_of_children_or_adults_and_every_sixth_is_in_the_test_set():
    for layout, ages in (("kermany", range(1, 6)), ("covidx", range(18, 90))):
        planned = plan_diagnoses(layout, 700, seed=1)
        people = {image.patient: image for image in planned}
        assert {min(ages), max(ages)} <= {image.age for image in people.values()} <= set(ages)
        assert {image.sex for image in planned} == {"F", "M"}
        tested = [number for number, image in people.items() if image.test]
        assert tested == list(range(6, len(people) + 1, 6))
        # Only the near-duplicate has the seed of another image.
        assert len({image.seed for image in planned}) == 699
        assert len({image.patient_seed for image in planned}) == len(people) - 1


def test_covid_chestxrays_table_has_gaps_and_three_unusable_rows(written):
    table = pd.read_csv(written["covid_chestxray"] / "metadata.csv", dtype=str)
    rows, other = table.iloc[:48], table.iloc[48:]
    assert rows[["offset", "sex", "age", "survival"]].isna().mean().between(0.1, 0.6).all()
    assert rows.offset[:4].fillna("").tolist() == ["0", "2", "", "6"]  # the first patient's images, two days apart
    assert set(rows["view"]) == {"PA", "AP", "AP Supine"}
    assert set(rows.license.fillna("")) == {"CC BY-NC-SA", "CC BY 3.0", ""}
    assert set(rows.finding) == {
        *("Pneumonia/Viral/COVID-19", "Pneumonia/Viral/SARS", "Pneumonia/Viral/Influenza", "Pneumonia", "No Finding"),
        *("Pneumonia/Bacterial/Streptococcus", "Pneumonia/Bacterial/Klebsiella", "Tuberculosis"),
    }
    assert other.filename.tolist() == ["other-0.png", "other-1.png", "other-2.png"]
    assert other["view"].tolist()[:2] == ["L", "Axial"] and other.modality.tolist() == ["X-ray", "CT", "X-ray"]
    assert other.finding.tolist()[2] == "todo" and set(other.patientid) == {"1"} and set(other.offset) == {"0"}


def test_other_layouts_state_each_images_source_and_patient(written):
    for part in ("train", "test"):
        lines = [line.split() for line in (written["covidx"] / f"{part}_COVIDx5.txt").read_text().splitlines()]
        assert {(diagnosis, source) for *_, diagnosis, source in lines} >= {("normal", "rsna"), ("pneumonia", "rsna")}
        assert all((diagnosis == "covid-19") == (source == "cohen") for *_, diagnosis, source in lines)
    planned = {LAYOUTS["ricord"].make_path(image): image for image in plan_diagnoses("ricord", 48, seed=3)}
    for path, image in planned.items():
        if not image.damaged:
            header = dcmread(written["ricord"] / path, stop_before_pixels=True)
            assert header.PatientID == str(image.patient) and header.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


def test_chexperts_tables_have_uncertain_and_blank_cells_laterals_and_ages_of_0(written):
    data = read_dataset("chexpert", written["chexpert"], progress=False)
    planned = plan_diagnoses("chexpert", 48, seed=3)
    archive = written["chexpert"] / CHEXPERT
    rows = pd.concat([pd.read_csv(archive / name, dtype=str) for name in ("train.csv", "valid.csv")])
    assert len(rows) == 48 + 48 // 3 and (rows["Frontal/Lateral"] == "Lateral").sum() == 16
    assert data.faults.problem.str.contains("are lateral; left out").any()
    # Every tenth image has the age 0; the damaged image is not one of them.
    assert data.images.age.isna().sum() == 4 == (rows[rows["Frontal/Lateral"] == "Frontal"].Age == "0").sum()
    assert set(rows["AP/PA"].dropna()) == {"AP", "PA"} and rows["AP/PA"].isna().sum() == 16  # laterals have none
    support = rows[rows["Frontal/Lateral"] == "Frontal"]["Support Devices"]
    assert {float(value) for value in support.dropna()} == {0.0, 1.0}
    assert data.labels.isna().sum()["Pneumonia"] == sum(each.diagnosis == "other" and each.number % 2 for each in planned)
    assert rows.Path.str.split("/").str[1].value_counts().index.tolist() == ["train", "valid"]  # the larger part first


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_the_same_parameters_give_the_same_bytes(written, tmp_path):
    assert digest(write_diagnoses(tmp_path, "kermany", seed=3, images=48, side=64, progress=False)) == digest(
        written["kermany"]
    )
    canary = tmp_path / "kermany" / "canary"
    canary.write_text("")
    write_diagnoses(tmp_path, "kermany", seed=3, images=48, side=64, progress=False)
    assert canary.exists()


def test_too_small_sizes_unknown_layouts_and_real_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images >= 24 and side >= 32"):
        write_diagnoses(tmp_path, "covid_chestxray", seed=0, images=23, side=64)
    with pytest.raises(ValueError, match="'nih'; valid: kermany"):
        write_diagnoses(tmp_path, "nih", **SMALL)
    (tmp_path / "covid_chestxray").mkdir()
    (tmp_path / "covid_chestxray" / "metadata.csv").write_text("real")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_diagnoses(tmp_path, "covid_chestxray", seed=0, images=48, side=64)
