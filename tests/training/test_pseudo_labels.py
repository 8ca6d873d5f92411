"""Pseudo-labels: which models may predict an image, fused labels and boxes, and images that are left out."""

import dataclasses
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.bundle import save_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.inference.predict import study_and_image_scores
from kitlib.models.classifier import OUTPUTS, StudyClassifier
from kitlib.models.families import family_of
from kitlib.settings import override
from kitlib.tables import BOX, empty_table
from kitlib.training.pseudo_labels import Predictions, duplicate_groups, predict_unseen, pseudo_labels, seen_by
from tests.fused_tables import fuse
from tests.small_lungs import stored_lungs
from tests.small_xrays import RECIPE, SmallXrays
from tests.training.test_detector import FASTER_RCNN
from tests.training.test_findings import RECIPE as FINDINGS

MODELS = pd.DataFrame([("c", 0), ("c", 1), ("d", 0)], columns=["model", "fold"])
PLAIN = SiimFusion()


def images_of(*rows):
    """Return an `images` table from rows of image_id, study_id and patient_id."""
    table = pd.DataFrame(rows, columns=["image_id", "study_id", "patient_id"])
    return table.assign(path="", rows=1000, columns=1000, source="test", view="")


TRAINED = images_of(("t0", "T0", "P0"), ("t1", "T1", "P1"), ("t2", "T2", "P2"))
FOLDS = pd.DataFrame({"id": ["t0", "t1"], "fold": [0, 1]})  # t2 is in no fold: no model was trained on it


def barred(seen):
    return {(row.image_id, row.model, row.fold) for row in seen.itertuples()}


def test_a_model_has_seen_the_other_folds():
    # The model of fold 0 was trained on t1, that of fold 1 on t0.
    seen = barred(seen_by(TRAINED, TRAINED, FOLDS, MODELS))
    assert seen == {("t1", "c", 0), ("t1", "d", 0), ("t0", "c", 1)}


def test_patients_studies_and_near_duplicates_count_as_seen():
    images = images_of(
        ("same patient", "A", "P1"),
        ("same study", "T1", "Q"),
        ("copy", "B", "R"),
        ("its study", "B", "S"),
        ("new", "C", "T"),
    )
    groups = pd.DataFrame({"image_id": ["t1", "copy", "new", "t0"], "group": [7, 7, 8, 9]})
    seen = seen_by(images, TRAINED, FOLDS, MODELS, groups)
    assert set(seen["fold"]) == {0} and set(seen["image_id"]) == {"same patient", "same study", "copy", "its study"}
    assert len(seen) == 2 * 4  # two models of fold 0
    # Also if the copy is the only image that is like a training image.
    seen = seen_by(images[2:], TRAINED, FOLDS, MODELS, groups)
    assert set(seen["image_id"]) == {"copy", "its study"}


def test_extra_images_were_seen_in_every_fold():
    images = images_of(("x", "X", "PX"), ("y", "Y", "PX"), ("z", "Z", "PZ"))
    seen = seen_by(images, TRAINED, FOLDS, MODELS, extra=[images.head(1)])
    assert barred(seen) == {(name, *model) for name in "xy" for model in (("c", 0), ("c", 1), ("d", 0))}


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), min_size=2, max_size=12))
def test_a_model_may_predict_only_images_that_share_nothing_with_its_training_images(rows):
    """For any studies, patients and folds: an image that a model may predict shares none with its training images."""
    table = images_of(*[(f"i{n}", f"s{study}", f"p{patient}") for n, (study, patient, _) in enumerate(rows)])
    folds = pd.DataFrame({"id": table["image_id"], "fold": [fold for *_, fold in rows]})
    models = pd.DataFrame({"model": "m", "fold": [0, 1, 2]})
    seen = barred(seen_by(table, table, folds, models))
    for fold in range(3):
        trained = table[folds["fold"] != fold]
        for row in table.itertuples():
            shares = row.study_id in set(trained["study_id"]) or row.patient_id in set(trained["patient_id"])
            assert (row.image_id, "m", fold) in seen or not shares


def test_near_duplicates_are_found_across_two_caches():
    rng = np.random.default_rng(0)
    one, copy = (rng.integers(0, 255, (200, 200)).astype(np.uint8) for _ in range(2))
    copy[:] = np.clip(one * 0.9 + 10, 0, 255)

    class Cache:
        def __init__(self, **pixels):
            self.pixels = pixels

        def __contains__(self, image_id):
            return image_id in self.pixels

        def read(self, image_id):
            return type("Xray", (), {"pixels": self.pixels[image_id]})

    other = rng.integers(0, 255, (200, 200)).astype(np.uint8)
    mine = images_of(("mine", "s", "p")), Cache(mine=one)
    theirs = images_of(("theirs", "t", "q"), ("else", "u", "r")), Cache(theirs=copy, **{"else": other})
    groups = duplicate_groups([mine, theirs]).set_index("image_id")["group"]
    assert groups["mine"] == groups["theirs"] != groups["else"]
    with pytest.raises(ValueError, match="1 of 3 images are not in their cache; the first is 'mine'"):
        duplicate_groups([(mine[0], Cache()), theirs])


IMAGES = images_of(*[(name, name.upper(), f"p{name}") for name in "abcd"])
ONE, FAR = (100.0, 100.0, 500.0, 500.0), (600.0, 600.0, 900.0, 900.0)


def predictions(boxes=(), coverage=(("d", 0),), none=(0.2, 0.6)):
    """Return predictions: models c of folds 0 and 1 predict `none`, half of the rest as typical; detectors find `boxes`."""
    rows = [(name, "c", fold, p, (1 - p) / 2, (1 - p) / 4, (1 - p) / 4, p) for name in "abcd" for fold, p in enumerate(none)]
    probabilities = pd.DataFrame(rows, columns=["image_id", "model", "fold", *STUDY_CLASSES, "none"])
    looked = pd.DataFrame([(name, *model) for name in "abcd" for model in coverage], columns=["image_id", "model", "fold"])
    found = pd.DataFrame(boxes, columns=["image_id", "model", "fold", "score", *BOX])
    return Predictions(probabilities, found if len(found) else empty_table("detections"), looked)


def test_labels_are_means_over_models_that_have_not_seen_the_image():
    seen = pd.DataFrame([("a", "c", 0), ("b", "c", 1), ("c", "c", 0), ("c", "c", 1)], columns=["image_id", "model", "fold"])
    found = pseudo_labels(predictions(coverage=()), IMAGES, seen, PLAIN)
    # a is predicted by fold 1 alone, 0.6; b by fold 0 alone, 0.2; d by both, 0.4; c by neither.
    assert found.images["image_id"].tolist() == ["a", "b", "d"]
    assert found.images["none"].tolist() == pytest.approx([0.6, 0.2, 0.4])
    labels = found.labels.set_index("id")
    assert labels["negative"].to_dict() == pytest.approx({"A": 0.6, "B": 0.2, "D": 0.4})
    assert labels["typical"].to_dict() == pytest.approx({"A": 0.2, "B": 0.4, "D": 0.3})
    assert found.left_out.to_numpy().tolist() == [
        ["c", "every model that could predict it was trained on it or on a similar image"]
    ]
    # No detector has predicted any of them, so nothing is known about boxes.
    assert found.images["unsure"].all() and found.boxes.empty


def test_confident_boxes_are_kept_and_unsure_images_marked():
    boxes = [("a", "d", 0, 0.8, *ONE), ("a", "d", 0, 0.35, *FAR), ("a", "d", 0, 0.2, 0.0, 0.0, 50.0, 50.0)]
    boxes += [("b", "d", 0, 0.45, *ONE), ("c", "d", 0, 0.05, *ONE)]
    found = pseudo_labels(predictions(boxes), IMAGES, empty_table("coverage"), PLAIN, low=0.1, kept=0.3, high=0.5)
    # Boxes of other findings are not merged with them, and keep their finding.
    found_boxes = [(*box[:-4], *ONE, name) for box in boxes[:1] for name in ("Effusion", "Mass")]
    columns = ["image_id", "model", "fold", "score", *BOX, "finding"]
    several = dataclasses.replace(predictions(boxes), detections=pd.DataFrame(found_boxes, columns=columns))
    labelled = pseudo_labels(several, IMAGES, empty_table("coverage"), PLAIN).boxes
    assert labelled[["image_id", "finding", "score"]].to_numpy().tolist() == [["a", "Effusion", 0.8], ["a", "Mass", 0.8]]
    # The best box of b scores between low and high; the best of c scores below low; d has none.
    assert found.images["unsure"].tolist() == [False, True, False, False]
    assert found.boxes[["image_id", "score"]].to_numpy().tolist() == [["a", 0.8], ["a", 0.35], ["b", 0.45]]


def test_boxes_of_a_detector_that_has_seen_the_image_do_not_count():
    boxes = [("a", "d", fold, score, *ONE) for fold, score in enumerate((0.9, 0.6))]
    seen = pd.DataFrame([("a", "d", 0), ("b", "d", 0), ("b", "d", 1)], columns=["image_id", "model", "fold"])
    found = pseudo_labels(predictions(boxes, coverage=(("d", 0), ("d", 1))), IMAGES, seen, PLAIN)
    assert found.boxes["score"].tolist() == [0.6]  # one list of boxes remains, and no empty list lowers its score
    assert found.images.set_index("image_id")["unsure"].to_dict() == {"a": False, "b": True, "c": False, "d": False}


@settings(max_examples=8)
@given(st.sets(st.tuples(st.sampled_from("abcd"), st.sampled_from(["c", "d"]), st.integers(0, 1))))
def test_what_a_model_has_seen_never_touches_its_label(rows):
    """Predictions of models in `seen` do not change the result."""
    seen = pd.DataFrame(sorted(rows), columns=["image_id", "model", "fold"])
    boxes = [(name, "d", fold, 0.5 + 0.2 * fold, *ONE) for name in "abcd" for fold in (0, 1)]
    honest = predictions(boxes, coverage=(("d", 0), ("d", 1)))
    probabilities, detections = honest.probabilities.copy(), honest.detections.copy()
    for table, column in ((probabilities, "none"), (detections, "score")):
        key = list(zip(table["image_id"], table["model"], table["fold"], strict=True))
        table.loc[[each in rows for each in key], column] = 0.99
    first, second = (
        pseudo_labels(each, IMAGES, seen, PLAIN)
        for each in (honest, Predictions(probabilities, detections, honest.coverage))
    )
    for name in ("images", "labels", "boxes", "left_out"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    everything = {("c", 0), ("c", 1), ("d", 0), ("d", 1)}
    gone = {name for name in "abcd" if {(model, fold) for image, model, fold in rows if image == name} == everything}
    assert set(first.left_out["image_id"]) == gone


def test_fusion_settings_shape_the_labels_and_the_classes_add_to_one():
    mixed = SiimFusion(none_classifier=1.0, none_no_box=1.0, negative_share=0.5)
    predicted = predictions([("a", "d", 0, 0.8, *ONE)])
    found = pseudo_labels(predicted, IMAGES, empty_table("coverage"), mixed)
    study_scores, image_scores = study_and_image_scores([predicted.probabilities], IMAGES)
    fused = fuse(study_scores, image_scores, predicted.detections, IMAGES, mixed, predicted.coverage)
    assert found.images["none"].tolist() == pytest.approx(fused.nones["none"].tolist())
    assert found.labels[list(STUDY_CLASSES)].sum(axis=1).tolist() == pytest.approx([1] * 4)
    ratio = fused.studies["negative"] / fused.studies["typical"]
    assert (found.labels["negative"] / found.labels["typical"]).tolist() == pytest.approx(ratio.tolist())


def test_thresholds_may_be_equal_or_at_the_ends_but_not_cross():
    for low, kept, high in ((0, 0, 0), (0, 0.3, 1), (1, 1, 1)):
        pseudo_labels(predictions(), IMAGES, empty_table("coverage"), PLAIN, low=low, kept=kept, high=high)
    for low, kept, high in ((0.4, 0.3, 0.5), (0.1, 0.6, 0.5), (-0.1, 0.3, 0.5), (0.1, 0.3, 1.1)):
        with pytest.raises(ValueError, match=rf"0 <= low <= kept <= high <= 1, got {low}, {kept}, {high}"):
            pseudo_labels(predictions(), IMAGES, empty_table("coverage"), PLAIN, low=low, kept=kept, high=high)


def test_an_image_that_was_not_predicted_is_left_out():
    images = pd.concat([IMAGES, images_of(("e", "E", "pe"))], ignore_index=True)
    found = pseudo_labels(predictions(), images, empty_table("coverage"), PLAIN)
    assert found.left_out.to_numpy().tolist() == [["e", "no model has predicted it"]]


def test_a_detector_is_asked_about_unseen_images_and_a_model_of_findings_is_refused(tmp_path):
    small = SmallXrays(8)
    record = {"architecture": {}, "longest_side": 50, "image_size": 32, "placement": "stretch", "mean": [0.5], "std": [0.5]}
    record |= {"data_fingerprint": "", "precision": "float32", "validation": {}, "fold": 1}
    for recipe, classes in ((FASTER_RCNN, ["opacity"]), (FINDINGS, ["Mass"])):
        family = family_of(recipe)
        changes = {"family": family.name, "model": family.name, "classes": classes, "recipe": asdict(recipe)}
        save_bundle(tmp_path / family.name, family.network(recipe, classes).state_dict(), record | changes)
    models = pd.DataFrame({"model": "faster_rcnn", "fold": [1], "bundle": [tmp_path / "faster_rcnn"]})
    rows = [("image001", "faster_rcnn", 1), ("image002", "faster_rcnn", 0), ("image003", "other", 1)]
    seen = pd.DataFrame(rows, columns=["image_id", "model", "fold"])
    found = predict_unseen(models, small.images, small, seen)
    assert found.coverage.image_id.tolist() == [name for name in small.image_ids if name != "image001"]
    assert set(found.coverage.model) == {"faster_rcnn"} and set(found.coverage.fold) == {1}
    assert found.probabilities.empty and set(found.detections.image_id) <= set(found.coverage.image_id)
    with pytest.raises(ValueError, match="findings predicts classes; give only runs of study classifiers and detectors"):
        predict_unseen(models.assign(bundle=tmp_path / "findings"), small.images, small, seen)


def test_models_of_a_segmenters_lungs_require_them_and_others_do_not(tmp_path, caplog):
    small, network = SmallXrays(8), StudyClassifier(RECIPE)
    record = {"family": "study", "classes": OUTPUTS, "architecture": {}, "longest_side": 50, "image_size": 32}
    record |= {
        "placement": "letterbox",
        "mean": [0.5],
        "std": [0.5],
        "data_fingerprint": "",
        "precision": "float32",
        "validation": {},
        "fold": 0,
    }
    of_lungs = override(RECIPE, lungs="masks", trained_on="lungs", views=["lungs"], masked=True)
    lungs = stored_lungs(tmp_path / "lungs", small, missed=["image001", "image004"])
    for name, recipe, segmenter in (
        ("crops", of_lungs, lungs.segmenter),
        ("whole", RECIPE, ""),
        ("other", of_lungs, "else"),
    ):
        changes = {"model": name, "recipe": asdict(recipe), "architecture": {"segmenter": segmenter}}
        save_bundle(tmp_path / name, network.state_dict(), record | changes)
    models = pd.DataFrame({"model": ["crops", "whole"], "fold": 0, "bundle": [tmp_path / "crops", tmp_path / "whole"]})
    images, seen = small.images, empty_table("coverage")
    with pytest.raises(ValueError, match=r"crops needs lung masks; set 'lungs_run'"):
        predict_unseen(models, images, small, seen)
    other = models.head(1).assign(model="other", bundle=tmp_path / "other")
    with pytest.raises(ValueError, match=r"other was trained with masks of another segmenter or clean-up; set 'lungs_run'"):
        predict_unseen(other, images, small, seen, lungs=lungs)
    assert len(predict_unseen(models.tail(1), images, small, seen).probabilities) == 8
    with caplog.at_level("INFO"):
        scores = predict_unseen(models, images, small, seen, lungs=lungs).probabilities.set_index(["model", "image_id"])
    assert (
        "crops, fold 0: no lungs found in 2 of 8 images, which are predicted uncropped" in caplog.text
        and "whole, fold" not in caplog.text
    )
    # Both bundles have the same weights, so predictions differ only where the input differs.
    same = (scores.loc["crops", "none"] - scores.loc["whole", "none"]).abs() < 1e-6
    assert same[same].index.tolist() == ["image001", "image004"]
