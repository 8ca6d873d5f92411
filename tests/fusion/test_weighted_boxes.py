"""Weighted boxes fusion against ensemble-boxes, to the last digit, also with equal scores and equal boxes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ensemble_boxes import weighted_boxes_fusion

from kitlib.competitions.fusion_settings import CONFIDENCES
from kitlib.fusion import weighted_boxes
from kitlib.fusion.weighted_boxes import ImageLists, merge_weighted


def random_lists(rng, images, lists, boxes):
    """Return ImageLists whose scores and corners are often equal, and for each image the arguments of ensemble-boxes."""
    arguments, parts = [], []
    for _ in range(images):
        count, grid = int(rng.integers(2, lists + 1)), int(rng.choice([4, 8, 30, 1000]))
        weights = rng.choice([0.5, 1, 2, 1 / 3, 0.1], count) if rng.random() < 0.7 else rng.uniform(0.01, 1, count)
        image_boxes, scores = [], []
        for _ in range(int(rng.integers(0, count + 1))):
            number = int(rng.integers(0, boxes + 1))
            low, side = rng.integers(0, grid - 1, (number, 2)), rng.integers(1, grid, (number, 2))
            image_boxes.append(np.hstack([low, np.minimum(low + side, grid)]) / grid)
            scores.append(rng.integers(1, 11, number) / 10 if rng.random() < 0.5 else rng.uniform(1e-6, 1, number))
        image_boxes += [np.empty((0, 4))] * (count - len(scores))
        scores += [np.empty(0)] * (count - len(scores))
        arguments.append((image_boxes, scores, [np.zeros(len(score)) for score in scores], weights))
        of_list = np.repeat(np.arange(count), [len(score) for score in scores])
        parts.append((np.concatenate(image_boxes), np.concatenate(scores), of_list, weights))
    corners, score, list_of, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    ends, list_ends = (np.cumsum([len(part[k]) for part in parts]) for k in (1, 3))
    return ImageLists(corners, score, ends, list_of, weights, list_ends), arguments


def differing_images(seed, images, lists=4, boxes=12):
    """Return in how many of `images` random images for each kind of confidence `merge_weighted` differs."""
    rng, differing = np.random.default_rng(seed), 0
    for confidence in CONFIDENCES:
        merging, arguments = random_lists(rng, images, lists, boxes)
        iou = float(rng.choice([0.3, 0.45, 0.5, 0.55, 0.6, 0.7]))
        corners, score, image = merge_weighted(merging, iou, confidence)
        for number, (image_boxes, scores, labels, weights) in enumerate(arguments):
            expected = weighted_boxes_fusion(image_boxes, scores, labels, weights, iou_thr=iou, conf_type=confidence)
            found = corners[image == number], score[image == number]
            differing += not all(np.array_equal(*pair) for pair in zip(found, expected[:2], strict=True))
    return differing


@pytest.mark.parametrize(("lists", "boxes"), [(4, 12), (20, 3), (400, 1)])
def test_merged_boxes_equal_those_of_ensemble_boxes(monkeypatch, lists, boxes):
    """From 8 lists on, NumPy adds weights in another order; above 128 lists, ensemble-boxes itself merges."""
    monkeypatch.setattr(weighted_boxes, "COMPILES", True)
    monkeypatch.setattr(weighted_boxes, "FEW_BOXES", -1)
    merged = []
    original = weighted_boxes._merge
    monkeypatch.setattr(weighted_boxes, "_merge", lambda *arguments: merged.append(original(*arguments)))
    assert differing_images(0, 12, lists, boxes) == 0
    assert bool(merged) == (lists <= weighted_boxes.MOST_LISTS)


def test_boxes_without_an_area_are_dropped():
    whole, flat, thin = [0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.6, 0.2], [0.1, 0.1, 0.1, 0.5]
    corners, ends = np.array([thin, whole, whole, flat]), np.array([2, 4])
    lists = ImageLists(corners, np.array([0.9, 0.8, 0.6, 0.7]), ends, np.array([0, 1, 0, 1]), np.ones(4), ends)
    boxes, score, image = merge_weighted(lists, 0.5, "avg")
    # Each image keeps one box, which one of its two lists has.
    np.testing.assert_allclose(boxes, [whole, whole], rtol=1e-6)
    assert score == pytest.approx([0.4, 0.3]) and image.tolist() == [0, 1]


def test_compiled_merging_equals_ensemble_boxes(tmp_path):
    program = (
        "from kitlib.fusion import weighted_boxes; weighted_boxes.FEW_BOXES = -1; "
        "from tests.fusion.test_weighted_boxes import differing_images; "
        "print(sum(differing_images(*case) for case in ((1, 150), (2, 50, 20, 4))), len(weighted_boxes._merge.signatures))"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "0", "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["0", "1"], result.stderr


def test_ensemble_boxes_merges_if_there_are_few_boxes_or_the_compiler_fails(monkeypatch, caplog):
    merging, _ = random_lists(np.random.default_rng(5), 8, 4, 6)
    monkeypatch.setattr(weighted_boxes, "COMPILES", True)
    monkeypatch.setattr(weighted_boxes, "FEW_BOXES", -1)
    expected = merge_weighted(merging, 0.5, "avg")

    def fail(*arguments):
        raise RuntimeError("no LLVM")

    monkeypatch.setattr(weighted_boxes, "_merge", fail)
    fallback = merge_weighted(merging, 0.5, "avg")
    assert "numba cannot compile the merging of boxes (RuntimeError: no LLVM)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(weighted_boxes, "_merged_sizes", [])
    monkeypatch.setattr(weighted_boxes, "FEW_BOXES", 2 * len(merging.score))
    several = [merge_weighted(merging, 0.5, "avg") for _ in range(2)]
    assert not caplog.text
    several.append(merge_weighted(merging, 0.5, "avg"))  # now there are enough boxes in all
    assert "numba cannot compile" in caplog.text
    for found in (fallback, *several):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
