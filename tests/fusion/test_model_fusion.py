import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.fusion_settings import CONFIDENCES, METHODS
from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.errors import SettingsError
from kitlib.fusion import model_fusion
from kitlib.fusion.box_fusion import merge_boxes
from kitlib.fusion.model_fusion import (
    BoxLists,
    ModelPredictions,
    fuse_scores,
    read_settings,
    seen_images,
    write_settings,
)
from kitlib.scoring.submission_csv import PRIORS
from kitlib.settings import from_dict
from kitlib.tables import BOX, FINDINGS_SEPARATOR
from tests.fused_tables import fuse, fuse_boxes

PLAIN = SiimFusion()
IMAGES = pd.DataFrame({"image_id": ["a", "b", "c"], "study_id": ["s", "s", "t"], "rows": 1000, "columns": 2000})


def study_scores(*rows):
    return pd.DataFrame(rows, columns=["study_id", "model", "fold", *STUDY_CLASSES])


def image_scores(*rows):
    return pd.DataFrame(rows, columns=["image_id", "model", "fold", "none"])


def detections(*rows):
    return pd.DataFrame(rows, columns=["image_id", "model", "fold", "score", *BOX])


ONE = (100.0, 100.0, 500.0, 900.0)
FAR = (1500.0, 100.0, 1900.0, 900.0)


def test_models_have_equal_weight_whatever_their_number_of_folds():
    scores = image_scores(("a", "m", 0, 0.2), ("a", "m", 1, 0.4), ("a", "n", 0, 0.9), ("b", "n", 0, 0.5))
    assert fuse_scores(scores, "image_id", PLAIN).set_index("image_id")["none"].to_dict() == pytest.approx(
        {"a": (0.3 + 0.9) / 2, "b": 0.5}
    )
    heavy = SiimFusion(model_weights={"m": 3.0})
    assert fuse_scores(scores, "image_id", heavy)["none"].tolist() == pytest.approx([(3 * 0.3 + 0.9) / 4, 0.5])
    without = SiimFusion(model_weights={"n": 0.0})
    assert fuse_scores(scores, "image_id", without).to_numpy().tolist() == [["a", pytest.approx(0.3)]]


def test_a_nan_score_is_ignored():
    scores = study_scores(("s", "m", 0, 0.1, 0.2, 0.3, 0.4), ("s", "n", 0, float("nan"), 0.2, 0.3, 0.4))
    assert fuse_scores(scores, "study_id", PLAIN).to_numpy().tolist() == [["s", 0.1, 0.2, 0.3, 0.4]]


def test_a_single_list_is_unchanged():
    table = detections(("a", "m", 0, 0.9, *ONE), ("a", "m", 0, 0.4, 110.0, 100.0, 500.0, 900.0))
    fused = fuse_boxes(table, IMAGES, PLAIN)
    pd.testing.assert_frame_equal(fused.drop(columns="finding"), table[["image_id", "score", *BOX]])
    assert fused["finding"].tolist() == ["opacity", "opacity"]


def test_boxes_of_two_models_are_averaged_and_the_score_of_a_lone_box_is_halved():
    moved = (120.0, 100.0, 520.0, 900.0)
    fused = fuse_boxes(
        detections(("a", "m", 0, 0.6, *ONE), ("a", "n", 0, 0.2, *moved), ("a", "n", 0, 0.8, *FAR)), IMAGES, PLAIN
    )
    fused = fused.sort_values("xmin", ignore_index=True)
    # Weighted box fusion: sides weighted by score, (3 * 100 + 120) / 4; scores (0.6 + 0.2) / 2; 0.8 * 1 / 2 (T/M).
    assert fused.loc[0, list(BOX)].tolist() == pytest.approx([105, 100, 505, 900], abs=1e-3)
    assert fused["score"].tolist() == pytest.approx([0.4, 0.4])


def test_a_fold_without_boxes_counts():
    table = detections(*[("a", "m", fold, 0.6, *ONE) for fold in range(2)], ("b", "m", 0, 0.6, *ONE))
    fused = fuse_boxes(table, IMAGES, PLAIN).set_index("image_id")["score"]
    # Fold 1 has no box on `b`, so only half of the lists agree.
    assert fused.to_dict() == pytest.approx({"a": 0.6, "b": 0.3})


def test_coverage_ignores_models_that_never_predicted_the_image():
    table = detections(
        ("a", "m", 0, 0.6, *ONE), ("a", "n", 0, 0.6, *ONE), ("b", "m", 0, 0.6, *ONE), ("c", "m", 0, 0.6, *ONE)
    )
    coverage = pd.DataFrame(
        [("a", "m", 0), ("b", "m", 0), ("c", "m", 0), ("a", "n", 0), ("b", "n", 0)], columns=["image_id", "model", "fold"]
    )
    fused = fuse_boxes(table, IMAGES, PLAIN, coverage).set_index("image_id")["score"].to_dict()
    # `n` predicted `b` without finding a box; it never predicted `c`.
    assert fused == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.6})


def test_folds_share_their_models_weight():
    # `m` with two folds and `n` with one have equal weight: a box of `n` alone keeps half its score.
    table = detections(("a", "m", 0, 0.6, *ONE), ("a", "m", 1, 0.6, *ONE), ("a", "n", 0, 0.8, *FAR))
    fused = fuse_boxes(table, IMAGES, PLAIN).sort_values("xmin")["score"].tolist()
    # ensemble-boxes multiplies by min(lists, boxes of the cluster): (0.3 + 0.3) / 2 * 2 / 2 and 0.8 * 1 / 2.
    assert fused == pytest.approx([0.3, 0.4])


def test_a_last_suppression_drops_the_less_confident_of_two_fused_boxes():
    near = (200.0, 100.0, 600.0, 500.0)  # IoU with (100, 100, 500, 500): 300 / 500 = 0.6 of the width
    table = detections(("a", "m", 0, 0.8, 100, 100, 500, 500), ("a", "n", 0, 0.6, *near))
    count = {iou: len(fuse_boxes(table, IMAGES, replace(PLAIN, box_iou=0.7, final_nms_iou=iou))) for iou in (1.0, 0.7, 0.5)}
    assert count == {1.0: 2, 0.7: 2, 0.5: 1}
    kept = fuse_boxes(table, IMAGES, replace(PLAIN, box_iou=0.7, final_nms_iou=0.5))
    assert kept["score"].tolist() == pytest.approx([0.4]) and kept["xmin"].tolist() == pytest.approx([100])


def test_boxes_are_clipped_to_the_image_and_tiny_scores_dropped():
    table = detections(
        ("a", "m", 0, 0.5, -50, -50, 3000, 500), ("a", "m", 0, 0.5, 2100, 0, 2200, 50), ("a", "m", 0, 1e-5, *ONE)
    )
    assert fuse_boxes(table, IMAGES, PLAIN)[list(BOX)].to_numpy().tolist() == [[0, 0, 2000, 500]]


@pytest.mark.parametrize("images", [IMAGES.assign(rows=0), IMAGES.iloc[1:]])
def test_an_image_without_a_size_is_named(images):
    with pytest.raises(ValueError, match="image 'a' has detections but no size"):
        fuse_boxes(detections(("a", "m", 0, 0.5, *ONE)), images, PLAIN)


unit_box = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(5, 40), st.integers(5, 40), st.integers(1, 100))
unit_boxes = st.lists(unit_box.map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3], b[4])), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(unit_boxes, min_size=1, max_size=3),
    st.sampled_from(METHODS),
    st.sampled_from(CONFIDENCES),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
)
def test_merged_boxes_are_valid_and_inside_the_hull_of_the_inputs(lists, method, confidence, weights):
    boxes = [np.array([row[:4] for row in rows], float).reshape(-1, 4) / 100 for rows in lists]
    scores = [np.array([row[4] for row in rows], float) / 100 for rows in lists]
    before = [box.copy() for box in boxes], [score.copy() for score in scores]
    merged, score = merge_boxes(boxes, scores, np.array(weights[: len(lists) + 1]), method, confidence=confidence)
    assert merged.shape == (len(score), 4) and merged.dtype == score.dtype == float
    assert ((score > 0) & (score <= 1)).all()
    assert (merged[:, :2] < merged[:, 2:]).all()
    every = np.concatenate(boxes)
    if len(every):
        assert merged.min(initial=1) >= every.min() - 1e-6 and merged.max(initial=0) <= every.max() + 1e-6
        assert 1 <= len(merged) <= len(every)
    for left, right in zip(boxes + scores, before[0] + before[1], strict=True):
        np.testing.assert_array_equal(left, right)


def test_soft_nms_decays_the_overlapping_box_alone():
    boxes = np.array([[0.0, 0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]), np.array([[0.0, 0, 0.5, 0.4]])
    merged, score = merge_boxes(boxes, [np.array([0.5, 0.7]), np.array([0.9])], [1.0, 1.0], "soft_nms", 0.5)
    # IoU of the first and the last is 0.8; linear soft-NMS: 0.5 * (1 - 0.8).
    assert dict(zip(map(tuple, merged), score, strict=True)) == pytest.approx(
        {(0, 0, 0.5, 0.4): 0.9, (0.6, 0.6, 0.9, 0.9): 0.7, (0, 0, 0.5, 0.5): 0.1}
    )
    _, score = merge_boxes(boxes, [np.array([0.5, 0.7]), np.array([0.9])], [1.0, 1.0], "soft_nms", 0.5, min_score=0.15)
    assert sorted(score) == pytest.approx([0.7, 0.9])


@pytest.mark.parametrize(
    ("box", "score", "weights"),
    [
        ([[0, 0, 300, 400]], [0.5], [1]),
        ([[0.5, 0, 0.1, 1]], [0.5], [1]),
        ([[0, 0, float("nan"), 1]], [0.5], [1]),
        ([[0, 0, 1, 1]], [0.5, 0.5], [1]),
        ([[0, 0, 1, 1]], [1.5], [1]),
        ([[0, 0, 1, 1]], [float("nan")], [1]),
        ([[0, 0, 1, 1]], [0.5], []),
    ],
)
def test_input_that_ensemble_boxes_would_clamp_or_exit_on_is_an_error(box, score, weights):
    with pytest.raises(ValueError):
        merge_boxes([np.array(box, float)], [np.array(score)], np.array(weights, float))


SCORES = (
    study_scores(("s", "m", 0, 0.5, 0.3, 0.1, 0.1), ("t", "m", 0, 0.1, 0.5, 0.3, 0.1)),
    image_scores(("a", "m", 0, 0.6), ("b", "m", 0, 0.2), ("c", "m", 0, 0.1)),
    detections(("a", "d", 0, 0.4, *ONE), ("a", "d", 0, 0.5, *FAR), ("c", "d", 0, 0.9, *ONE)),
)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [0.6, 0.2, 0.1]),
        ({"none_classifier": 0, "none_negative": 1}, [0.5, 0.5, 0.1]),
        ({"none_classifier": 0, "none_no_box": 1}, [0.5, 1.0, 0.1]),
        ({"none_classifier": 0, "none_product": 1}, [0.6 * 0.5, 1.0, 0.1]),
        # 3rd place: 0.7 cls_none + 0.3 (1 - max box).
        ({"none_classifier": 0.7, "none_no_box": 0.3}, [0.7 * 0.6 + 0.3 * 0.5, 0.7 * 0.2 + 0.3, 0.1]),
        # 11th place: half none, half negative; only the ratio counts.
        ({"none_classifier": 2, "none_negative": 2}, [0.55, 0.35, 0.1]),
    ],
)
def test_published_formulas_for_none(weights, expected):
    fused = fuse(*SCORES, IMAGES, SiimFusion(**weights))
    assert fused.nones["none"].tolist() == pytest.approx(expected)


def test_published_rescoring():
    fused = fuse(*SCORES, IMAGES, SiimFusion(opacity_power=0.4, negative_share=0.7))
    # 3rd place: box * (1 - none)^0.4. 11th place: negative = 0.7 negative + 0.3 none, of the study: mean of 0.6 and 0.2.
    assert sorted(fused.detections["score"]) == pytest.approx(sorted([0.4 * 0.4**0.4, 0.5 * 0.4**0.4, 0.9 * 0.9**0.4]))
    assert fused.studies.set_index("study_id")["negative"].to_dict() == pytest.approx({"s": 0.7 * 0.5 + 0.3 * 0.4, "t": 0.1})
    assert fused.studies["typical"].tolist() == [0.3, 0.5]


def test_missing_parts():
    nothing = fuse(None, None, None, IMAGES, PLAIN)
    assert nothing.studies["prior"].all() and nothing.nones["prior"].all() and nothing.detections.empty
    assert nothing.studies[list(STUDY_CLASSES)].iloc[0].to_dict() == pytest.approx({c: PRIORS[c] for c in STUDY_CLASSES})
    assert nothing.nones["none"].tolist() == [PRIORS["none"]] * 3
    no_detector = fuse(*SCORES[:2], None, IMAGES, SiimFusion(none_classifier=0.7, none_no_box=0.3))
    assert no_detector.nones["none"].tolist() == pytest.approx([0.6, 0.2, 0.1])
    no_classifier = fuse(None, None, SCORES[2], IMAGES, PLAIN)
    assert no_classifier.nones["none"].tolist() == pytest.approx([0.5, 1.0, 0.1])
    assert no_classifier.studies["prior"].all() and not no_classifier.nones["prior"].any()


def test_every_study_and_image_gets_its_row_once():
    part = fuse(SCORES[0].iloc[:1], SCORES[1].iloc[:1], SCORES[2].iloc[:0], IMAGES, PLAIN)
    assert part.studies["study_id"].tolist() == ["s", "t"] and part.studies["prior"].tolist() == [False, True]
    assert part.nones["image_id"].tolist() == ["a", "b", "c"]
    # `b` has its study's negative; `c` has nothing.
    assert part.nones["prior"].tolist() == [False, False, True]


def test_the_most_confident_boxes_of_each_list_are_merged():
    rows = [("a", model, 0, p, x, 0.0, x + 50, 50.0) for model in "mn" for p, x in ((0.2, 0.0), (0.9, 500.0), (0.5, 900.0))]
    fused = fuse_boxes(detections(*rows), IMAGES, SiimFusion(box_limit=2))
    assert sorted(fused["xmin"]) == pytest.approx([500, 900], abs=1e-3)


def test_nothing_is_suppressed_where_nothing_was_detected():
    fused = fuse_boxes(detections(("a", "m", 0, 0.0005, *ONE)), IMAGES, SiimFusion(final_nms_iou=0.1))
    assert fused.empty and fused.columns.tolist() == ["image_id", "finding", "score", *BOX]


def test_fused_boxes_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    table = detections(
        *[
            (image, model, 0, float(p), x, y, x + 300, y + 300)
            for image in "abc"
            for model in "mno"
            for p, x, y in zip(rng.random(5), rng.integers(0, 1600, 5), rng.integers(0, 600, 5), strict=True)
        ]
    )
    key = ["image_id", "score", *BOX]
    first = fuse_boxes(table, IMAGES, PLAIN).sort_values(key, ignore_index=True)
    other = fuse_boxes(table.sample(frac=1, random_state=1), IMAGES, PLAIN).sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(first, other)


def test_a_detector_without_any_box_still_halves_the_scores_of_the_others():
    coverage = pd.DataFrame([("a", "m", 0), ("a", "n", 0)], columns=["image_id", "model", "fold"])
    table = detections(("a", "m", 0, 0.6, *ONE))
    assert fuse_boxes(table, IMAGES, PLAIN, coverage)["score"].tolist() == pytest.approx([0.3])
    without = SiimFusion(model_weights={"n": 0.0})
    assert fuse_boxes(table, IMAGES, without, coverage)["score"].tolist() == [0.6]


def test_a_detector_lowers_the_scores_of_only_the_findings_that_it_predicts():
    table = detections(("a", "m", 0, 0.6, *ONE), ("a", "n", 0, 0.6, *ONE), ("a", "n", 0, 0.8, *FAR))
    coverage = pd.DataFrame([("a", "m", 0), ("a", "n", 0)], columns=["image_id", "model", "fold"])
    table = table.assign(finding=["Mass", "Mass", "Nodule"])

    def scores(findings, settings=PLAIN):
        predictions = ModelPredictions.of(detections=table, coverage=coverage.assign(findings=findings))
        fused = model_fusion.fuse_boxes(BoxLists.of(predictions.detections, IMAGES, predictions.coverage), settings)
        return fused.astype({"finding": str}).set_index("finding")["score"].to_dict()

    both = FINDINGS_SEPARATOR.join(("Mass", "Nodule"))
    assert scores(["Mass", both]) == pytest.approx({"Mass": 0.6, "Nodule": 0.8})
    assert scores([both, both]) == scores([None, both]) == pytest.approx({"Mass": 0.6, "Nodule": 0.4})
    # Odds of 4, doubled by an offset of log 2; with several findings, each has its own calibration.
    line = SiimFusion(calibration={"n: Nodule": (1.0, math.log(2)), "n": (1.0, 9.0)})
    assert scores(["Mass", both], line) == pytest.approx({"Mass": 0.6, "Nodule": 8 / 9})


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        (("x", "m", 0, 0.5, *ONE), IMAGES, "image 'x' has detections but no size in the table `images`"),
        (("a", "m", 0, 0.5, *ONE), IMAGES.assign(rows=[0, 9, 9]), "image 'a' has detections but no size"),
        (("a", "m", 0, float("nan"), *ONE), IMAGES, r"a detection in image a has no score \(NaN\)"),
    ],
)
def test_detections_without_a_size_or_a_score_are_refused(row, images, message):
    with pytest.raises(ValueError, match=message):
        fuse_boxes(detections(("b", "m", 0, 0.5, *ONE), row), images, PLAIN)


def test_only_images_that_a_detector_with_a_nonzero_weight_predicted_are_seen():
    table = detections(("a", "m", 0, 0.6, *ONE))
    coverage = pd.DataFrame([("a", "m", 0), ("b", "m", 0), ("c", "n", 0)], columns=["image_id", "model", "fold"])
    assert seen_images(table, IMAGES, PLAIN).tolist() == [True, True, True]
    assert seen_images(table, IMAGES, PLAIN, coverage).tolist() == [True, True, True]
    assert seen_images(table, IMAGES, SiimFusion(model_weights={"n": 0.0}), coverage).tolist() == [True, True, False]
    assert seen_images(None, IMAGES, PLAIN, coverage.iloc[:0]).tolist() == [False, False, False]
    # An image that no detector has predicted gets the placeholder prediction, not a `none` from missing boxes.
    fused = fuse(None, None, table, IMAGES, PLAIN, coverage[coverage["model"] == "m"])
    assert fused.nones["none"].tolist() == pytest.approx([0.4, 1.0, PRIORS["none"]])
    assert fused.nones["prior"].tolist() == [False, False, True]
    assert fused.nones["seen"].tolist() == [True, True, False]


def test_calibrated_scores_are_fused_on_one_scale():
    # logit(0.9) = log 9: the slope 0.5 turns it into odds of 3, the offset log(2) into 6; logit(0.5) = 0 gives odds of 2.
    line = SiimFusion(calibration={"m": (0.5, math.log(2))})
    table = detections(("a", "m", 0, 0.9, *ONE), ("a", "m", 0, 0.5, *FAR), ("b", "m", 0, 0.0005, *ONE))
    alone = fuse_boxes(table, IMAGES, line)
    assert alone["image_id"].tolist() == ["a", "a"]  # box_min_score applies to the uncalibrated score
    assert alone["score"].tolist() == pytest.approx([6 / 7, 2 / 3])
    both = fuse_boxes(pd.concat([table, detections(("a", "n", 0, 0.5, *ONE))]), IMAGES, line).sort_values("xmin")
    assert both["score"].tolist() == pytest.approx([(6 / 7 + 0.5) / 2, (2 / 3) / 2])


def test_settings_survive_json(tmp_path):
    chosen = SiimFusion(model_weights={"m": 2.0, "n": 0.5}, box_method="nmw", none_no_box=0.3)
    chosen = replace(chosen, calibration={"m": (0.7, -1.5)})
    write_settings(chosen, tmp_path / "fusion.json")
    assert read_settings(tmp_path / "fusion.json") == chosen
    other = VINBIGDATA.settings(box_iou=0.5)
    write_settings(other, tmp_path / "other.json", VINBIGDATA)
    assert read_settings(tmp_path / "other.json", VINBIGDATA) == other
    for name, competition in (("fusion", {"competition": VINBIGDATA}), ("other", {})):
        with pytest.raises(SettingsError, match=rf"{name}\.json has settings for '\S+', but the submission is to '\S+';"):
            read_settings(tmp_path / f"{name}.json", **competition)
    assert from_dict(SiimFusion, json.loads(json.dumps(asdict(PLAIN)))) == PLAIN


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"colour": 1}', b"[" * 100_000])
def test_a_file_without_settings_is_refused(tmp_path, content):
    (tmp_path / "fusion.json").write_bytes(content)
    with pytest.raises(SettingsError):
        read_settings(tmp_path / "fusion.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"box_method": "median"},
        {"box_confidence": "mean"},
        {"box_iou": 1.5},
        {"box_limit": 0},
        {"opacity_power": -1.0},
        {"none_classifier": 0.0},
        {"model_weights": {"m": -1}},
        {"model_weights": {"m": "heavy"}},
        {"calibration": {"m": (0.0, 1.0)}},
        {"calibration": {"m": (1.0, float("inf"))}},
        {"calibration": {"m": 2.0}},
        {"calibration": {"m": ("1", 0)}},
        {"iou": 0.5},
    ],
)
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(SettingsError):
        from_dict(SiimFusion, wrong)
    if "iou" not in wrong:
        with pytest.raises(SettingsError):
            replace(PLAIN, **wrong)
