"""The cases D1 to D10 and E1 to E3 were computed by hand and by an independent program, on an image of 4 x 4 pixels.

A score depends only on the numbers of the pixels, so that it is the same on an image of 1,024 x 1,024 pixels.
"""

from fractions import Fraction
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kitlib.classes import MASK_CODES
from kitlib.competitions.siim_acr import (
    SIIM_ACR,
    SiimAcrSettings,
    compare,
    decide,
    dice,
    fill,
    judge,
    metric,
    read_truth,
    truth_of,
)
from kitlib.errors import MaskError, ScoringError
from kitlib.fusion.model_fusion import ModelPredictions, fuse
from kitlib.fusion.tuning import KEPT_FUSIONS, Judge
from kitlib.scoring.metrics import overlap
from kitlib.tables import empty_table
from kitlib.xrays.mask_store import MaskStore, encode_grey
from kitlib.xrays.run_lengths import NO_RUNS, decode_mask, draw_runs, encode_mask, encode_runs, parse_runs, runs_of

LAST = 1024 * 1024 - 1


def write(path, rows, name="EncodedPixels"):
    path.write_text(f"ImageId,{name}\n" + "".join(f"{image},{runs}\n" for image, runs in rows))
    return path


BY_HAND = {
    "D1": ([("a", "-1")], [("a", "-1")], 1),
    "D2": ([("a", "-1")], [("a", "0 1")], 0),
    "D3": ([("a", "0 4")], [("a", "-1")], 0),
    "D4": ([("a", "0 4")], [("a", "2 4")], 1 / 2),
    "D5, rows are united": ([("a", "0 2"), ("a", "2 2")], [("a", "0 4")], 1),
    "D6, rows overlap": ([("a", "0 3"), ("a", "1 3")], [("a", "0 4")], 1),
    "D7": ([("a", "-1"), ("b", "-1"), ("c", "0 4")], [("a", "-1"), ("b", "0 1"), ("c", "0 2")], 5 / 9),
    "D8": ([("a", "-1"), ("b", "-1"), ("c", "-1"), ("d", "0 4")], [(name, "-1") for name in "abcd"], 3 / 4),
    "D9, gaps are relative": ([("a", "1 2 3 1")], [("a", "6 1")], 1 / 2),
    "D10, blanks": ([("a", " -1"), ("b", " 1 2")], [("a", "-1"), ("b", "1 2")], 1),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_scores_computed_by_hand(tmp_path, case):
    truth, rows, expected = BY_HAND[case]
    write(tmp_path / "train-rle.csv", truth, " EncodedPixels")
    for order in (rows, rows[::-1]):
        scores = SIIM_ACR.score_files(tmp_path, write(tmp_path / "submission.csv", order))
        assert scores["score"] == pytest.approx(expected)


def test_parts_are_the_images_with_and_without_a_pneumothorax(tmp_path):
    truth, rows, _ = BY_HAND["D7"]
    scores = SIIM_ACR.score_files(write(tmp_path / "a.csv", truth), write(tmp_path / "submission.csv", rows))
    assert scores == pytest.approx({"score": 5 / 9, "with_pneumothorax": 2 / 3, "without": 1 / 2})
    assert np.isnan(list(metric({}, {}).values())).tolist() == [True] * 3


def test_the_table_of_stage_2_is_preferred(tmp_path):
    write(tmp_path / "train-rle.csv", [("old", "-1")], " EncodedPixels")
    write(tmp_path / "stage_2_train.csv", [("new", "-1")])
    assert list(read_truth(tmp_path)) == ["new"]


@pytest.mark.parametrize(
    ("pixels", "text"),
    [
        ([(1, 0), (2, 0), (2, 1)], "1 2 3 1"),  # E1
        ([(0, 0), (0, 1)], "0 1 3 1"),  # E2, a row
        ([(0, 0), (1, 0)], "0 2"),  # E2, a column
        ([(0, 0), (3, 3)], "0 1 14 1"),  # E3
        ([(3, 3)], "15 1"),
        ([], "-1"),
    ],
)
def test_run_lengths_by_hand(pixels, text):
    mask = np.zeros((4, 4), dtype=np.uint8)
    for row, column in pixels:
        mask[row, column] = 255
    assert encode_mask(mask) == text
    np.testing.assert_array_equal(decode_mask(text, 4, 4), mask > 0)


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))
masks = shapes.flatmap(lambda shape: arrays(bool, shape))


@given(masks)
def test_any_mask_survives_the_round_trip(mask):
    text = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(text, *mask.shape), mask)
    assert encode_mask(decode_mask(text, *mask.shape)) == text


def test_a_mask_of_full_size_survives_the_round_trip():
    rng = np.random.default_rng(0)
    mask = np.kron(rng.random((64, 64)) < 0.5, np.ones((16, 16), dtype=bool))
    mask[-1, -1] = True
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 6)), max_size=4), masks)
def test_dice_of_overlapping_runs_equals_set_arithmetic(true_runs, mask):
    runs = parse_runs(encode_mask(mask))[0]
    true_runs = np.array([(start, start + length) for start, length in true_runs], dtype=int).reshape(-1, 2)
    first = {pixel for start, end in true_runs for pixel in range(start, end)}
    second = {int(pixel) for pixel in np.flatnonzero(mask.ravel(order="F"))}
    expected = Fraction(2 * len(first & second), len(first) + len(second)) if first or second else 1
    assert dice(true_runs, runs) == pytest.approx(float(expected)) == dice(runs, true_runs)


@given(shapes.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))))
def test_dice_equals_that_of_the_masks(pair):
    first, second = pair
    runs = [parse_runs(encode_mask(mask))[0] for mask in pair]
    assert dice(*runs) == pytest.approx(overlap(first, second)[0])
    better = parse_runs(encode_mask(second & first))[0]
    assert dice(runs[0], better) >= dice(*runs) - 1e-12 or not first.any()


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        ("", ["empty cell; an image without a pneumothorax has -1"]),
        ("nan", ["'nan' is not a whole number of pixels"]),
        ("0 1.5", ["'1.5' is not a whole number"]),
        ("0 1_0", ["'1_0' is not a whole number"]),
        ("0 12345678901", ["'12345678901' is not a whole number"]),
        ("0 4 2", ["3 numbers are not pairs (gap run)"]),
        ("-1 -1", ["run 1, -1 -1, begins before", "run 1, -1 -1, has no pixel"]),
        ("5 3 -2 4", ["run 2, -2 4, begins before the previous run ends: runs overlap or are not sorted"]),
        ("5 3 -8 2 -1 1", ["run 2 (and 1 more), -8 2, begins before the previous run ends"]),
        ("5 0", ["run 1, 5 0, has no pixel"]),
        (f"{LAST} 2", [f"run 1, {LAST} 2, reaches beyond the 1048576 pixels of the image"]),
        ("0 10 600000 10 600000 10", ["run 3, 600000 10, reaches beyond the 1048576 pixels"]),
        ("0 4,", ["the row has 3 cells, but must have 2"]),
    ],
)
def test_every_fault_of_a_row_is_named(tmp_path, bad, problems):
    sample = write(tmp_path / "sample.csv", [("a", "-1"), ("b", "-1"), ("c", "-1"), ("c", "-1")])
    submission = write(tmp_path / "submission.csv", [("a", f"{LAST} 1"), ("b", bad), ("c", "0 5 0 3")])
    faults = SIIM_ACR.validate_file(submission, sample)
    assert [(fault.row, fault.id) for fault in faults] == [(3, "b")] * len(problems)
    assert all(fault.problem.startswith(problem) for fault, problem in zip(faults, problems, strict=True))


def test_bad_run_lengths_are_errors_elsewhere(tmp_path):
    with pytest.raises(MaskError, match="beyond the 16 pixels"):
        decode_mask("14 3", 4, 4)
    path = write(tmp_path / "train-rle.csv", [("a", "-1"), ("b", " 5 3 -2 4")], " EncodedPixels")
    with pytest.raises(ScoringError, match=r"train-rle.csv, row 3 \(b\): run 2, -2 4, begins before"):
        read_truth(path)
    with pytest.raises(ScoringError, match="1 ids are only in the truth or only in the submission, such as 'b'"):
        metric({"a": NO_RUNS, "b": NO_RUNS}, {"a": NO_RUNS})


@pytest.mark.real_data
def test_real_run_lengths_and_the_share_of_empty_masks(real_data, tmp_path):
    folder = real_data / "competitions"
    table = pd.read_csv(folder / "siimacr_rle_positive_part.csv", skipinitialspace=True)
    for text in table.iloc[:200, 1]:
        assert encode_mask(decode_mask(text)) == text.strip()
    # Runs go down the columns: from the start of one to that of the next there is about one column of 1,024 pixels.
    steps = np.concatenate([np.diff(parse_runs(text)[0][:, 0]) for text in table.iloc[:, 1]])
    assert np.mean(abs(steps - 1024) < 50) > 0.9
    labels = pd.read_csv(folder / "siimacr_2nd_stage_folds.csv")
    one_run = np.array([[0, 9]])
    truth = {name: one_run[:label] for name, label in zip(labels["fname"], labels["exist_labels"], strict=True)}
    assert metric(truth, dict.fromkeys(truth, NO_RUNS))["score"] == pytest.approx((12047 - 2669) / 12047)
    for name, rows in (("siimacr_stage_2_sample_submission.csv", 3205), ("siimacr_new_sample_submission.csv", 1372)):
        assert SIIM_ACR.write_baseline(folder / name, tmp_path / "baseline.csv") == rows
        assert SIIM_ACR.validate_file(tmp_path / "baseline.csv", folder / name) == []


def maps_of(pixels):
    """Return predictions whose maps are `pixels` (image_id -> grey levels)."""
    rows = [(name, "pneumothorax", encode_grey(each)) for name, each in pixels.items()]
    masks = pd.DataFrame(rows, columns=["image_id", "finding", "map"])
    return SimpleNamespace(masks=masks)


def test_the_published_thresholds_are_tried_and_none_whose_bottom_is_above_its_top():
    """The 1st place's two triplets, of which the first is the default."""
    names, values = SiimAcrSettings.GRIDS["mask"]
    assert names == ("top", "least_area", "bottom") and {(0.75, 2000, 0.3), (0.7, 600, 0.3)} <= set(values)
    assert all(bottom <= top for top, _, bottom in values) and (0.3, 600, 0.3) in values
    assert SiimAcrSettings() == SiimAcrSettings(top=0.75, least_area=2000, bottom=0.3)


def test_a_triplet_decides_on_the_mask():
    level = np.zeros((1024, 1024), np.uint8)
    level[10:30, 50:80] = 200  # 600 pixels above 0.75 = 191.25
    level[30:40, 50:80] = 77  # 300 pixels above 0.3 = 76.5
    level[40:50, 50:80] = 76
    merged = maps_of({"a": level})
    for least_area, rows in ((600, 30), (601, 0)):
        (runs,) = decide(merged, SiimAcrSettings(least_area=least_area)).values()
        assert decode_mask(encode_runs(runs)).sum() == rows * 30
        assert not rows or decode_mask(encode_runs(runs))[10:40, 50:80].all()
    assert fill(["b", "a"], {"a": np.array([[3, 5], [9, 10]])}) == ([["b", "-1"], ["a", "3 2 4 1"]], ["b"])


def test_a_map_is_averaged_if_it_is_reduced_and_interpolated_if_it_is_enlarged():
    reduced, enlarged = np.zeros((3072, 1024), np.uint8), np.zeros((512, 1024), np.uint8)
    reduced[1::3] = 255  # a third of the rows: 85
    enlarged[:256] = 255  # the rows 511 and 512 are at 3/4 and 1/4 between 255 and 0: 191 and 64
    merged = maps_of({"reduced": reduced, "enlarged": enlarged})
    for bottom, rows in ((0.2, (1024, 513)), (0.3, (1024, 512)), (0.4, (0, 512))):
        decided = decide(merged, SiimAcrSettings(top=bottom, least_area=1, bottom=bottom))
        assert [draw_runs(runs).sum() for runs in decided.values()] == [1024 * count for count in rows]


@pytest.fixture(scope="module")
def blurred():
    """Truth of six images, two of them empty, and of one without a prediction; maps of several sizes; their comparison."""
    rng, truth, pixels = np.random.default_rng(0), {}, {}
    for number, side in enumerate((1024, 512, 1024, 300, 1500, 64)):
        mask = np.zeros((1024, 1024), np.uint8)
        if number not in (2, 3):
            cv2.ellipse(mask, (300 + 60 * number, 400), (60 + 10 * number, 90), 20, 0, 360, 255, -1)
        level = cv2.GaussianBlur(cv2.resize(mask, (side, side)), (0, 0), side / 40).astype(float)
        truth[f"i{number}"] = runs_of(mask)
        pixels[f"i{number}"] = (0.8 * level + rng.integers(0, 60, (side, side))).clip(0, 255).astype(np.uint8)
    truth["unseen"] = runs_of(mask)
    merged = maps_of(pixels)
    return truth, merged, SimpleNamespace(masks=compare(truth, merged.masks))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([0, 0.2, 0.3, 0.5, 0.75, 1]), st.integers(0, 40_000), st.sampled_from([0, 0.1, 0.2, 0.3, 0.6, 1]))
def test_the_judged_score_is_that_of_the_decided_masks(blurred, top, least_area, bottom):
    truth, merged, compared = blurred
    chosen = SiimAcrSettings(top=top, least_area=least_area, bottom=bottom)
    decided = decide(merged, chosen)
    expected = metric(truth, {name: NO_RUNS for name in truth} | decided)["score"]
    assert judge(truth, compared, chosen) == pytest.approx(expected, abs=1e-12)
    part = {name: truth[name] for name in ("i1", "i2")}
    expected = metric(part, {name: runs for name, runs in decided.items() if name in part})["score"]
    assert judge(part, compared, chosen) == pytest.approx(expected, abs=1e-12)


def test_tuning_judges_the_masks_of_any_weights_and_forgets_old_maps(tmp_path):
    rng, rows, masks = np.random.default_rng(0), [], MaskStore(tmp_path)
    ids = ["a", "b", "c", "d"]
    for number, image_id in enumerate(ids):
        codes = np.zeros((64, 64), np.uint8)
        codes[20:40, 20:50] = MASK_CODES["pneumothorax"] * (number < 2)
        masks.add({image_id: codes})
        for model in "xy":
            level = 120 * (codes > 0) + rng.integers(0, 130, codes.shape)
            rows.append((image_id, model, number % 2, "pneumothorax", encode_grey(level.astype(np.uint8))))
    maps = pd.DataFrame(rows, columns=["image_id", "model", "fold", "finding", "map"])
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "rows": 64, "columns": 64})
    tables = {"images": images, "labels": pd.DataFrame({"id": ids}), "boxes": empty_table("boxes")}
    tables["folds"] = pd.DataFrame({"id": ids, "fold": [0, 1, 0, 1]})
    predictions = ModelPredictions.of(mask_maps=maps)
    tuned = Judge(SIIM_ACR, predictions, tables, masks)
    scores = set()
    for weight in (0.0, 0.5, 1.0, 2.0, 3.0, 0.0):
        chosen = SiimAcrSettings(model_weights={"x": weight}, top=0.6, least_area=100, bottom=0.5)
        decided = fuse(predictions, images, chosen, SIIM_ACR)
        expected = metric(tuned.everything.truth, decided)["score"]
        assert tuned.score(chosen, tuned.everything) == pytest.approx(expected, abs=1e-12)
        part, of_part = tuned.part(np.array([True, False, False, True])), {name: decided[name] for name in "ad"}
        assert tuned.score(chosen, part) == pytest.approx(metric(part.truth, of_part)["score"])
        scores.add(expected)
    assert len(scores) > 2 and len(tuned.averaged) == KEPT_FUSIONS


def test_the_truth_of_prepared_images_is_their_mask_on_the_grid(tmp_path):
    masks = MaskStore(tmp_path)
    codes = np.zeros((256, 256), np.uint8)
    codes[64:128, 32:96] = MASK_CODES["pneumothorax"]
    masks.add({"a": codes, "b": np.zeros((1024, 1024), np.uint8)})
    truth = truth_of(pd.DataFrame({"image_id": ["b", "a", "unknown"]}), None, None, masks)
    assert list(truth) == ["b", "a"] and not len(truth["b"])
    drawn = draw_runs(truth["a"])
    assert drawn[260:508, 132:380].all() and not drawn[:256].any() and abs(drawn.sum() - 256**2) < 8
    with pytest.raises(MaskError, match="the prepared run has no masks"):
        truth_of(pd.DataFrame({"image_id": ["a"]}), None, None, None)
