"""Phantoms in the layouts with diagnoses: their classes, near-duplicates, damaged files and patients."""

import hashlib

import pandas as pd
import pytest

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


def test_chexperts_tables_have_uncertain_and_blank_cells_laterals_and_ages_of_0(written):
    data = read_dataset("chexpert", written["chexpert"], progress=False)
    planned = plan_diagnoses("chexpert", 48, seed=3)
    archive = written["chexpert"] / CHEXPERT
    rows = pd.concat([pd.read_csv(archive / name, dtype=str) for name in ("train.csv", "valid.csv")])
    assert len(rows) == 48 + 48 // 3 and (rows["Frontal/Lateral"] == "Lateral").sum() == 16
    assert data.faults.problem.str.contains("are lateral; left out").any()
    # Every tenth image has the age 0; the damaged image is not one of them.
    assert data.images.age.isna().sum() == 4 == (rows[rows["Frontal/Lateral"] == "Frontal"].Age == "0").sum()
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
