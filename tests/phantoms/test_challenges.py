"""Phantoms of competitions: they are read without faults, show what their labels say, and have a test set with its truth."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import RSNA_CLASSES
from kitlib.competitions.registry import find_competition
from kitlib.datasets.registry import read_dataset
from kitlib.datasets.rsna import CLASSES, LABELS, MAPPING, read_rsna
from kitlib.phantoms.challenges import write_challenge
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.run_lengths import decode_mask

pytestmark = pytest.mark.usefixtures("quick_processes")

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
    names = pd.Series([row["img_id"] for row in json.loads((written / MAPPING).read_text())])
    assert names.is_unique and set(names.str[8:]) >= {"_000.png", "_001.png"}
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


@pytest.fixture(scope="module", params=["vinbigdata", "rsna-pneumonia", "ranzcr-clip", "siim-acr"])
def challenge(request, tmp_path_factory):
    """Return the name, the folder, the ground truth and the training set of a competition's phantoms."""
    top, name = tmp_path_factory.mktemp("challenge"), request.param
    sizes = {"images": 8, "test_images": 8} if name == "siim-acr" else {"images": 24, "test_images": 20, "side": 64}
    folder = write_challenge(top, name, truth=top / "truth", seed=5, workers=1, progress=False, **sizes)
    competition = find_competition(name)
    return competition, folder, top / "truth", read_dataset(competition.dataset, folder, progress=False)


def test_the_sample_has_the_ids_of_the_test_images_and_of_the_truth_and_scores_as_a_baseline(challenge):
    competition, folder, truth, data = challenge
    test = competition.read_test(folder)
    known = competition.read_truth(truth)
    sizes = (8, 8) if competition.name == "siim-acr" else (24, 20)
    assert (len(data.images), len(test.images)) == sizes and test.faults.empty
    assert set(test.images.image_id) == set(competition.truth_ids(known)) == set(test.submission_ids)
    assert not set(test.images.image_id) & set(data.images.image_id)
    sample = next(folder.glob("*sample_submission.csv"))
    assert competition.validate_file(sample, truth=truth) == []
    score = competition.score_files(truth, sample)["score"]
    # No box; constant columns; six of eight masks are empty; of VinBigData's six classes, only images without a finding.
    expected = {"rsna-pneumonia": 0, "ranzcr-clip": 1 / 2, "siim-acr": 6 / 8}
    assert score == pytest.approx(expected[competition.name]) if competition.name in expected else 0 < score < 1 / 6


def test_no_patient_is_in_both_sets_and_every_class_has_images(challenge):
    competition, _, truth, data = challenge
    labels = data.labels.drop(columns="id").sum()
    assert (labels[labels > 0] >= 2).all() and len(labels[labels > 0]) >= {"vinbigdata": 6}.get(competition.name, 1)
    if competition.name == "ranzcr-clip":
        assert (labels > 0).all()
        # A tube or line has at most one position.
        devices = data.labels.set_index("id").T.groupby(lambda label: label.split()[0]).sum()
        assert set(devices.index) == {"ETT", "NGT", "CVC", "Swan"} and devices.isin([0, 1]).all(axis=None)
        assert not set(pd.read_csv(truth / "train.csv", dtype=str).PatientID) & set(data.images.patient_id)
    is_loss = data.faults.problem.str.contains("left out") & ~data.faults["row"].str.startswith("ID_")  # of the test set
    assert len(data.faults) <= 1 and not is_loss.any()


def test_three_readers_agree_on_findings_but_not_on_corners(tmp_path):
    folder = write_challenge(tmp_path, "vinbigdata", images=60, side=64, seed=2, workers=1, progress=False)
    table = pd.read_csv(folder / "train.csv")
    assert set(table.groupby("image_id").rad_id.nunique()) == {3}
    none = set(table.image_id[table.class_id == 14])
    assert not none & set(table.image_id[table.class_id < 14]) and 20 <= len(none) <= 40
    counts = table[table.class_id < 14].rad_id.value_counts()
    assert counts["R8"] == counts["R9"] > counts["R10"]  # R10 misses some boxes
    boxes = table[table.class_id < 14].drop(columns="rad_id").drop_duplicates()
    assert len(boxes) > 2 * counts["R8"]


def test_a_pneumothorax_is_darker_than_the_mirrored_lung(tmp_path):
    folder = write_challenge(tmp_path, "siim-acr", images=12, seed=2, workers=1, progress=False)
    data = read_dataset("siim_acr", folder, progress=False)
    paths, drawn = data.images.set_index("image_id").path, data.masks[data.masks.runs != "-1"]
    assert drawn.image_id.nunique() == 3  # a quarter
    for row in drawn[~drawn.image_id.duplicated(keep=False)].itertuples():
        pixels, mask = read_xray(paths[row.image_id]).astype(float), decode_mask(row.runs)
        assert pixels.shape == mask.shape == (1024, 1024) and 0.01 < mask.mean() < 0.15
        assert (pixels - pixels[:, ::-1])[mask].mean() < -5


def test_unknown_names_other_sides_and_a_missing_truth_are_refused(tmp_path):
    for name, sizes, message in (
        ("siim", {}, "unknown competition 'siim'; valid: vinbigdata"),
        ("siim-acr", {"side": 512}, "`side` is 512, but images of 'siim-acr' always have 1024"),
        ("ranzcr-clip", {"test_images": 5}, "test images require `truth`"),
    ):
        with pytest.raises(ValueError, match=message):
            write_challenge(tmp_path, name, images=8, seed=0, progress=False, **sizes)
    assert not list(tmp_path.iterdir())


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
    assert not canary.exists() and len(list((again / "stage_2_train_images").iterdir())) == 3


def test_real_data_is_not_replaced_and_too_small_sizes_are_refused(written, tmp_path):
    (tmp_path / written.name).mkdir()
    (tmp_path / written.name / LABELS).write_text("patientId,x,y,width,height,Target\n")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_challenge(tmp_path, "rsna-pneumonia", **SMALL)
    for wrong in ({"images": 2}, {"side": 31}):
        with pytest.raises(ValueError, match="images >= 3 and side >= 32"):
            write_challenge(tmp_path / "other", "rsna-pneumonia", **(SMALL | wrong))
