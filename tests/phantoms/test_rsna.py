"""Phantoms in RSNA's layout: they are read without faults, and images show what their class says."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import RSNA_CLASSES
from kitlib.datasets.rsna import CLASSES, IMAGES, LABELS, read_rsna
from kitlib.phantoms.challenges import write_challenge
from kitlib.xrays.image_file import read_xray

SMALL = {"images": 40, "side": 64, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_challenge(tmp_path_factory.mktemp("inputs"), "rsna-pneumonia", **SMALL, workers=1)


@pytest.fixture(scope="module")
def data(written):
    return read_rsna(written, progress=False)


def test_the_readers_only_fault_is_that_the_images_are_smaller_than_the_published_ones(written, data):
    assert (
        "from 1024 x 1024 to 64 x 64 pixels; the boxes are scaled" in data.faults.problem.item() and len(data.images) == 40
    )
    assert set(data.images["rows"]) == set(data.images["columns"]) == {64} and set(data.images["view"]) == {"AP", "PA"}
    # The published 8851, 11821 and 6012 of 26684, times 40: 13.3, 17.7 and 9.0.
    assert data.labels[list(RSNA_CLASSES)].sum().tolist() == [13, 18, 9]
    boxed = set(data.labels.id[data.labels["Lung Opacity"] == 1])
    assert set(data.boxes.image_id) == boxed
    # Some patients, numbered as NIH's, have several images, which folds must keep together.
    assert data.images.patient_id.nunique() < 40 and data.images.patient_id.str.fullmatch(r"nih-\d{8}").all()
    rows, classes = (pd.read_csv(written / name) for name in (LABELS, CLASSES))
    assert list(rows) == ["patientId", "x", "y", "width", "height", "Target"] and list(classes) == ["patientId", "class"]
    assert rows.patientId.tolist() == classes.patientId.tolist() and len(rows) == len(data.boxes) + 31


def test_boxes_are_brighter_than_the_other_lung(data):
    """Averages the image minus its mirror image inside the box, for images with one box."""
    paths = data.images.set_index("image_id").path
    single = data.boxes[~data.boxes.image_id.duplicated(keep=False)]
    brighter = []
    for box in single.itertuples():
        pixels = read_xray(paths[box.image_id]).astype(float)
        area = np.s_[int(box.ymin) : int(box.ymax), int(box.xmin) : int(box.xmax)]
        brighter.append((pixels - pixels[:, ::-1])[area].mean())
    assert len(brighter) >= 4 and np.mean(np.array(brighter) > 0) >= 0.8


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_the_same_parameters_give_the_same_bytes_and_are_left_alone(written, tmp_path):
    again = write_challenge(tmp_path, "rsna-pneumonia", **SMALL, workers=2)
    assert digest(again) == digest(written)
    canary = again / "canary"
    canary.write_text("")
    write_challenge(tmp_path, "rsna-pneumonia", **SMALL)
    assert canary.exists()
    write_challenge(tmp_path, "rsna-pneumonia", **(SMALL | {"images": 3, "seed": 4}))
    assert not canary.exists() and len(list((again / IMAGES).iterdir())) == 3


def test_real_data_is_not_replaced_and_too_small_sizes_are_refused(written, tmp_path):
    (tmp_path / written.name).mkdir()
    (tmp_path / written.name / LABELS).write_text("patientId,x,y,width,height,Target\n")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_challenge(tmp_path, "rsna-pneumonia", **SMALL)
    for wrong in ({"images": 2}, {"side": 31}):
        with pytest.raises(ValueError, match="at least 3 images of 32 pixels"):
            write_challenge(tmp_path / "other", "rsna-pneumonia", **(SMALL | wrong))
