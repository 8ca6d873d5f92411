"""Phantom radiographs match their boxes and classes, and the phantom competition has SIIM's layout."""

import ast
import dataclasses
import hashlib
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

from kitlib.classes import STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.errors import UnreadableXray
from kitlib.phantoms.drawing import draw_masks, render
from kitlib.phantoms.patients import draw_exposure, draw_near_duplicate, draw_opacities, draw_patient
from kitlib.phantoms.plan import CLASS_SHARES, plan_split
from kitlib.phantoms.siim import BITS_SHARES, SYNTAX_SHARES, write_competition
from kitlib.xrays.dicom import read_header
from kitlib.xrays.image_file import read_xray

pytestmark = pytest.mark.usefixtures("quick_processes")

SEEDS = st.integers(0, 2**32 - 1)
SMALL = {"train_studies": 30, "test_studies": 12, "side": 64, "seed": 5, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a competition and of its test set's ground truth."""
    root = tmp_path_factory.mktemp("inputs")
    return write_competition(root / "demo", root / "truth", **SMALL), root / "truth"


def scene(seed: int, study_class: str, side: int):
    rng = np.random.default_rng(seed)
    return draw_patient(rng), draw_exposure(rng, side), draw_opacities(rng, study_class)


def quiet(exposure):
    """The exposure without noise, border and marker, and linear in the attenuation."""
    return dataclasses.replace(exposure, noise=0.0, border=0.0, marker="", gamma=1.0)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    width, height = (np.minimum(one, other)[2:] - np.maximum(one, other)[:2]).clip(0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(STUDY_CLASSES), st.integers(32, 200))
def test_same_scene_gives_same_pixels_in_range(seed, study_class, side):
    patient, exposure, opacities = scene(seed, study_class, side)
    grey, boxes = render(patient, exposure, opacities)
    assert grey.shape == (exposure.rows, exposure.columns) and max(grey.shape) == side != min(grey.shape)
    assert grey.dtype == np.float32 and grey.min() >= 0 and grey.max() <= 1
    again, _ = render(patient, exposure, opacities)
    np.testing.assert_array_equal(grey, again)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (exposure.columns, exposure.rows)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(boxes) == sum(opacity.boxed for opacity in opacities)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(100, 700))
def test_masks_match_the_drawing(seed, side):
    """Lungs are darker than their surroundings; the heart, which has no air, is brighter and lies between the lungs."""
    patient, exposure, _ = scene(seed, "negative", side)
    exposure = dataclasses.replace(quiet(exposure), rotation=0.0)
    grey, _ = render(patient, exposure)
    masks = draw_masks(patient, exposure)
    assert list(masks) == ["left_lung", "right_lung", "heart"]
    assert all(mask.shape == grey.shape and mask.dtype == bool for mask in masks.values())
    assert not (masks["heart"] & (masks["left_lung"] | masks["right_lung"])).any()
    assert not (masks["left_lung"] & masks["right_lung"]).any()
    for name in ("left_lung", "right_lung"):
        mask = masks[name].astype(np.uint8)
        kernel = np.ones((3, 3), np.uint8)
        # Compares bands outside and inside of the edge, up to 2.5 % of the side away, because the edge itself is soft.
        far = max(2, round(0.05 * side / 2))
        around = (cv2.dilate(mask, kernel, iterations=far) > 0) & (cv2.dilate(mask, kernel, iterations=far // 2) == 0)
        within = (cv2.erode(mask, kernel, iterations=far // 2) > 0) & (cv2.erode(mask, kernel, iterations=far) == 0)
        assert np.median(grey[within]) < np.median(grey[around & ~masks["heart"]]) - 0.05
        assert np.median(grey[masks["heart"]]) > np.median(grey[within]) + 0.15
    # The patient's left is on the image's right, and contains most of the heart.
    columns = {name: np.nonzero(mask)[1].mean() for name, mask in masks.items()}
    assert columns["right_lung"] < columns["heart"] < columns["left_lung"]


def test_masks_of_a_large_image_match_those_of_a_small_one():
    """Images are drawn small and enlarged, masks at full size; both must cover the same area."""
    patient, exposure, _ = scene(3, "negative", 400)
    large = dataclasses.replace(exposure, rows=4 * exposure.rows, columns=4 * exposure.columns)
    small, enlarged = draw_masks(patient, exposure), draw_masks(patient, large)
    for name, mask in small.items():
        shrunk = cv2.resize(enlarged[name].astype(np.uint8) * 255, mask.shape[::-1], interpolation=cv2.INTER_AREA) > 127
        assert 2 * (shrunk & mask).sum() / (shrunk.sum() + mask.sum()) > 0.98


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(STUDY_CLASSES[1:]))
def test_a_box_encloses_the_change_that_the_opacity_makes(seed, study_class):
    """The change is the image with the opacity minus the image without it."""
    patient, exposure, opacities = scene(seed, study_class, 240)
    opacity = dataclasses.replace(opacities[0], boxed=True)
    with_it, boxes = render(patient, quiet(exposure), (opacity,))
    without, none = render(patient, quiet(exposure))
    assert none.shape == (0, 4)
    change = with_it - without
    xmin, ymin, xmax, ymax = boxes[0].round().astype(int)
    assert change.min() > -0.02  # an opacity is never darker than the lung
    assert change[ymin:ymax, xmin:xmax].sum() > 0.85 * change.sum()
    assert change.max() > 0.08  # visible through noise of at most 0.016
    ys, xs = np.nonzero(change > 0.2 * change.max())
    assert overlap(boxes[0], np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])) > 0.6


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_boxes_grow_with_the_image(seed):
    """Four times the side gives four times the box, within three of the small image's pixels; 800 is drawn at 512."""
    patient, exposure, opacities = scene(seed, "typical", 200)
    large = dataclasses.replace(exposure, rows=4 * exposure.rows, columns=4 * exposure.columns)
    np.testing.assert_allclose(render(patient, large, opacities)[1] / 4, render(patient, exposure, opacities)[1], atol=3)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match=r"'viral'.*negative, typical"):
        draw_opacities(np.random.default_rng(0), "viral")


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_air_is_black_and_bone_and_heart_are_white(seed):
    patient, exposure, _ = scene(seed, "negative", 200)
    plain = dataclasses.replace(quiet(exposure), shift_u=0.0, shift_v=0.0, rotation=0.0, zoom=1.0, rows=200, columns=199)
    grey, _ = render(patient, plain)
    # Upper lungs and spine of a centred chest: at +-0.5 thorax units, 0.37 x 199 pixels each, above the hila.
    right, spine, left = (grey[50:70, column - 4 : column + 4].mean() for column in (62, 99, 137))
    assert max(right, left) + 0.15 < spine
    assert grey[:8, :8].mean() < 0.15  # above the shoulder


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 400), st.integers(4, 120), st.integers(0, 10**6))
def test_plan_has_the_class_shares_and_separates_patients(train_studies, test_studies, seed):
    train, test = plan_split("train", train_studies, seed, 0), plan_split("test", test_studies, seed, 1)
    for studies, count in ((train, train_studies), (test, test_studies)):
        classes = [study.study_class for study in studies]
        assert len(classes) == count and set(classes) == set(STUDY_CLASSES)
        for name, share in CLASS_SHARES.items():  # the minimum of one per class may take up to three from the largest
            assert abs(classes.count(name) - share * count) <= 3
        duplicated = [study for study in studies if any(image.duplicate for image in study.images)]
        assert duplicated and all(study.study_class != "negative" for study in duplicated)
    assert not {study.patient_id for study in train} & {study.patient_id for study in test}
    names = [name for study in train + test for name in (study.study_id, *(image.image_id for image in study.images))]
    assert len(set(names)) == len(names) and all(re.fullmatch("[0-9a-f]{12}", name) for name in names)
    assert sum(image.damage != "" for study in test for image in study.images) == 1


def test_tables_have_the_competitions_format(written):
    competition, truth = written
    for tables, split in ((competition, "train"), (truth, "test")):
        studies, images = pd.read_csv(tables / "train_study_level.csv"), pd.read_csv(tables / "train_image_level.csv")
        assert list(studies) == ["id", *STUDY_LABEL_COLUMNS]
        assert list(images) == ["id", "boxes", "label", "StudyInstanceUID"]
        assert (studies.iloc[:, 1:].sum(axis=1) == 1).all() and (studies.iloc[:, 1:].sum() >= 1).all()
        files = {(path.parts[-3], path.stem) for path in (competition / split).glob("*/*/*.dcm")}
        assert files == set(zip(images.StudyInstanceUID, images.id.str.removesuffix("_image"), strict=True))
        assert {study for study, _ in files} == set(studies.id.str.removesuffix("_study"))
        for row in images.itertuples():
            words = row.label.split()
            if pd.isna(row.boxes):
                assert row.label == "none 1 0 0 1 1"
                continue
            boxes = ast.literal_eval(row.boxes)
            assert words[::6] == ["opacity"] * len(boxes) and words[1::6] == ["1"] * len(boxes)
            edges = [(b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]) for b in boxes]
            label_edges = [[float(word) for word in words[start : start + 4]] for start in range(2, len(words), 6)]
            np.testing.assert_allclose(edges, label_edges, atol=1e-4)


def test_sample_submission_lists_studies_then_images_of_the_test_set(written):
    competition, truth = written
    sample = pd.read_csv(competition / "sample_submission.csv")
    studies, images = pd.read_csv(truth / "train_study_level.csv"), pd.read_csv(truth / "train_image_level.csv")
    assert list(sample) == ["id", "PredictionString"]
    assert sample.id.tolist() == [*studies.id, *images.id]
    assert sample.PredictionString.tolist() == ["negative 1 0 0 1 1"] * len(studies) + ["none 1 0 0 1 1"] * len(images)


def test_near_duplicates_are_unboxed_in_train_and_boxed_in_the_truth(written):
    for tables, boxed in zip(written, (1, 2), strict=True):
        images = pd.read_csv(tables / "train_image_level.csv")
        split = "train" if boxed == 1 else "test"
        plan = plan_split(split, SMALL[f"{split}_studies"], SMALL["seed"], 3 if split == "test" else 0)
        studies = [study for study in plan if any(image.duplicate for image in study.images)]
        checked = 0
        for study in studies:
            rows = images[images.StudyInstanceUID == study.study_id]
            if rows.boxes.notna().any():  # effusions have no boxes
                assert rows.boxes.notna().sum() == (1 if split == "train" else len(rows))
                checked += 1
        assert checked


def test_all_files_but_the_damaged_ones_decode_with_the_right_polarity(written):
    """Every image correlates with the mean of all images; one with the wrong polarity would correlate below zero."""
    competition, _ = written
    greys, unreadable, syntaxes = [], [], set()
    for path in sorted(competition.glob("t*/*/*/*.dcm")):
        try:
            pixels = read_xray(path)
        except UnreadableXray:
            unreadable.append(path)
            continue
        header = read_header(path)
        assert (header.study_id, header.image_id) == (path.parts[-3], path.stem)
        assert pixels.shape == (header.rows, header.columns)
        syntaxes.add((header.transfer_syntax, header.photometric, header.bits_stored))
        greys.append(pixels[10:50, 10:45].ravel().astype(float))
    assert all(path.parts[-4] == "test" for path in unreadable) and len(unreadable) == 3
    mean = np.mean(greys, axis=0)
    assert min(np.corrcoef(grey, mean)[0, 1] for grey in greys) > 0.2
    assert len({syntax for syntax, _, _ in syntaxes}) >= 4
    assert {photometric for _, photometric, _ in syntaxes} == {"MONOCHROME1", "MONOCHROME2"}
    assert len({bits for _, _, bits in syntaxes}) >= 4


def planned_images():
    """Yield (study, image) of the written competition."""
    for split, damaged in (("train", 0), ("test", 3)):
        for study in plan_split(split, SMALL[f"{split}_studies"], SMALL["seed"], damaged):
            for image in study.images:
                yield study, image


def path_of(competition, study, image):
    return competition / study.split / study.study_id / image.series_id / f"{image.image_id}.dcm"


def test_shares_sum_to_1_and_bit_depths_are_siims():
    for shares in (SYNTAX_SHARES, BITS_SHARES):
        assert sum(shares.values()) == pytest.approx(1)
    assert set(BITS_SHARES) == {8, 10, 12, 14, 15, 16}


def test_headers_have_the_ids_of_the_plan_and_its_oddities(written):
    presentations, functions, values = [], [], {"Modality": set(), "PatientSex": set(), "ViewPosition": set()}
    odd = set()
    for study, image in planned_images():
        if image.damage:
            continue
        header = dcmread(path_of(written[0], study, image))
        ids = (header.PatientID, header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
        assert ids == (study.patient_id, study.study_id, image.series_id, image.image_id)
        assert header.BodyPartExamined == ("SKULL" if image.oddity == "skull" else "CHEST")
        assert (header.get("WindowWidth", 1) == 0) == (image.oddity == "window width 0")
        if image.oddity == "padding":
            least = header.Rows * header.Columns * header.BitsAllocated // 8
            assert len(header.PixelData) > least + 1 and header.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        odd.add(image.oddity)
        assert header.BitsAllocated == (8 if header.BitsStored == 8 else 16)
        assert header.file_meta.TransferSyntaxUID != JPEGBaseline8Bit or header.BitsStored == 8
        presentations.append((header.get("PresentationLUTShape", ""), header.PhotometricInterpretation))
        functions.append(header.get("VOILUTFunction", "") if "WindowWidth" in header else None)
        for name, seen in values.items():
            seen.add(header.get(name, ""))
    assert odd == {"", "window width 0", "skull", "padding"}
    assert values == {"Modality": {"CR", "DX"}, "PatientSex": {"F", "M"}, "ViewPosition": {"AP", "PA", ""}}
    # About half of the files name the shape, which agrees with the photometric interpretation.
    assert set(presentations) == {
        *(("", "MONOCHROME1"), ("", "MONOCHROME2"), ("INVERSE", "MONOCHROME1"), ("IDENTITY", "MONOCHROME2"))
    }
    assert 0.3 < np.mean([shape == "" for shape, _ in presentations]) < 0.7
    windows = [function for function in functions if function is not None]
    assert len(windows) < len(functions)  # some files have no window
    assert {"", "LINEAR"} <= set(windows) <= {"", "LINEAR", "LINEAR_EXACT", "SIGMOID"}


def test_stored_values_fill_most_of_the_bits_and_windows_fit_them(written):
    windows = 0
    for study, image in planned_images():
        header = None if image.damage else dcmread(path_of(written[0], study, image))
        if header is None or header.file_meta.TransferSyntaxUID.is_compressed or image.oddity:
            continue
        values, top = header.pixel_array.astype(float), 2**header.BitsStored - 1
        assert 0 <= values.min() < values.max() <= top and np.ptp(values) > 0.4 * top
        if "WindowWidth" in header:
            windows += 1
            centre, width = float(header.WindowCenter), float(header.WindowWidth)
            # The window shows all values but extreme ones, and does not reach far beyond them.
            assert abs(centre - width / 2 - values.min()) < 0.3 * top and abs(centre + width / 2 - values.max()) < 0.3 * top
    assert windows >= 5


def test_damaged_files_are_cut_off_garbage_or_empty(written):
    sizes = {}
    for study, image in planned_images():
        content = path_of(written[0], study, image).read_bytes()
        if image.damage:
            sizes[image.damage] = len(content)
            assert (content[128:132] == b"DICM") == (image.damage == "truncated")
    assert set(sizes) == {"truncated", "garbage", "empty"} and sizes["empty"] == 0
    assert min(sizes["truncated"], sizes["garbage"]) > 0


def test_near_duplicates_are_crops_of_the_first_image(written):
    compared = 0
    for study, image in planned_images():
        if image.duplicate and not (image.damage or study.images[0].damage):
            headers = [read_header(path_of(written[0], study, each)) for each in (study.images[0], image)]
            shares = np.divide(*[(header.rows, header.columns) for header in reversed(headers)])
            assert shares.max() <= 1 and shares.min() > 0.94  # by up to 4 %, rounded to whole pixels
            compared += 1
    assert compared


def fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_bytes_depend_on_the_seed_and_not_on_the_workers(written, tmp_path):
    competition, truth = written
    parallel = write_competition(tmp_path / "demo", tmp_path / "truth", **(SMALL | {"workers": 2}))
    assert fingerprint(parallel) == fingerprint(competition)
    assert fingerprint(tmp_path / "truth") == fingerprint(truth)


def test_writing_again_does_nothing_and_other_parameters_replace(tmp_path):
    few = SMALL | {"train_studies": 4, "test_studies": 4, "side": 32, "damaged_test_files": 0}
    partial = tmp_path / "demo" / ".siim-covid19-detection.partial" / "train"
    partial.mkdir(parents=True)  # left behind by a run that was killed
    (partial / "old.dcm").write_bytes(b"old")
    competition = write_competition(tmp_path / "demo", tmp_path / "truth", **few)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [".phantom.json", "siim-covid19-detection"]
    assert {path.name for path in competition.iterdir()} == {
        *("train", "test", "train_study_level.csv", "train_image_level.csv", "sample_submission.csv")
    }
    assert not list(competition.rglob("old.dcm"))
    before = fingerprint(competition)
    canary = competition / "canary"
    canary.write_text("still here")
    write_competition(tmp_path / "demo", tmp_path / "truth", **few)
    assert canary.exists()
    (tmp_path / "truth" / "train_image_level.csv").unlink()
    write_competition(tmp_path / "demo", tmp_path / "truth", **few)
    assert not canary.exists() and fingerprint(competition) == before
    write_competition(tmp_path / "demo", tmp_path / "truth", **(few | {"seed": 6}))
    assert fingerprint(competition) != before
    # The process was killed after the old folder was renamed.
    competition.rename(competition.with_name(".siim-covid19-detection.replaced"))
    write_competition(tmp_path / "demo", tmp_path / "truth", **few)
    assert fingerprint(competition) == before and len(list((tmp_path / "demo").iterdir())) == 2
    write_competition(tmp_path / "demo", tmp_path / "truth", **(few | {"seed": 6}))
    # The folder of an earlier version, with the marker inside.
    (tmp_path / "demo" / ".phantom.json").rename(competition / "phantom.json")
    write_competition(tmp_path / "demo", tmp_path / "truth", **few)
    assert fingerprint(competition) == before
    # The real data set, unpacked where the phantoms were.
    (competition / "train_image_level.csv").write_text("id,boxes,label,StudyInstanceUID\n")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_competition(tmp_path / "demo", tmp_path / "truth", **(few | {"seed": 6}))


def test_real_data_is_not_replaced(tmp_path):
    real = tmp_path / "siim-covid19-detection" / "train"
    real.mkdir(parents=True)
    (real / "precious.dcm").write_bytes(b"120 GB")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_competition(tmp_path, tmp_path / "truth", **SMALL)
    assert (real / "precious.dcm").exists()


@pytest.mark.parametrize("wrong", [{"train_studies": 3}, {"test_studies": 0}, {"side": 8}, {"damaged_test_files": 100}])
def test_invalid_sizes_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"at least|at most"):
        write_competition(tmp_path / "demo", tmp_path / "truth", **(SMALL | wrong))
    assert not (tmp_path / "demo" / "siim-covid19-detection").exists()


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_a_near_duplicate_shows_the_same_opacities(seed):
    """Cropping by up to 4 % keeps the boxes' sizes within eight of 200 pixels; the wavy rim is sampled differently."""
    rng = np.random.default_rng(seed)
    patient, exposure, opacities = scene(seed, "indeterminate", 200)
    again = draw_near_duplicate(rng, exposure)
    one, other = (render(patient, view, opacities)[1] for view in (exposure, again))
    np.testing.assert_allclose(one[:, 2:] - one[:, :2], other[:, 2:] - other[:, :2], atol=8)
    assert again.rows <= exposure.rows and again.columns <= exposure.columns
