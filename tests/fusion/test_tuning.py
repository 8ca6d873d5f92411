from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import SiimFusion, combine
from kitlib.errors import FusionError
from kitlib.fusion.tuning import LEAST_GAIN, Judge, cross_fit, tune
from kitlib.scoring.score import Truth, score_tables
from kitlib.tables import BOX, empty_table
from tests.fused_tables import fuse, siim_judge

N = 36


@pytest.fixture(scope="module")
def oof():
    """Tables of a classifier that is good at `none`, a detector with accurate boxes and one with random ones.

    A third of the images is healthy; the detectors find boxes on all images.
    """
    rng = np.random.default_rng(0)
    names = [f"i{n:02}" for n in range(N)]
    images = pd.DataFrame({"image_id": names, "study_id": [f"s{n:02}" for n in range(N)], "rows": 1000, "columns": 1000})
    classes = np.arange(N) % 6 % 4
    labels = pd.DataFrame(np.eye(4)[classes], columns=list(STUDY_CLASSES))
    labels.insert(0, "id", images["study_id"])
    corner = rng.uniform(100, 500, (N, 2))
    boxes = pd.DataFrame(np.hstack([corner, corner + 350]), columns=list(BOX))
    boxes.insert(0, "image_id", names)
    boxes = boxes[classes > 0].reset_index(drop=True)
    folds = pd.DataFrame({"id": names, "fold": np.arange(N) % 3})
    own = {"model": "c", "fold": folds["fold"]}
    probabilities = np.exp(1.5 * np.eye(4)[classes] + rng.normal(0, 1, (N, 4)))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    study = pd.DataFrame({"study_id": images["study_id"], **own, **dict(zip(STUDY_CLASSES, probabilities.T, strict=True))})
    none = np.clip((classes == 0) * 0.6 + rng.uniform(0, 0.4, N), 0, 1)
    image = pd.DataFrame({"image_id": names, **own, "none": none})
    rows = []
    for n, name in enumerate(names):
        for model, spread in (("good", 30), ("blind", 900)):
            for _ in range(2):
                x, y = corner[n] + rng.normal(0, spread, 2)
                x, y = np.clip([x, y], 0, 900)
                rows.append((name, model, n % 3, rng.uniform(0.2, 0.9), x, y, min(1000, x + 350), min(1000, y + 350)))
    detections = pd.DataFrame(rows, columns=["image_id", "model", "fold", "score", *BOX])
    return {
        "study_scores": study,
        "image_scores": image,
        "detections": detections,
        "coverage": detections[["image_id", "model", "fold"]].drop_duplicates().reset_index(drop=True),
        "images": images,
        "labels": labels,
        "boxes": boxes,
        "folds": folds,
    }


@pytest.fixture(scope="module")
def tuned(oof):
    return tune(siim_judge(**oof))


def score_of(oof, settings):
    parts = (oof[name] for name in ("study_scores", "image_scores", "detections", "images"))
    fused = fuse(*parts, settings, oof["coverage"])
    truth = Truth(oof["labels"], tuple(oof["images"]["image_id"]), oof["boxes"])
    return score_tables(truth, fused.studies, fused.nones, fused.detections)["score"]


def test_every_change_gains_and_the_settings_reach_the_reported_score(oof, tuned):
    settings, steps = tuned
    assert steps.iloc[0].tolist() == ["0 default", "", score_of(oof, SiimFusion()), 0]
    assert ((steps["gain"] == 0) | (steps["gain"] >= LEAST_GAIN)).all() and steps["step"].is_unique
    assert steps["score"].diff().iloc[1:].tolist() == pytest.approx(steps["gain"].iloc[1:].tolist())
    assert steps["score"].iloc[-1] == pytest.approx(score_of(oof, settings))
    assert ((steps["setting"] == "unchanged") == (steps["gain"] == 0)).iloc[1:].all()
    names = steps["step"].str.split(" ", n=1).str[1].tolist()
    # Boxes are fused anew only in the first round, the calibration first.
    assert names[:2] == ["default", "calibration"] and names.count("opacity_power") == 2
    for name in ("calibration", "weight of good", "weight of blind", "box_method", "box_confidence", "box_iou"):
        assert names.count(name) == 1


def test_tuning_lowers_the_blind_detector_and_rescales_boxes_on_healthy_images(tuned):
    settings, steps = tuned
    # The random boxes are only false positives; boxes on healthy images are as confident as others.
    assert settings.weight("blind") < settings.weight("good")
    assert settings.opacity_power > 0
    assert steps["score"].iloc[-1] > steps["score"].iloc[0] + 0.03


@pytest.fixture(scope="module")
def two_scales():
    """Two detectors on 300 images that rank their boxes equally well, but one scores 0.05 where the other scores 0.75."""
    rng = np.random.default_rng(5)
    names = [f"i{n}" for n in range(300)]
    images = pd.DataFrame({"image_id": names, "study_id": names, "rows": 1000, "columns": 1000})
    labels = pd.DataFrame(np.eye(4)[np.arange(300) % 4], columns=list(STUDY_CLASSES)).assign(id=names)
    boxes = pd.DataFrame([(name, 100.0, 100, 500, 500) for name in names], columns=["image_id", *BOX])
    rows = []
    for n, name in enumerate(names):
        for model, power in (("loud", 1.0), ("quiet", 12.0)):
            for right in rng.random(3) < 0.4:
                p = rng.beta(4, 2) if right else rng.beta(2, 4)
                x, y = (rng.uniform(80, 120, 2)) if right else rng.uniform(500, 600, 2)
                rows.append((name, model, n % 2, p**power, x, y, x + 400, y + 400))
    detections = pd.DataFrame(rows, columns=["image_id", "model", "fold", "score", *BOX])
    folds = pd.DataFrame({"id": names, "fold": np.arange(300) % 2})
    nothing = {"study_scores": empty_table("study_scores"), "image_scores": empty_table("image_scores")}
    coverage = detections[["image_id", "model", "fold"]].drop_duplicates().reset_index(drop=True)
    tables = {"images": images, "labels": labels, "boxes": boxes, "folds": folds}
    return {**nothing, "detections": detections, "coverage": coverage, **tables}


@pytest.fixture
def few_ways(monkeypatch):
    monkeypatch.setattr("kitlib.fusion.tuning.MODEL_WEIGHTS", (0.5, 1.0))
    monkeypatch.setattr("kitlib.competitions.fusion_settings.FusionSettings.BOX_IOUS", (0.5, 0.6))
    monkeypatch.setattr("kitlib.competitions.fusion_settings.FusionSettings.BOX_METHODS", ("wbf", "nms"))
    monkeypatch.setattr("kitlib.competitions.fusion_settings.FusionSettings.BOX_CONFIDENCES", ("avg", "max"))


def test_calibration_gains_if_detectors_score_on_different_scales(two_scales, few_ways):
    settings, steps = tune(siim_judge(**two_scales), rounds=1)
    step = steps.set_index("step").loc["1 calibration"]
    assert step["setting"] == "fitted" and step["gain"] > 0.005
    # p^12 spreads over more of the logit scale, so the quiet detector needs the smaller slope and the larger offset.
    (loud, up), (quiet, further) = settings.calibration["loud"], settings.calibration["quiet"]
    assert quiet < loud and further > up


def test_the_calibration_for_a_fold_is_fitted_to_the_other_folds(two_scales, few_ways, monkeypatch):
    fitted = []
    monkeypatch.setattr("kitlib.fusion.tuning.fit_calibration", lambda score, hit: fitted.append((len(score), hit.sum())))
    assert (cross_fit(siim_judge(**two_scales), rounds=1)["cross_fitted"] > 0).all()
    detections, fold_of = two_scales["detections"], two_scales["folds"].set_index("id")["fold"]
    detections = detections[detections["score"] >= SiimFusion().box_min_score]
    assert [count for count, _ in fitted] == [
        int(((detections["model"] == model) & (detections["image_id"].map(fold_of) != fold)).sum())
        for fold in (0, 1)
        for model in ("loud", "quiet")
    ]


# Every field of SiimFusion, with a value that changes the fused tables of `oof`.
OTHER_VALUES = {
    "model_weights": ({"good": 0.5}, {"blind": 0.0}),
    "calibration": ({"blind": (2.0, -1.0)}, {"blind": (2.0, 1.0)}),
    "box_method": ("nms",),
    "box_iou": (0.2,),
    "box_min_score": (0.7,),
    "box_limit": (1,),
    "box_confidence": ("max", "box_and_model_avg"),
    "final_nms_iou": (0.05,),
    "none_classifier": (0.5,),
    "none_negative": (3.0,),
    "none_no_box": (3.0,),
    "none_product": (3.0,),
    "opacity_power": (0.5,),
    "negative_share": (0.6,),
}


@pytest.mark.parametrize("field", [field.name for field in fields(SiimFusion)])
def test_a_judge_that_has_fused_other_settings_gives_what_a_new_one_gives(oof, field):
    start = SiimFusion(none_negative=1.0)
    judge = siim_judge(**oof)
    before = fused_arrays(judge, start)
    for value in OTHER_VALUES[field]:
        settings = replace(start, **{field: value})
        fused = fused_arrays(judge, settings)
        for one, other in zip(fused, fused_arrays(siim_judge(**oof), settings), strict=True):
            np.testing.assert_array_equal(one, other)
        assert any(not np.array_equal(one, other) for one, other in zip(fused, before, strict=True))
    for one, other in zip(fused_arrays(judge, start), before, strict=True):
        np.testing.assert_array_equal(one, other)


def fused_arrays(judge, settings):
    merged = judge.merge(settings)
    studies, nones, score = combine(merged, settings)
    return *(table.to_numpy() for table in (studies, nones)), merged.boxes["row"], score, merged.boxes["match"]


def test_several_detectors_may_be_dropped_but_not_the_last(oof, monkeypatch):
    monkeypatch.setattr("kitlib.fusion.tuning.MODEL_WEIGHTS", (0.0, 1.0, 2.0))
    blind = [oof[name][oof[name]["model"] == "blind"].assign(model="blind too") for name in ("detections", "coverage")]
    # Confident boxes that match nothing.
    blind[0] = blind[0].assign(**dict(zip(BOX, (0.0, 0.0, 5.0, 5.0), strict=True)), score=0.95)
    three = {name: pd.concat([oof[name], more]) for name, more in zip(("detections", "coverage"), blind, strict=True)}
    settings, _ = tune(siim_judge(**{**oof, **three}), rounds=1)
    assert settings.weight("blind") == settings.weight("blind too") == 0 < settings.weight("good")
    only_blind = {name: table[table["model"] != "good"] for name, table in three.items()}
    settings, steps = tune(siim_judge(**{**oof, **only_blind}), rounds=1)
    assert settings.weight("blind") + settings.weight("blind too") > 0 and np.isfinite(steps["score"]).all()


def test_tuned_settings_do_not_depend_on_the_order_of_rows(oof, tuned):
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in oof.items()}
    assert tune(siim_judge(**shuffled))[0] == tuned[0]


def test_predictions_of_two_folds_for_one_image_are_refused(oof):
    predicted_twice = pd.concat([oof["image_scores"], oof["image_scores"].iloc[[4]].assign(fold=2)])
    with pytest.raises(FusionError, match="image_id i04 belongs to fold 1, but was predicted by c of fold 2"):
        tune(siim_judge(**{**oof, "image_scores": predicted_twice}))


def test_predictions_of_a_model_that_saw_the_image_are_refused(oof):
    trained_on = {name: oof[name].assign(fold=lambda t: (t["fold"] + 1) % 3) for name in ("detections", "coverage")}
    with pytest.raises(FusionError, match="which was trained on it"):
        tune(siim_judge(**{**oof, **trained_on}))
    with pytest.raises(
        FusionError, match=r"144 detections .* `coverage` table lacks; the first is in 'i00', by 'good' of fold 1"
    ):
        tune(siim_judge(**{**oof, "detections": trained_on["detections"]}))


def test_an_image_that_a_detector_covered_but_found_nothing_on_is_scored(oof):
    silent = {**oof, "detections": oof["detections"][oof["detections"]["image_id"] != "i00"]}
    _, steps = tune(siim_judge(**silent), rounds=0)
    assert steps["score"].iloc[0] == pytest.approx(score_of(silent, SiimFusion()))
    uncovered = {**silent, "coverage": oof["coverage"][oof["coverage"]["image_id"] != "i00"]}
    remaining = {name: table[~table.iloc[:, 0].isin(["i00", "s00"])] for name, table in oof.items()}
    _, steps = tune(siim_judge(**uncovered), rounds=0)
    assert steps["score"].iloc[0] == pytest.approx(score_of(remaining, SiimFusion()))


def test_cross_fit_scores_each_fold_with_settings_tuned_on_the_others(oof, monkeypatch):
    monkeypatch.setattr("kitlib.fusion.tuning.MODEL_WEIGHTS", (0.0, 1.0, 2.0))
    monkeypatch.setattr("kitlib.competitions.fusion_settings.FusionSettings.BOX_IOUS", (0.5, 0.6))
    by_fold = cross_fit(siim_judge(**oof), rounds=1)
    # The expected values: tune on two folds, fuse and score the third.
    for row in by_fold.itertuples():
        ids = set(oof["folds"].loc[oof["folds"]["fold"] == row.fold, "id"])
        ids |= {name.replace("i", "s") for name in ids}
        others = {name: table[~table.iloc[:, 0].isin(ids)] for name, table in oof.items()}
        held_out = {name: table[table.iloc[:, 0].isin(ids)] for name, table in oof.items()}
        assert row.cross_fitted == pytest.approx(score_of(held_out, tune(siim_judge(**others), rounds=1)[0]))
        assert row.default == pytest.approx(score_of(held_out, SiimFusion())) and row.images == 12
    assert by_fold["fold"].tolist() == [0, 1, 2]


def test_cross_fit_needs_two_folds(oof):
    one = {**oof, "folds": oof["folds"][oof["folds"]["fold"] == 0]}
    assert cross_fit(siim_judge(**one)).empty


def test_a_gain_below_the_least_is_not_kept(oof, monkeypatch):
    monkeypatch.setattr("kitlib.fusion.tuning.LEAST_GAIN", 0.5)
    settings, steps = tune(siim_judge(**oof), rounds=3)
    assert settings == SiimFusion() and (steps["gain"] == 0).all()
    assert (
        steps["step"].str.endswith("box_iou").sum() == steps["step"].str.endswith("negative_share").sum() == 1
    )  # one round


def test_images_that_no_annotator_looked_at_are_not_scored(oof):
    marked = oof["images"].assign(false_none=[n >= 18 for n in range(N)])
    half = {name: table[table.iloc[:, 0].str[1:].astype(int) < 18] for name, table in oof.items()}
    settings, steps = tune(siim_judge(**{**oof, "images": marked}), rounds=1)
    expected, expected_steps = tune(siim_judge(**half), rounds=1)
    assert settings == expected
    pd.testing.assert_frame_equal(steps, expected_steps)


def test_only_images_that_every_model_predicted_are_scored(oof):
    one_fold = {**oof, "image_scores": oof["image_scores"][oof["image_scores"]["fold"] == 0]}
    _, steps = tune(siim_judge(**one_fold), rounds=0)
    ids = set(one_fold["image_scores"]["image_id"])
    studies = {name.replace("i", "s") for name in ids}
    small = {name: table[table.iloc[:, 0].isin(ids | studies)] for name, table in oof.items()}
    assert steps["score"].iloc[0] == pytest.approx(tune(siim_judge(**small), rounds=0)[1]["score"].iloc[0])
    with pytest.raises(FusionError, match="no image was predicted by every model"):
        tune(siim_judge(**{**oof, "image_scores": oof["image_scores"].assign(image_id=lambda t: t["image_id"] + "x")}))


def test_without_a_detector_or_without_a_classifier(oof):
    no_boxes = {name: oof[name].iloc[:0] for name in ("detections", "coverage")}
    settings, _ = tune(siim_judge(**{**oof, **no_boxes}), rounds=1)
    assert settings.opacity_power == 0
    nothing = {name: oof[name].iloc[:0] for name in ("study_scores", "image_scores")}
    _, steps = tune(siim_judge(**{**oof, **nothing}), rounds=1)
    assert steps["score"].iloc[-1] >= steps["score"].iloc[0] > 0


def test_the_values_that_are_tried(oof, monkeypatch):
    """Each value of a grid is reached if it alone is better: the values of docs, papers and the published systems."""
    tried = []
    judge = siim_judge(**oof)
    monkeypatch.setattr(Judge, "score", lambda self, settings, truth: tried.append(settings) or 0.5)
    monkeypatch.setattr(Judge, "calibration", lambda self, truth: {})
    settings, _ = tune(judge, rounds=1)
    assert settings == SiimFusion()  # no gain

    def values(name):
        return {getattr(each, name) for each in tried}

    for model in ("good", "blind"):
        assert {each.weight(model) for each in tried} == {0, 0.5, 1, 2, 3}
    assert values("box_method") == {"wbf", "nms"} and values("box_confidence") == {"avg", "max", "box_and_model_avg"}
    assert values("box_iou") == {0.45, 0.5, 0.55, 0.6, 0.65, 0.7}
    # 3rd place: the power 0.16 / 0.84 of its ensemble; 11th place: 0.7 of negative.
    assert values("opacity_power") == {0, 0.1, 0.16 / 0.84, 0.3, 0.4, 0.6, 0.8, 1}
    assert values("negative_share") == {1, 0.9, 0.8, 0.7, 0.6, 0.5}
    parts = ("none_classifier", "none_negative", "none_no_box", "none_product")
    mixtures = sorted(tuple(getattr(each, part) for part in parts) for each in tried)
    assert sorted(set(mixtures)) == sorted(
        [
            *map(tuple, np.eye(4).tolist()),
            *((0.5, 0.5, 0, 0), (0.7, 0, 0.3, 0), (0.5, 0, 0.5, 0), (0.3, 0, 0.7, 0), (0, 0.5, 0.5, 0)),
            *((0, 0.5, 0, 0.5), (0.7, 0, 0, 0.3), (0.5, 0, 0, 0.5), (0.4, 0.3, 0.3, 0), (0.25, 0.25, 0.25, 0.25)),
        ]
    )


def test_a_gain_is_kept_from_a_ten_thousandth_on(oof, monkeypatch):
    for gain, kept in ((2e-4, True), (5e-5, False)):
        monkeypatch.setattr(Judge, "score", lambda self, settings, truth, gain=gain: 0.5 + gain * (settings.box_iou == 0.7))
        assert (tune(siim_judge(**oof), rounds=1)[0].box_iou == 0.7) == kept
