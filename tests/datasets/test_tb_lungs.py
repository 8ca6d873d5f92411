"""Montgomery and Shenzhen: the original and the re-packed layouts, readings, patients and faults."""

import math

import numpy as np
import pytest
from PIL import Image

from kitlib.datasets.mask_file import fill_masks
from kitlib.datasets.registry import compare_with_published, read_dataset
from kitlib.datasets.tb_lungs import read_montgomery, read_shenzhen
from kitlib.errors import DatasetError
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore

RIGHT, LEFT = np.zeros((60, 80), bool), np.zeros((60, 80), bool)
RIGHT[10:50, 8:32] = LEFT[10:50, 44:72] = True


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def read_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))


@pytest.fixture
def montgomery(tmp_path):
    root = tmp_path / "MontgomerySet"
    texts = {
        "MCUCXR_0001_0": "Patient's Sex: F \nPatient's Age: 027Y\nnormal, Córdoba",
        "MCUCXR_0017_1": "Patient's Sex: M\nPatient's Age: 063Y\ncavitary infiltrate",
        "MCUCXR_0023_1": "Patient's Sex: M\nPatient's Age: 064Y\nNO REPORT (same pt as MCUCXR_0017_1)",
    }
    for name, text in texts.items():
        save(root / "CXR_png" / f"{name}.png", np.full((60, 80), 90))
        save(root / "ManualMask" / "leftMask" / f"{name}.png", LEFT * 255)
        save(root / "ManualMask" / "rightMask" / f"{name}.png", RIGHT * 255)
        read_text(root / "ClinicalReadings" / f"{name}.txt", text)
    return tmp_path


@pytest.fixture
def shenzhen(tmp_path):
    texts = ("male 45yrs\nnormal", "femal, 16month\nnormal", "female64days \nPTB in the right upper field", "male 42\nATB")
    for number, text in enumerate(texts, start=1):
        name = f"CHNCXR_{number:04d}_{int(number > 2)}"
        save(tmp_path / "CXR_png" / f"{name}.png", np.full((60, 80), 90))
        read_text(tmp_path / "ClinicalReadings" / f"{name}.txt", text)
        if number != 4:
            save(tmp_path / "mask" / f"{name}_mask.png", (LEFT | RIGHT) * 255)
    return tmp_path


def test_montgomery_has_two_masks_an_image_and_readings(montgomery):
    data = read_montgomery(montgomery, progress=False)
    assert data.faults.empty and (data.images["rows"] == 60).all() and (data.images["columns"] == 80).all()
    assert data.labels[["normal", "tuberculosis"]].to_numpy().tolist() == [[1, 0], [0, 1], [0, 1]]
    assert data.images.sex.tolist() == ["F", "M", "M"] and data.images.age.tolist() == [27, 63, 64]
    # The third reading states its patient.
    assert data.images.patient_id.tolist() == ["montgomery-0001", "montgomery-0017", "montgomery-0017"]
    assert data.masks.image_id.value_counts().tolist() == [2, 2, 2] and set(data.masks.structure) == {"lungs"}
    assert set(data.images.convention) == {"lung_fields"}
    # Jaeger et al. 2014.
    assert data.published == {"images": 138, "normal": 80, "tuberculosis": 58, "masks": 138}


def test_shenzhen_has_masks_of_most_images(shenzhen):
    data = read_shenzhen(shenzhen, progress=False)
    assert len(data.images) == 4 and data.images.patient_id.is_unique
    assert data.faults.problem.tolist() == ["and 0 other images have no mask"] and data.faults.row[0] == "CHNCXR_0004_1"
    assert data.images.sex.tolist() == ["M", "F", "F", "M"]
    ages = data.images.age.tolist()
    # Months and days in years of 365.25 days; an age without a unit is unknown.
    assert ages[:3] == pytest.approx([45, 16 / 12, 64 / 365.25]) and math.isnan(ages[3])
    assert [data.published[name] for name in ("images", "normal", "tuberculosis", "masks")] == [662, 326, 336, 566]


def test_images_with_masks_are_compared_with_the_published_ones(shenzhen, montgomery):
    table = compare_with_published(read_dataset("shenzhen", shenzhen, progress=False)).set_index("what")
    assert table.here.masks == 3 and table.share.masks == round(3 / 566, 4) and table.share.images == round(4 / 662, 4)
    # Two mask files per image.
    assert compare_with_published(read_montgomery(montgomery, progress=False)).set_index("what").here.masks == 3


@pytest.mark.parametrize("cohort", ["montgomery", "shenzhen"])
def test_a_prepared_set_has_both_lungs(cohort, request):
    folder = request.getfixturevalue(cohort)
    data = {"montgomery": read_montgomery, "shenzhen": read_shenzhen}[cohort](folder, progress=False)
    cache, store = XrayCache(folder / "xrays", 40), MaskStore(folder / "store")
    cache.fill(data.images, workers=1)
    assert fill_masks(store, data.masks, data.images, cache, progress=False).empty
    assert len(store) == 3
    np.testing.assert_array_equal(store.read(data.images.image_id[0]), (LEFT | RIGHT)[::2, ::2].astype(np.uint8))


def test_each_reader_takes_its_own_files_from_a_folder_with_both_sets(tmp_path):
    root = tmp_path / "chest-xray-masks-and-labels" / "Lung Segmentation"
    for name, mask in (("MCUCXR_0001_0", "MCUCXR_0001_0"), ("CHNCXR_0001_0", "CHNCXR_0001_0_mask")):
        save(root / "CXR_png" / f"{name}.png", np.full((60, 80), 90))
        save(root / "test" / f"{name}.png", np.full((60, 80), 90))
        save(root / "masks" / f"{mask}.png", (LEFT | RIGHT) * 255)
        read_text(root / "ClinicalReadings" / f"{name}.txt", "male 45yrs")
    for read, name in ((read_montgomery, "MCUCXR_0001_0"), (read_shenzhen, "CHNCXR_0001_0")):
        data = read(tmp_path, progress=False)
        assert data.images.image_id.tolist() == data.masks.image_id.tolist() == [name]
        assert data.masks.path[0].endswith(f"{name}{'_mask' if name.startswith('C') else ''}.png")
        problems = data.faults.problem.str.contains("have the name of another file|other image files are not read")
        assert problems.tolist() == [
            True,
            True,
        ]


def test_what_is_broken_is_listed(montgomery):
    root = montgomery / "MontgomerySet"
    (root / "ManualMask" / "leftMask" / "MCUCXR_0001_0.png").unlink()
    (root / "CXR_png" / "MCUCXR_0017_1.png").write_text("no image")
    (root / "ClinicalReadings" / "MCUCXR_0001_0.txt").unlink()
    data = read_montgomery(montgomery, progress=False)
    assert data.images.image_id.tolist() == ["MCUCXR_0001_0", "MCUCXR_0023_1"] and set(data.masks.image_id) == {
        "MCUCXR_0023_1"
    }
    told = data.faults.groupby("row").problem.agg(" ".join)
    assert "left out" in told.MCUCXR_0017_1 and "have masks but no image" in told.MCUCXR_0017_1
    assert "a mask of the right lung only" in told.MCUCXR_0001_0 and "have no reading" in told.MCUCXR_0001_0
    # A reading may refer to an image that was left out.
    assert data.images.patient_id.tolist() == ["montgomery-0001", "montgomery-0017"]


def test_a_missing_piece_names_itself_and_what_to_do(montgomery, tmp_path_factory):
    with pytest.raises(DatasetError, match=r"no image with a name such as CHNCXR_0001_0\.png.*ChinaSet_AllFiles"):
        read_shenzhen(montgomery, progress=False)
    (montgomery / "MontgomerySet" / "ManualMask").rename(tmp_path_factory.mktemp("away") / "ManualMask")
    data = read_montgomery(montgomery, progress=False)
    assert data.masks is None and data.faults.problem.str.contains("there are no masks .* `beside`").tolist() == [True]
    with pytest.raises(DatasetError, match="no image"):
        read_montgomery(tmp_path_factory.mktemp("empty"), progress=False)


@pytest.mark.real_data
def test_real_images_have_their_masks(real_data):
    data = read_shenzhen(real_data / "cxr_seg" / "shenzhen", progress=False)
    # Adult normals, 750 pixels reduced to 512.
    assert len(data.images) == len(data.masks) == 11 and (data.labels.normal == 1).all()
    assert data.images[["rows", "columns"]].max(axis=1).max() == 512


def test_readings_that_name_one_another_in_a_chain_are_one_patient(montgomery):
    root = montgomery / "MontgomerySet"
    name = "MCUCXR_0031_1"
    save(root / "CXR_png" / f"{name}.png", np.full((60, 80), 90))
    read_text(root / "ClinicalReadings" / f"{name}.txt", "NO REPORT (same pt as MCUCXR_0023_1)")
    patients = read_montgomery(montgomery, progress=False).images.set_index("image_id").patient_id
    assert patients[["MCUCXR_0017_1", "MCUCXR_0023_1", name]].unique().tolist() == ["montgomery-0017"]
