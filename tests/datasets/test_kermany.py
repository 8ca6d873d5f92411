"""Kermany's files, of either release: diagnosis and patient from names, and what cannot be told left out aloud."""

import shutil

import cv2
import numpy as np
import pytest

from kitlib.datasets.kermany import read_kermany
from kitlib.errors import DatasetError
from kitlib.phantoms.diagnoses import plan_diagnoses, write_diagnoses


def save(path, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((side, side + 2), 90, np.uint8))


@pytest.fixture
def kaggle(tmp_path):
    root = tmp_path / "chest_xray"
    for name in (
        *("train/PNEUMONIA/person1_bacteria_2.jpeg", "train/PNEUMONIA/person1_bacteria_3.jpeg"),
        *("test/PNEUMONIA/person1_virus_6.jpeg", "train/PNEUMONIA/person1372_virus_2365_1.jpeg"),
        *("train/NORMAL/IM-0115-0001.jpeg", "val/NORMAL/NORMAL2-IM-0115-0001-0002.jpeg"),
        *("train/NORMAL/IM-0117-0001.jpeg", "test/NORMAL/IM-0117-0001.jpeg"),
    ):
        save(root / name)
    return tmp_path


def test_names_tell_diagnosis_and_patient(kaggle):
    data = read_kermany(kaggle, progress=False)
    images = data.images.set_index("image_id")
    assert data.faults.empty and len(images) == 8
    assert images.diagnosis[["person1_bacteria_2", "person1_virus_6", "IM-0115-0001"]].tolist() == [
        *("bacterial", "viral", "normal")
    ]
    # The same number is one patient, whatever the germ, the part or the second series.
    assert images.groupby("patient_id").size().to_dict() == {
        "kermany-person1": 3,
        "kermany-person1372": 1,
        "kermany-IM-0115": 2,
        "kermany-IM-0117": 2,
    }
    # Two files of one name in different parts stay apart.
    assert {"train-IM-0117-0001", "test-IM-0117-0001"} <= set(images.index)
    assert images["part"].value_counts().to_dict() == {"train": 5, "test": 2, "val": 1} and "split" not in images
    assert (images["rows"] == 16).all() and (images["columns"] == 18).all() and set(images.age_group) == {"child"}
    labels = data.labels.set_index("id")
    assert list(labels) == ["viral", "bacterial", "normal"] and (labels.sum(axis=1) == 1).all()
    assert labels.sum().tolist() == [2, 2, 4]
    # Kermany et al. 2018: bacterial, viral and normal sum up to all.
    assert data.published["images"] == sum(data.published[name] for name in ("bacterial", "viral", "normal")) == 5856


def test_mendeleys_names(tmp_path):
    for name in ("BACTERIA-1008087-0001", "BACTERIA-1008087-0002", "VIRUS-1008088-0001"):
        save(tmp_path / "train" / "PNEUMONIA" / f"{name}.jpeg")
    save(tmp_path / "test" / "NORMAL" / "NORMAL-1008089-0001.jpeg")
    images = read_kermany(tmp_path, progress=False).images
    assert images.patient_id.tolist() == [f"kermany-{number}" for number in (1008087, 1008087, 1008089, 1008088)]
    assert images.diagnosis.tolist() == ["bacterial", "bacterial", "normal", "viral"]


def test_files_of_unknown_class_or_unreadable_are_listed_and_left_out(kaggle):
    root = kaggle / "chest_xray"
    shutil.copytree(root / "val", root / "chest_xray" / "val")
    save(root / "train" / "NORMAL" / "person7_virus_1.jpeg")
    save(root / "train" / "NORMAL" / "chest.jpeg")
    save(root / "train" / "IM-0001-0001.jpeg")  # flat in its part, as in coronahack
    # Mendeley's archive also has retinas.
    save(kaggle / "OCT" / "train" / "CNV" / "CNV-1-1.jpeg")
    save(kaggle / "OCT" / "train" / "NORMAL" / "NORMAL-1-1.jpeg")
    (root / "train" / "NORMAL" / "IM-0118-0001.jpeg").write_bytes(b"no image")
    save(kaggle / "__MACOSX" / "train" / "NORMAL" / "IM-0119-0001.jpeg")
    data = read_kermany(kaggle, progress=False)
    assert len(data.images) == 9
    faults = data.faults.set_index("row").problem
    assert faults.to_dict() == {
        "chest_xray/chest_xray/val/NORMAL/NORMAL2-IM-0115-0001-0002.jpeg": (
            "and 0 other files have the name of another file of their part; left out"
        ),
        "chest_xray/train/NORMAL/chest.jpeg": "and 0 other files have a name that states no diagnosis; left out",
        "chest_xray/train/NORMAL/person7_virus_1.jpeg": (
            "and 0 other files have a name that contradicts their folder; left out"
        ),
        "IM-0118-0001": faults["IM-0118-0001"],
        "OCT/train/CNV/CNV-1-1.jpeg": faults["OCT/train/CNV/CNV-1-1.jpeg"],
    }
    assert "and 1 other image files are not read" in faults["OCT/train/CNV/CNV-1-1.jpeg"]


def test_a_folder_without_readable_images_of_kermany_is_an_error(tmp_path):
    save(tmp_path / "NORMAL" / "IM-0001-0001.jpeg")
    with pytest.raises(
        DatasetError,
        match=r"none of the \d+ files in .* is an image such as 'train/PNEUMONIA.*chest-xray-pneumonia",
    ):
        read_kermany(tmp_path, progress=False)
    (tmp_path / "train" / "NORMAL").mkdir(parents=True)
    (tmp_path / "train" / "NORMAL" / "IM-0001-0001.jpeg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="no X-ray that can be read"):
        read_kermany(tmp_path, progress=False)


def test_phantoms_are_read_as_planned(tmp_path):
    folder = write_diagnoses(tmp_path, "kermany", seed=1, images=40, side=48, progress=False)
    data = read_kermany(folder, progress=False)
    assert len(data.faults) == 1 and "left out" in data.faults.problem[0]
    planned = [image for image in plan_diagnoses("kermany", 40, seed=1) if not image.damaged]
    assert sorted(data.images.diagnosis) == sorted(image.diagnosis for image in planned)
    assert data.images.patient_id.nunique() == len({image.patient for image in planned})


@pytest.mark.real_data
def test_real_names(real_data, tmp_path):
    """Kermany et al.'s 624 test images: 242 bacterial, 148 viral and 234 normal ones, as data/README.md counts them."""
    for path in (real_data / "cxr_seg" / "kermany_test" / "img").iterdir():
        place = tmp_path / "test" / ("PNEUMONIA" if path.name.startswith("person") else "NORMAL") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    data = read_kermany(tmp_path, progress=False)
    assert data.faults.empty and data.labels[["bacterial", "viral", "normal"]].sum().tolist() == [242, 148, 234]
