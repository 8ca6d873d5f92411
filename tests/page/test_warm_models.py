"""The page's predictions equal those of a submission and the out-of-fold predictions of the notebooks."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.classes import STUDY_CLASSES
from kitlib.errors import RunError
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.inference.predict import load_predictor, study_and_image_scores
from kitlib.inference.segment_lungs import LungSegmenter
from kitlib.inference.submit import SubmissionRun, SubmitSettings
from kitlib.leaderboard.listing import list_runs
from kitlib.page.answer_files import with_image_names, write_answer, write_rows
from kitlib.page.gallery import find_gallery
from kitlib.page.opened_study import DecodedCopies
from kitlib.page.systems import find_systems
from kitlib.page.uploads import open_uploads
from kitlib.page.warm_models import WarmModels, choose_models
from kitlib.scoring.submission_csv import PRIORS, as_tables, read_submission
from kitlib.tables import BOX
from tests.fused_tables import fuse
from tests.small_page import COPY, page_runs

pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return page_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def systems(runs):
    return {system.name: system for system in find_systems(list_runs([runs]))}


@pytest.fixture(scope="module")
def fused(systems):
    return systems["fuse: study + yolo + faster_rcnn"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    made = DecodedCopies(tmp_path_factory.mktemp("copies"), workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def gallery(runs, fused, copies):
    return find_gallery(list_runs([runs]), fused.models[0].data_fingerprint, copies)


@pytest.fixture(scope="module")
def models():
    return WarmModels()


@pytest.fixture
def weights(tmp_path, fused):
    """Write the system's weights in the layout that build_kernel.py gives a submission."""
    bundles = []
    for model in fused.models:
        name = f"{model.model}-fold{model.fold}"
        shutil.copytree(model.folder, tmp_path / "weights" / name)
        bundles.append({"folder": name})
    (tmp_path / "weights" / "weights.json").write_text(json.dumps({"bundles": bundles}))
    shutil.copy(fused.models[0].folder.parents[2] / "fuse" / "fusion.json", tmp_path / "weights")
    return tmp_path / "weights"


def test_an_uploaded_study_has_the_rows_that_the_submission_writes(runs, fused, copies, models, weights, tmp_path):
    competition = next((runs.parent / "inputs").glob("siim-*"))
    study = max((competition / "test").iterdir(), key=lambda folder: len(list(folder.glob("*/*.dcm"))))
    # The test set has only this study, so that its images are one batch in both.
    shutil.copytree(study, tmp_path / "one" / "test" / study.name)
    run = SubmissionRun(tmp_path / "one", tmp_path / "submission.csv", SubmitSettings(time_limit_s=600, workers=1))
    run.predict(str(weights), tmp_path / "scratch")
    assert run.ledger[run.ledger.stage == "fuse and write"].note.tolist()[-1] == "0 rows keep placeholder predictions"

    opened = open_uploads(sorted(study.glob("*/*.dcm")), copies, fused.longest_side)
    (tmp_path / "page").mkdir()
    rows = write_rows(tmp_path / "page", models.answer(fused, opened), opened, fused)
    submitted = {line for line in run.output.read_text().splitlines()[1:]}
    shown = {line for line in rows.read_text().splitlines()[1:]}
    assert shown == submitted and len(shown) == 1 + len(opened.images)


def test_studies_one_by_one_have_the_numbers_of_a_whole_test_set(runs, fused, copies, models, weights, tmp_path):
    """Other images in a batch change a float32 by about 1e-7, which may change the one decimal of a coordinate."""
    competition = next((runs.parent / "inputs").glob("siim-*"))
    run = SubmissionRun(competition, tmp_path / "submission.csv", SubmitSettings(time_limit_s=600, workers=1))
    run.predict(str(weights), tmp_path / "scratch")
    whole = as_tables(read_submission(run.output))
    (tmp_path / "page").mkdir()
    for folder in (competition / "test").iterdir():
        study = open_uploads(sorted(folder.glob("*/*.dcm")), copies, fused.longest_side)
        rows = write_rows(tmp_path / "page", models.answer(fused, study), study, fused)
        for shown, of_all in zip(as_tables(read_submission(rows)), whole, strict=True):
            key = of_all.columns[0]
            of_all = of_all[of_all[key].isin(shown[key])]
            numbers = [name for name in shown if name != key]
            columns = [table.sort_values([key, "score"] if "score" in table else key) for table in (shown, of_all)]
            for name in numbers:
                atol = 0.1001 if name in BOX else 1e-5
                np.testing.assert_allclose(*(table[name].to_numpy(float) for table in columns), rtol=1e-5, atol=atol)


def opened(gallery, place):
    """Open the study of the image at index `place` of the gallery."""
    shown = gallery.page("all", 1 + place // gallery.page_size)[0]
    return gallery.open(shown[place % gallery.page_size][1].rpartition(", ")[2])


def test_a_study_of_the_gallery_is_answered_as_out_of_fold(fused, gallery, models, runs):
    study = opened(gallery, 0)
    answer = models.answer(fused, study)
    of_fold = [model for model in fused.models if model.fold == study.fold]
    assert answer.models[["model", "fold"]].to_records(index=False).tolist() == [(m.model, m.fold) for m in of_fold]
    assert any("were not trained on this study" in remark for remark in answer.remarks)
    # Computes the same with the functions that the training and fusion notebooks call.
    chunks = {model.model: list(load_predictor(model.folder).predict(_xrays(study))) for model in of_fold}
    study_scores, image_scores = study_and_image_scores(chunks["study"], study.table())
    found = pd.concat([*chunks["yolo"], *chunks["faster_rcnn"]])
    coverage = pd.DataFrame(
        [(image.key, model, study.fold) for image in study.images for model in ("yolo", "faster_rcnn")],
        columns=["image_id", "model", "fold"],
    )
    expected = fuse(study_scores, image_scores, found, study.table(), fused.fusion, coverage)
    for name in ("studies", "nones", "detections"):
        pd.testing.assert_frame_equal(getattr(answer.fused, name), getattr(expected, name))


def _xrays(study):
    return [study.read(image, COPY) for image in study.images]


@pytest.mark.parametrize(
    ("changes", "answering", "says"),
    [
        ({"fold": 7}, 6, "were trained on this study, which is in fold 7"),
        ({"trained_on": "another"}, 6, "It is not known whether"),
        ({"fold": None}, 6, ""),
        ({"fold": None, "trained_on": ""}, 6, ""),  # an uploaded study
    ],
)
def test_remarks_say_which_models_predict_and_whether_they_were_trained_on_the_study(
    fused, gallery, models, changes, answering, says
):
    answer = models.answer(fused, replace(opened(gallery, 1), study_id=str(changes), **changes))
    assert len(answer.models) == answering
    assert says in " ".join(answer.remarks) and (says or not answer.remarks)


def test_models_trained_on_a_study_do_not_predict_it_together_with_models_of_another_prepared_run(fused, gallery):
    study = opened(gallery, 0)
    mixed = [replace(m, data_fingerprint="another") if m.model == "yolo" else m for m in fused.models]
    found, remarks = choose_models(replace(fused, models=tuple(mixed), ensemble=Path("ensemble")), study)
    strange = {("yolo", 0), ("yolo", 1)}
    assert {(m.model, m.fold) for m in found} == strange | {("study", study.fold), ("faster_rcnn", study.fold)}
    assert [
        any(said in remark for remark in remarks) for said in ("the training data of yolo", "weights of the ensemble")
    ] == [
        1,
        1,
    ]
    # For a test image, it is not known either whether the other run's models were trained on it.
    assert "training data of yolo" in choose_models(replace(fused, models=tuple(mixed)), replace(study, fold=None))[1][0]


def test_a_damaged_model_is_left_out_reported_and_tried_again(runs, gallery, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    system, warm = find_systems(list_runs([tmp_path / "runs"]))[0], WarmModels()
    study = opened(gallery, 0)
    weights = tmp_path / "runs" / "yolo" / f"fold{study.fold}" / "bundle" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    answer = warm.answer(system, study)
    assert sorted(answer.models.model) == ["faster_rcnn", "study"] and len(answer.faults) == 1
    said = f"yolo (fold {study.fold}) failed and is left out: BundleError"
    assert any(remark.startswith(said) for remark in answer.remarks)
    weights.write_bytes(whole)
    assert len(warm.answer(system, study).models) == 3
    (weights.parent / "model.json").write_text("{")
    system = find_systems(list_runs([tmp_path / "runs"]))[0]
    assert len(system.models) == 5
    assert any(
        remark.startswith(f"yolo/fold{study.fold} is left out") for remark in WarmModels().answer(system, study).remarks
    )


def test_lungs_are_as_large_as_the_copy_that_a_system_reads(fused, gallery, models):
    study = opened(gallery, 0)
    small = replace(fused, name="small", models=tuple(replace(model, longest_side=COPY // 2) for model in fused.models))
    for system, side in ((fused, COPY), (small, COPY // 2)):
        assert max(models.lungs(system, study, study.images[0])[0].shape) == side


def test_a_segmenter_that_fails_on_one_image_is_used_for_the_next(fused, gallery, monkeypatch):
    warm, places, find = WarmModels(), iter((True, True)), LungSegmenter.find
    monkeypatch.setattr(LungSegmenter, "find", lambda self, xrays: _fails(places) or find(self, xrays))
    study = opened(gallery, 0)
    assert warm.lungs(fused, study, study.images[0]) == (None, "The segmenter finds no lungs.")
    other = opened(gallery, 1)
    assert warm.lungs(fused, other, other.images[0])[0] is not None


def _fails(places):
    if next(places, False):
        raise MemoryError("no room")


def test_a_system_with_one_detector_has_its_boxes_alone(systems, gallery, models):
    """A single list of boxes passes through the fusion unchanged, so the boxes are those of the detector."""
    study = opened(gallery, 2)
    system = replace(systems["yolo"], models=tuple(m for m in systems["yolo"].models if m.fold == study.fold), name="one")
    bundle = next(model.folder for model in system.models if model.model == "yolo")
    own = pd.concat(list(load_predictor(bundle).predict(_xrays(study))))
    own = own[own["score"] >= system.fusion.box_min_score].sort_values(["image_id", "score"], ascending=[True, False])
    found = models.answer(system, study).fused.detections.sort_values(["image_id", "score"], ascending=[True, False])
    np.testing.assert_allclose(found[["score", *BOX]], own[["score", *BOX]], rtol=1e-6)
    assert len(own) and systems["yolo"].detectors == ("yolo",) and systems["faster_rcnn"].detectors == ("faster_rcnn",)


def test_downloaded_files_contain_the_predictions(fused, gallery, models, tmp_path):
    study = opened(gallery, 0)
    answer = models.answer(fused, study)
    rows = write_rows(tmp_path, answer, study, fused)
    write_answer(tmp_path / "answer.json", answer, study, fused)
    studies, nones, detections = as_tables(read_submission(rows))
    told = json.loads((tmp_path / "answer.json").read_text())
    assert studies.study_id.tolist() == [study.study_id] == [told["study_id"]]
    assert studies.iloc[0][list(STUDY_CLASSES)].tolist() == pytest.approx([told["study"][name] for name in STUDY_CLASSES])
    for image in told["images"]:
        assert nones.set_index("image_id").none[image["image_id"]] == pytest.approx(image["none"])
        rows = detections[detections.image_id == image["image_id"]].sort_values("score", ascending=False)
        assert rows.score.tolist() == pytest.approx([box["score"] for box in image["boxes"]], abs=5e-5)
        np.testing.assert_allclose(rows[list(BOX)], [[box[side] for side in BOX] for box in image["boxes"]], atol=0.05)
    assert "Not for diagnosis" in told["note"] and len(told["models"]) == 3


def test_values_without_a_model_are_class_frequencies_in_csv_and_null_in_json(fused, gallery, models, tmp_path):
    detectors = replace(fused, name="detectors", models=tuple(m for m in fused.models if "boxes" in m.answers))
    study = opened(gallery, 0)
    answer = models.answer(detectors, study)
    rows = write_rows(tmp_path, answer, study, detectors)
    write_answer(tmp_path / "answer.json", answer, study, detectors)
    assert json.loads((tmp_path / "answer.json").read_text())["study"] is None
    classifier = replace(fused, name="classifier", models=tuple(m for m in fused.models if "boxes" not in m.answers))
    write_answer(tmp_path / "answer.json", models.answer(classifier, study), study, classifier)
    told = json.loads((tmp_path / "answer.json").read_text())
    assert told["study"] is not None and all(image["boxes"] is None for image in told["images"])
    typical = read_submission(rows).studies.set_index("label").score["typical"]
    assert typical == pytest.approx(PRIORS["typical"], abs=1e-6)


@pytest.fixture
def loaded(monkeypatch):
    """The folders of the models that have been loaded, in this order."""
    folders = []
    monkeypatch.setattr(
        "kitlib.inference.loaded_models.load_predictor",
        lambda folder, **given: folders.append(folder) or load_predictor(folder, **given),
    )
    return folders


def test_models_load_once_and_a_repeated_question_is_not_predicted_again(fused, gallery, loaded):
    warm = WarmModels()
    first = warm.answer(fused, opened(gallery, 0))
    assert warm.answer(fused, opened(gallery, 0)) is first and len(loaded) == 3
    other = next(place for place in range(1, 16) if opened(gallery, place).fold == opened(gallery, 0).fold)
    warm.answer(fused, opened(gallery, other))
    assert len(loaded) == len(set(loaded)) == 3


def test_models_are_loaded_beforehand_and_missing_ones_are_tried_again(fused, loaded, caplog):
    present, warm = fused.models[0], WarmModels()
    missing = replace(present, folder=Path("gone"))
    system = replace(fused, models=(missing, present))
    warm.load(system)
    assert loaded == [missing.folder, present.folder] and "gone cannot be loaded" in caplog.text
    warm.load(system)
    assert loaded == [missing.folder, present.folder, missing.folder]


def test_a_segmenter_is_loaded_beforehand(systems, monkeypatch):
    begun = []
    monkeypatch.setattr("kitlib.inference.cached_lungs.CachedLungs.begin", lambda lungs: begun.append(lungs.bundle))
    WarmModels().load(systems["lungs"])
    assert begun == [systems["lungs"].lungs]


def test_the_answer_that_was_not_asked_for_longest_is_forgotten(systems, gallery, monkeypatch):
    monkeypatch.setattr("kitlib.page.warm_models.CACHED_ANSWERS", 2)
    given = [opened(gallery, place) for place in range(12)]
    studies = list({study.study_id: study for study in given if study.fold == given[0].fold}.values())[:3]
    warm, system = WarmModels(), systems["yolo"]
    first, second = (warm.answer(system, study) for study in studies[:2])
    assert warm.answer(system, studies[0]) is first
    third = warm.answer(system, studies[2])
    assert warm.answer(system, studies[0]) is first and warm.answer(system, studies[2]) is third
    assert warm.answer(system, studies[1]) is not second


def test_heat_and_lungs_lie_on_the_decoded_copy(fused, gallery, models):
    study = opened(gallery, 0)
    pixels = study.read(study.images[0], COPY).pixels
    name, heat = models.heat(fused, study, study.images[0], "typical")
    assert name == f"study, fold {study.fold}" and heat.shape == pixels.shape and 0 <= heat.min() <= heat.max() <= 1
    assert models.heat(fused, study, study.images[0], "none")[0] == name
    # The segmenter of tests/small_lungs.py finds lungs where pixels are bright.
    mask, why = models.lungs(fused, study, study.images[0])
    assert why == ""
    assert mask.shape == pixels.shape and pixels[mask].mean() > pixels[~mask].mean()
    none = models.lungs(replace(fused, lungs=None), study, study.images[0])
    assert none == (None, "These models have no lung segmenter.")
    detectors = replace(fused, models=tuple(model for model in fused.models if "boxes" in model.answers))
    with pytest.raises(ValueError, match=r"none of the models of .* predicts 'typical'"):
        models.heat(detectors, study, study.images[0], "typical")


def test_an_ensemble_stacks_the_study_models_and_its_failure_is_reported(fused, gallery, tmp_path):
    study, warm = replace(opened(gallery, 0), fold=None), WarmModels()
    plain = warm.answer(fused, study).fused.studies
    one = Ensemble("stack", "weighted", ("study",), tuple(STUDY_CLASSES), "study_id", 2.0, weights={"learners": np.ones(1)})
    write_ensemble(tmp_path / "one", one)
    stacked = warm.answer(replace(fused, name="stacked", ensemble=tmp_path / "one"), study).fused.studies
    # negative is mixed with none afterwards; for the others the temperature 2 gives p^(1/2) / sum of p^(1/2)
    p = torch.tensor([load_mean(fused, study)[name] for name in STUDY_CLASSES]).sqrt()
    expected = (p / p.sum()).numpy()[1:]
    np.testing.assert_allclose(stacked.iloc[0][list(STUDY_CLASSES)[1:]].to_numpy(float), expected, rtol=1e-5)
    assert not np.allclose(plain.iloc[0][list(STUDY_CLASSES)[1:]].to_numpy(float), expected, rtol=1e-3)
    strange = replace(one, learners=("other",))
    write_ensemble(tmp_path / "strange", strange)
    answer = warm.answer(replace(fused, name="strange", ensemble=tmp_path / "strange"), study)
    assert answer.remarks == (
        "The ensemble: none of its learners (other) has predicted; the study models are fused without it.",
    )
    pd.testing.assert_frame_equal(answer.fused.studies, plain)
    answer = warm.answer(replace(fused, name="gone", ensemble=tmp_path / "gone"), study)
    assert [remark[:20] for remark in answer.remarks] == ["The ensemble failed:"]
    pd.testing.assert_frame_equal(answer.fused.studies, plain)


def load_mean(system, study):
    """Return the study's probabilities as a plain mean over folds and images."""
    folders = [model.folder for model in system.models if model.model == "study"]
    tables = [pd.concat(list(load_predictor(folder).predict(_xrays(study)))) for folder in folders]
    return pd.concat(tables)[list(STUDY_CLASSES)].mean()


def test_systems_follow_a_folder_that_was_moved_and_say_what_is_missing(runs, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(runs, moved)
    names = [system.name for system in find_systems(list_runs([moved]))]
    assert names == ["fuse: study + yolo + faster_rcnn", "yolo", "faster_rcnn", "lungs"]
    assert all(str(model.folder).startswith(str(moved)) for model in find_systems(list_runs([moved]))[0].models)
    shutil.rmtree(moved / "fuse")
    plain = find_systems(list_runs([moved]))[0]
    assert plain.name == "all models, equal weights" and len(plain.models) == 6 and not plain.fusion.model_weights
    for name in ("study", "yolo", "faster_rcnn", "lungs"):
        shutil.rmtree(moved / name)
    with pytest.raises(RunError, match=re.escape("`make demo`")):
        find_systems(list_runs([moved]))


def test_names_replace_keys(fused, copies, models, runs):
    files = sorted(next((runs.parent / "inputs").glob("siim-*/test")).glob("*/*/*.dcm"))[:2]
    study = open_uploads(files, copies, COPY)
    told = with_image_names(models.answer(fused, study).fused, study)
    assert set(told.nones.image_id) == set(told.detections.image_id) == {file.stem for file in files}
