"""From predictions to rows: what every competition but SIIM-COVID decides, and that tuning judges exactly these answers."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import RSNA_CLASSES
from kitlib.competitions.registry import COMPETITIONS, find_competition
from kitlib.errors import FusionError, SettingsError
from kitlib.fusion.model_fusion import ModelPredictions, fuse, read_settings, write_settings
from kitlib.fusion.tuning import Judge, cross_fit, tune
from kitlib.tables import BOX

IDS = [f"{n:04}" for n in range(60)]
FOLD = np.arange(60) % 2
IS_SICK = np.arange(60) % 3 == 0
NAMES = ("vinbigdata", "rsna-pneumonia", "ranzcr-clip")


def prepared(side=1024):
    images = pd.DataFrame({"image_id": IDS, "study_id": IDS, "patient_id": IDS, "rows": side, "columns": side})
    return {"images": images, "folds": pd.DataFrame({"id": IDS, "fold": FOLD})}


def boxes_of(names, side=1024):
    """Return true boxes, and detections that find them somewhat off, with false ones on every image."""
    rng, truth, found = np.random.default_rng(0), [], []
    for index, image_id in enumerate(IDS):
        for number, name in enumerate(names):
            corner = rng.uniform(0.1, 0.5, 2)
            true = np.append(corner, corner + 0.3) * side
            if IS_SICK[index] and (index + number) % 2 == 0:
                truth.append((image_id, name, *true))
                found.append(
                    (image_id, "m", FOLD[index], name, rng.uniform(0.3, 0.9), *(true + rng.normal(0, 0.02, 4) * side))
                )
            found.append((image_id, "m", FOLD[index], name, rng.uniform(0.0, 0.5), *(true + 0.15 * side)))
    detections = pd.DataFrame(found, columns=["image_id", "model", "fold", "finding", "score", *BOX])
    return pd.DataFrame(truth, columns=["image_id", "finding", *BOX]), detections


def scores_of(names, of_images, seed=1):
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame({"id": IDS, **{name: (rng.random(60) < 0.4).astype(float) for name in names}})
    if of_images is not None:
        labels[names[0]] = of_images.astype(float)
    noisy = {name: np.clip(0.6 * labels[name] + rng.uniform(0, 0.4, 60), 0, 1) for name in names}
    return labels, pd.DataFrame({"image_id": IDS, "model": "c", "fold": FOLD, **noisy})


def made(name, side=1024):
    """Return a competition, the tables of a prepared run, and predictions of a detector and a classifier, or of one."""
    competition, tables = find_competition(name), prepared(side)
    if name == "ranzcr-clip":
        labels, scores = scores_of(list(competition.image_classes), None)
        return (
            competition,
            tables | {"labels": labels, "boxes": boxes_of(["x"])[0]},
            ModelPredictions.of(image_scores=scores),
        )
    findings = competition.box_classes[:3]
    boxes, detections = boxes_of(findings, side)
    is_abnormal = pd.Series(IDS).isin(boxes["image_id"]).to_numpy()
    classes = list(competition.image_classes) if name == "vinbigdata" else list(reversed(RSNA_CLASSES))
    labels, scores = scores_of(classes, ~is_abnormal if name == "vinbigdata" else is_abnormal)
    coverage = pd.DataFrame({"image_id": IDS, "model": "m", "fold": FOLD, "findings": "; ".join(findings)})
    predictions = ModelPredictions.of(image_scores=scores, detections=detections, coverage=coverage)
    return competition, tables | {"labels": labels, "boxes": boxes}, predictions


def settings_tried(competition):
    """Yield the default settings, and settings with each value of each tuning step."""
    start = competition.settings()
    yield start
    for names, values in competition.settings.GRIDS.values():
        for value in values:
            yield dataclasses.replace(start, **dict(zip(names, value if len(names) > 1 else [value], strict=True)))


@pytest.mark.parametrize("name", COMPETITIONS)
def test_every_value_that_tuning_tries_is_valid(name):
    kind = COMPETITIONS[name].settings
    assert len(list(settings_tried(COMPETITIONS[name]))) == 1 + sum(len(values) for _, values in kind.GRIDS.values())
    tried = {"box_iou": kind.BOX_IOUS, "box_method": kind.BOX_METHODS, "box_confidence": kind.BOX_CONFIDENCES}
    for field, values in tried.items():
        assert [getattr(kind(**{field: value}), field) for value in values] == list(values)


@pytest.mark.parametrize("name", NAMES)
def test_tuning_judges_exactly_what_is_decided(name):
    competition, tables, predictions = made(name)
    judge = Judge(competition, predictions, tables)
    part = judge.part(FOLD == 1)
    for settings in settings_tried(competition):
        for images, chosen in ((tables["images"], judge.everything), (tables["images"][FOLD == 1], part)):
            decided = fuse(predictions.only(images["image_id"]), images, settings, competition)
            if chosen is part and name == "ranzcr-clip":
                decided = decided[decided["image_id"].isin(images["image_id"])]
            expected = competition.metric(chosen.truth, decided)["score"]
            assert judge.score(settings, chosen) == pytest.approx(expected, abs=1e-9, nan_ok=True), settings


@pytest.mark.parametrize("name", NAMES)
def test_tuning_gains_and_the_rows_are_valid_and_have_the_score(name, tmp_path):
    competition, tables, predictions = made(name)
    judge = Judge(competition, predictions, tables)
    settings, steps = tune(judge, rounds=1)
    decided = fuse(predictions, tables["images"], settings, competition)
    path = tmp_path / "submission.csv"
    assert competition.write(path, IDS, decided) == []
    assert competition.find_faults(IDS, path, "the test") == []
    written = competition.metric(judge.everything.truth, competition.read_submission(path, IDS))["score"]
    assert written == pytest.approx(steps["score"].iloc[-1], abs=2e-3)  # boxes are rounded to a tenth of a pixel
    competition.write(tmp_path / "baseline.csv", IDS, None)
    floor = competition.metric(judge.everything.truth, competition.read_submission(tmp_path / "baseline.csv", IDS))["score"]
    assert floor + 0.1 < steps["score"].iloc[0] <= steps["score"].iloc[-1]
    assert len(cross_fit(judge, rounds=1)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_images_that_no_model_has_predicted_keep_the_baseline(name, tmp_path):
    competition, tables, predictions = made(name)
    some = predictions.only(pd.Series(IDS[:10]))
    scores = some.image_scores[some.image_scores["image_id"].isin(IDS[:10])]
    other = pd.DataFrame({"image_id": IDS, "model": "other", "fold": FOLD, "a class of no competition": 0.5})
    some = dataclasses.replace(some, image_scores=pd.concat([scores, other]))
    decided = fuse(some, tables["images"], competition.settings(), competition)
    assert competition.write(tmp_path / "s.csv", IDS, decided) == IDS[10:]
    rows = (tmp_path / "s.csv").read_text().splitlines()[11:]
    assert rows == [",".join(row) for row in competition.baseline_rows(IDS[10:])]


def test_rsna_answers_in_pixels_of_the_published_images_whatever_the_copies_size():
    small, large = (made("rsna-pneumonia", side) for side in (256, 1024))
    answers = []
    for competition, tables, predictions in (small, large):
        answers.append(fuse(predictions, tables["images"], competition.settings(), competition))
        truth = competition.truth_of(tables["images"], tables["labels"], tables["boxes"], None)
        assert competition.metric(truth, answers[-1])["score"] > 0.1
    values = [
        answer[["image_id", "score", *BOX]].sort_values(["image_id", "score"], ignore_index=True) for answer in answers
    ]
    pd.testing.assert_frame_equal(*values, atol=1e-3)


def test_the_score_of_a_fused_box_does_not_depend_on_other_images():
    competition, tables, predictions = made("vinbigdata")
    # A second detector, which finds nothing on the first ten images.
    later = predictions.detections[~predictions.detections["image_id"].isin(IDS[:10])].assign(model="other")
    coverage = predictions.coverage
    predictions = ModelPredictions.of(
        detections=pd.concat([predictions.detections, later]),
        coverage=pd.concat([coverage, coverage.assign(model="other")]),
    )
    settings = competition.settings()
    whole = fuse(predictions, tables["images"], settings, competition)
    first = fuse(predictions.only(pd.Series(IDS[:10])), tables["images"].head(10), settings, competition)
    columns = ["image_id", "finding", "score", *BOX]
    expected = whole.loc[whole["image_id"].isin(IDS[:10]), columns]
    pd.testing.assert_frame_equal(
        *(table.sort_values(columns, ignore_index=True)[columns] for table in (first, expected)), check_dtype=False
    )


def test_a_detector_without_a_finding_does_not_lower_the_others_scores():
    competition, tables, predictions = made("vinbigdata")
    special = predictions.coverage.assign(model="special", findings="Cardiomegaly")
    with_it = dataclasses.replace(predictions, coverage=pd.concat([predictions.coverage, special]))
    alone, both = (fuse(each, tables["images"], competition.settings(), competition) for each in (predictions, with_it))
    others = [table.loc[table["finding"] != "No finding", "score"].sort_values(ignore_index=True) for table in (alone, both)]
    pd.testing.assert_series_equal(*others)
    unknown = pd.concat([predictions.coverage, special.assign(findings=None)])
    with_unknown = dataclasses.replace(predictions, coverage=unknown)
    lowered = fuse(with_unknown, tables["images"], competition.settings(), competition)
    assert lowered["score"].sum() < alone["score"].sum()


@pytest.mark.parametrize("name", NAMES[:2])
def test_boxes_of_other_findings_are_left_out(name, tmp_path):
    competition, tables, predictions = made(name)
    strange = predictions.detections.assign(finding="nodule", score=0.99)
    mixed = dataclasses.replace(predictions, detections=pd.concat([predictions.detections, strange]))
    files = []
    for index, each in enumerate((predictions, mixed)):
        files.append(tmp_path / f"{index}.csv")
        competition.write(files[-1], IDS, fuse(each, tables["images"], competition.settings(), competition))
    assert files[0].read_bytes() == files[1].read_bytes()
    odd = {"detections": strange.assign(model="odd"), "coverage": predictions.coverage.assign(model="odd")}
    with pytest.raises(FusionError, match=f"'odd' predicts no class that '{name}' has for boxes"):
        Judge(competition, dataclasses.replace(predictions, **odd), tables)


def test_one_unpredicted_label_costs_only_itself():
    competition, tables, predictions = made("ranzcr-clip")
    missing = predictions.image_scores.drop(columns="CVC - Normal")
    decided = fuse(ModelPredictions.of(image_scores=missing), tables["images"], competition.settings(), competition)
    assert len(decided) == 60 and set(decided["CVC - Normal"]) == {21324 / 30083}
    assert decided["ETT - Normal"].tolist() == predictions.image_scores["ETT - Normal"].tolist()


@pytest.mark.parametrize("name", COMPETITIONS)
def test_settings_belong_to_one_competition(name, tmp_path):
    competition = COMPETITIONS[name]
    write_settings(competition.settings(), tmp_path / "fusion.json", competition)
    assert read_settings(tmp_path / "fusion.json", competition) == competition.settings()
    for other in COMPETITIONS.values():
        if other is not competition:
            with pytest.raises(SettingsError, match=f"settings for '{name}', but the submission is to '{other.name}'"):
                read_settings(tmp_path / "fusion.json", other)


def test_a_truth_without_positives_is_refused():
    competition, tables, predictions = made("rsna-pneumonia")
    nothing = dataclasses.replace(predictions, detections=predictions.detections.iloc[:0])
    with pytest.raises(FusionError, match="the score is undefined"):
        tune(Judge(competition, nothing, tables | {"boxes": tables["boxes"].iloc[:0]}))
