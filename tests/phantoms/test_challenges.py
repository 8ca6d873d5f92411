"""Phantoms of competitions: they are read without faults, show what their labels say, and have a test set with its truth."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread

from kitlib.classes import RANZCR_LABELS, RSNA_CLASSES
from kitlib.competitions.registry import find_competition
from kitlib.datasets.registry import read_dataset
from kitlib.datasets.rsna import CLASSES, LABELS, MAPPING, read_rsna
from kitlib.phantoms.challenges import LAYOUTS, Planned, write_challenge
from kitlib.phantoms.patients import draw_exposure
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
    # Corners at whole pixels of the files, whose 64 pixels stand for 1024.
    assert not (rows[["x", "y", "width", "height"]].dropna() % 16).any(axis=None)
    assert {dcmread(path, stop_before_pixels=True).PatientSex for path in data.images.path} == {"F", "M"}
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


@pytest.fixture(scope="module")
def vinbigdata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vinbigdata")
    return write_challenge(folder, "vinbigdata", images=60, side=64, seed=2, workers=1, progress=False)


def test_three_readers_agree_on_findings_but_not_on_corners(vinbigdata):
    table = pd.read_csv(vinbigdata / "train.csv")
    assert set(table.groupby("image_id").rad_id.nunique()) == {3}
    none = set(table.image_id[table.class_id == 14])
    assert not none & set(table.image_id[table.class_id < 14]) and 20 <= len(none) <= 40
    counts = table[table.class_id < 14].rad_id.value_counts()
    assert counts["R8"] == counts["R9"] > counts["R10"]  # R10 misses some boxes
    boxes = table[table.class_id < 14].drop(columns="rad_id").drop_duplicates()
    assert len(boxes) > 2 * counts["R8"]
    first, last = (table[table.rad_id == reader].dropna() for reader in ("R8", "R10"))
    assert set(last.image_id) == set(first.image_id)  # R10 finds at least one box of each image
    # In images with one box, corners differ by a small share of its sides, which are rounded to pixels.
    single = first[~first.image_id.duplicated(keep=False)]
    pairs = single.merge(last, on=["image_id", "class_name"], suffixes=("", "_last"))
    for low, high in (("x_min", "x_max"), ("y_min", "y_max")):
        moved = (pairs[f"{low}_last"] - pairs[low]).abs()
        assert (moved <= 0.2 * (pairs[high] - pairs[low]) + 2).all() and moved.any()


def test_an_enlarged_heart_is_boxed_in_the_middle_of_the_image(vinbigdata):
    table = pd.read_csv(vinbigdata / "train.csv")
    hearts = table[(table.class_name == "Cardiomegaly") & (table.rad_id == "R8")]
    assert len(hearts)
    for low, high in ((hearts.x_min, hearts.x_max), (hearts.y_min, hearts.y_max)):  # of at most 64 pixels
        assert low.lt(40).all() and high.between(33, 60).all() and (high - low).gt(12).all()
    assert hearts.x_min.lt(32).all()  # it covers the midline


def test_vinbigdatas_files_have_12_bits_and_either_polarity(vinbigdata):
    paths = sorted((vinbigdata / "train").iterdir())
    headers = [dcmread(path) for path in paths]
    assert {header.BitsStored for header in headers} == {12} and len({each.SOPInstanceUID for each in headers}) == 60
    assert all(header.pixel_array.max() <= 4095 and np.ptp(header.pixel_array) > 2048 for header in headers)
    assert {header.PhotometricInterpretation for header in headers} == {"MONOCHROME1", "MONOCHROME2"}
    # Read as X-rays, all correlate with their mean; one with the wrong polarity would correlate below zero.
    greys = [read_xray(path)[10:50, 10:45].ravel().astype(float) for path in paths]
    assert min(np.corrcoef(grey, np.mean(greys, axis=0))[0, 1] for grey in greys) > 0


def test_a_pneumothorax_is_darker_than_the_mirrored_lung(tmp_path):
    folder = write_challenge(tmp_path, "siim-acr", images=12, seed=2, workers=1, progress=False)
    data = read_dataset("siim_acr", folder, progress=False)
    paths, drawn = data.images.set_index("image_id").path, data.masks[data.masks.runs != "-1"]
    assert drawn.image_id.nunique() == 3  # a quarter
    for row in drawn[~drawn.image_id.duplicated(keep=False)].itertuples():
        pixels, mask = read_xray(paths[row.image_id]).astype(float), decode_mask(row.runs)
        assert pixels.shape == mask.shape == (1024, 1024) and 0.01 < mask.mean() < 0.15
        assert (pixels - pixels[:, ::-1])[mask].mean() < -5


def test_each_label_has_a_share_and_is_in_one_group():
    for layout in LAYOUTS.values():
        for group in layout.groups:
            assert sum(group.values()) == pytest.approx(1) and min(group.values()) >= 0
        labels = [label for group in layout.groups for label in group if label]
        assert len(labels) == len(set(labels))


DIGITS = "0123456789abcdef" * 4
UUID = "01234567-89ab-4def-8123-456789abcdef"  # RFC 4122: the version, 4, and the variant, 8, each in a digit


@pytest.mark.parametrize(
    ("name", "split", "image_id", "path"),
    [
        ("vinbigdata", "train", DIGITS[:32], f"train/{DIGITS[:32]}.dicom"),
        ("rsna-pneumonia", "test", UUID, f"stage_2_test_images/{UUID}.dcm"),
        ("siim-acr", "test", "ID_012345678", "stage_2_images/ID_012345678.dcm"),
        (
            *("siim-acr", "train", "1.2.276.0.7230010.3.1.4.8323329.81985529216486895"),
            "dicom-images-train/1.2.276.0.7.1/1.2.276.0.7.2/1.2.276.0.7230010.3.1.4.8323329.81985529216486895.dcm",
        ),
    ],
)  # fmt: skip
def test_ids_and_paths_have_the_competitions_form(name, split, image_id, path):
    assert LAYOUTS[name].make_id(split, DIGITS) == image_id
    image = Planned(split=split, image_id=image_id, patient="00020001", patient_seed=1, seed=7, shows=())
    assert LAYOUTS[name].make_path(image) == path


def test_ranzcrs_ids_are_uids_with_38_digits():
    assert re.fullmatch(r"1\.2\.826\.0\.1\.3680043\.8\.498\.\d{38}", LAYOUTS["ranzcr-clip"].make_id("train", DIGITS))


def test_the_position_of_a_tip_decides_on_its_label(tmp_path, monkeypatch):
    """Subtracts the image without a line from the image with it, and looks for its lowest row."""
    exposure = replace(
        draw_exposure(np.random.default_rng(0), 256),
        **{"rows": 256, "columns": 256, "rotation": 0.0, "zoom": 1.0, "shift_u": 0.0, "shift_v": 0.0},
        **{"noise": 0.0, "border": 0.0, "marker": "", "gamma": 1.0, "gain": 0.8},
    )
    monkeypatch.setattr("kitlib.phantoms.challenges.draw_exposure", lambda rng, side: exposure)

    def drawn(*shows):
        path = tmp_path / "image.jpg"
        image = Planned(split="train", image_id="a", patient="00020001", patient_seed=1, seed=7, shows=shows)
        LAYOUTS["ranzcr-clip"].draw(path, image, 256)
        return read_xray(path).astype(int)

    without, lowest = drawn(), {}
    for label in RANZCR_LABELS:
        added = drawn(label) - without
        assert 0.0005 < (added > 12).mean() < 0.05 and added.min() > -40, label
        lowest[label] = np.flatnonzero((added > 12).any(axis=1)).max()
    for device, order in {
        "ETT": ("Normal", "Borderline", "Abnormal"),  # above the carina, at it, in a bronchus
        "NGT": ("Abnormal", "Borderline", "Normal", "Incompletely Imaged"),  # in a lung, at the diaphragm, in the stomach
        "CVC": ("Abnormal", "Normal", "Borderline"),  # in the neck, in the vena cava, in the heart
    }.items():
        rows = [lowest[f"{device} - {name}"] for name in order]
        assert all(np.diff(rows) > 10), (device, rows)
    assert lowest["NGT - Incompletely Imaged"] == 255


def test_images_have_320_pixels_unless_told_otherwise(tmp_path):
    folder = write_challenge(tmp_path, "ranzcr-clip", images=5, seed=2, workers=1, progress=False)
    assert {max(read_xray(path).shape) for path in (folder / "train").iterdir()} == {320}


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
