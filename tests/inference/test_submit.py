"""Submissions when things go wrong: slow models, broken models, broken files, no time, other test sets."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydicom import dcmread

from kitlib.bundle import STATED, save_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.contract import Competition
from kitlib.competitions.siim_covid19 import SIIM_COVID19, SiimFusion
from kitlib.deadline import Deadline
from kitlib.errors import CacheError, PredictionError, SubmissionError, UnreadableXray
from kitlib.fusion.ensemble_bundle import Ensemble, read_ensemble, write_ensemble
from kitlib.fusion.ensembles import combine
from kitlib.fusion.model_fusion import write_settings
from kitlib.inference import prediction_process
from kitlib.inference.cached_lungs import CachedLungs, LungsReport
from kitlib.inference.model_queue import Model
from kitlib.inference.predict import VIEWS, study_and_image_scores
from kitlib.inference.prediction_process import PredictionProcess
from kitlib.inference.submit import LAST_SHARE, SubmissionRun, SubmitSettings
from kitlib.lungs.finders import Lungs
from kitlib.models.classifier import OUTPUTS, StudyClassifier
from kitlib.models.segmenter import Segmenter
from kitlib.paths import project_root
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.fields import SegmenterRecipe, StudyRecipe
from kitlib.scoring.submission_csv import PRIORS, read_submission
from kitlib.scoring.temperature import scaled
from kitlib.scoring.validate import validate
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.dicom import decode_xray
from tests.small_bundles import edit_record
from tests.small_xrays import wait_for_a_minute

pytestmark = pytest.mark.usefixtures("quick_processes")
DAMAGED = 2
SETTINGS = SubmitSettings(time_limit_s=600, longest_side=64, workers=1, batch_size=4)
RECIPE = StudyRecipe(backbone="test_resnet", image_size=32, hidden=8)


@pytest.fixture(scope="module")
def competition(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    sizes = {"train_studies": 4, "test_studies": 12, "side": 96, "damaged_test_files": DAMAGED}
    return write_competition(folder, folder / "truth", seed=3, workers=1, progress=False, **sizes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Bundles of two folds of an untrained classifier, in the layout of build_kernel.py."""
    folder, bundles = tmp_path_factory.mktemp("weights"), []
    for fold in (0, 1):
        torch.manual_seed(fold)
        model = StudyClassifier(RECIPE)
        record = {
            "family": "study",
            "model": "small",
            "classes": OUTPUTS,
            "recipe": asdict(RECIPE),
            "architecture": {},
            "longest_side": 64,
            "image_size": RECIPE.image_size,
            "placement": RECIPE.placement,
            "mean": model.mean,
            "std": model.std,
            "fold": fold,
            "data_fingerprint": "",
            "precision": "float32",
            "validation": {},
        }
        save_bundle(folder / f"small-fold{fold}", model.state_dict(), record)
        bundles.append({"folder": f"small-fold{fold}", "model": "small", "fold": fold})
    (folder / "weights.json").write_text(json.dumps({"bundles": bundles}))
    write_settings(SiimFusion(), folder / "fusion.json")
    return folder


def on_priors(path: Path) -> set[str]:
    """Return the studies whose `typical` is the placeholder prediction."""
    studies = read_submission(path).studies
    return set(studies.study_id[(studies.label == "typical") & ((studies.score - PRIORS["typical"]).abs() < 1e-6)])


def submit(competition, weights, folder, settings=SETTINGS) -> tuple[Path, pd.DataFrame]:
    run = SubmissionRun(competition, folder / "submission.csv", settings)
    run.predict(weights, folder / "scratch")
    print(run.ledger.to_string())
    ledger = run.finish()
    assert ledger.seconds.between(0, 600).all()
    return run.output, ledger


@pytest.mark.gpu
def test_every_row_is_predicted_except_those_of_damaged_files(competition, weights, tmp_path):
    path, ledger = submit(competition, weights, tmp_path)
    assert validate(competition / "sample_submission.csv", path) == []
    decoding = ledger[(ledger.stage == "decode") & ledger.note.str.contains("keeps its placeholder prediction")]
    assert len(decoding) == DAMAGED
    files = pd.Series({each.stem: each.parts[-3] for each in competition.glob("test/*/*/*.dcm")})
    damaged = {note.split()[0] for note in decoding.note}
    readable = set(files[~files.index.isin(damaged)])
    assert on_priors(path) == set(files) - readable
    assert ledger.stage.tolist().count("fuse and write") == 2
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("only_projections", [False, True])
def test_a_ct_image_is_a_row_of_the_ledger_and_predicted_unless_refused(competition, weights, tmp_path, only_projections):
    copy = shutil.copytree(competition, tmp_path / "competition")
    readable = (path for path in sorted(copy.glob("test/*/*/*.dcm")) if _is_readable(path))
    dataset = dcmread(path := next(readable))
    dataset.Modality = "CT"
    dataset.save_as(path)
    path, ledger = submit(copy, weights, tmp_path, replace(SETTINGS, only_projections=only_projections))
    (row,) = ledger[ledger.note.str.contains("not a projection X-ray: Modality CT")].itertuples()
    outcome = "keeps its placeholder prediction" if only_projections else "decoded with a warning"
    assert (row.stage, row.files) == ("decode", 1) and outcome in row.note
    assert len(on_priors(path)) <= DAMAGED + only_projections


@pytest.mark.parametrize(("rerun", "files"), [("", 4), ("1", 14)])
def test_a_quick_save_predicts_few_files_but_the_scored_rerun_all(competition, weights, tmp_path, monkeypatch, rerun, files):
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", rerun)
    path, ledger = submit(competition, weights, tmp_path, replace(SETTINGS, quick_save=4))
    assert validate(competition / "sample_submission.csv", path) == []  # every row, whatever was predicted
    notes = ledger[ledger.stage == "quick save"].note.tolist()
    assert notes == ([] if rerun else ["QUICK SAVE: only 4 of 14 files are predicted; the scored rerun predicts all"])
    damaged = sum("keeps its placeholder prediction" in note for note in ledger.note)
    assert ledger[ledger.stage == "small-fold0"].files.tolist() == [files - damaged]
    assert rerun or len(on_priors(path)) >= 8  # the 4 files belong to at most 4 of the 12 studies
    # A test set that is not larger than a quick save is predicted as a whole.
    whole = SubmissionRun(competition, tmp_path / "submission.csv", replace(SETTINGS, quick_save=14))
    assert len(whole.images) == 14 and "quick save" not in set(whole.ledger.stage)


def test_the_default_settings_have_siims_limit_and_leave_the_rest_to_models_and_machine():
    settings = SubmitSettings()
    assert settings.time_limit_s == 9 * 3600 and 0.5 <= settings.share < LAST_SHARE < 1
    # 0: the models' longest side, a process for each core or GPU, and no quick save.
    assert (settings.longest_side, settings.workers, settings.processes, settings.quick_save) == (0, 0, 0, 0)
    assert settings.only_projections is False


def test_outside_kaggle_a_quick_save_predicts_all(competition, tmp_path):
    assert len(SubmissionRun(competition, tmp_path / "submission.csv", replace(SETTINGS, quick_save=4)).images) == 14


def _is_readable(path):
    try:
        return decode_xray(path) is not None
    except UnreadableXray:
        return False


def test_without_any_weights_the_placeholder_predictions_remain(competition, tmp_path):
    path, ledger = submit(competition, tmp_path / "nothing", tmp_path)
    row = ledger.set_index("stage").loc["predict"]
    assert "failed: InputNotFound" in row.note and row.files == 0
    assert validate(competition / "sample_submission.csv", path) == []


def test_placeholders_alone_are_an_error_unless_asked_for_or_on_kaggle(competition, weights, tmp_path, monkeypatch):
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.predict(str(tmp_path / "nothing"), tmp_path / "scratch")
    with pytest.raises(SubmissionError, match=r"submission\.csv contains only placeholder predictions.*allow_placeholders"):
        run.check(allow_placeholders=False)
    run.check(allow_placeholders=True)
    run.predict(str(weights), tmp_path / "scratch")
    run.check(allow_placeholders=False)
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS).check(allow_placeholders=False)


def test_predictions_that_decide_no_row_are_an_error_too(competition, weights, tmp_path):
    """The competition takes nothing from what the two models have predicted."""
    none_answered = replace(SIIM_COVID19, fill=lambda ids, fused: (SIIM_COVID19.baseline_rows(ids), ids))
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS, none_answered)
    run.predict(str(weights), tmp_path / "scratch")
    run.finish()
    with pytest.raises(SubmissionError, match=r"no row uses the predictions of small-fold0, small-fold1\. The ledger"):
        run.check(allow_placeholders=False)
    run.check(allow_placeholders=True)
    assert [bundle["predicted"] for bundle in run.usage()] == [0, 0]  # a rehearsal, which runs as on Kaggle, fails by this


def test_a_submission_ends_in_time_even_if_models_hang(competition, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(StudyClassifier, "forward", lambda *_: time.sleep(30))
    began = time.monotonic()
    settings = SubmitSettings(time_limit_s=10, share=0.5, longest_side=64, workers=1, batch_size=4)
    path, ledger = submit(competition, weights, tmp_path, settings)
    assert time.monotonic() - began < 10
    assert ledger.set_index("stage").note["small-fold0"] == "time was up"
    assert validate(competition / "sample_submission.csv", path) == []


@pytest.mark.parametrize(
    ("limit_s", "started_s_ago", "planned_s", "latest_s", "smallest_s"),
    # Models may use 65 % of the limit, the last one 90 %; but as much time remains for the end as the start has taken, at
    # most a minute. The smallest limit leaves time for models: twice the start, or a start within 65 %.
    [
        (100, 4, 65, 90, None),
        (10, 2, 6.5, 8, None),
        (10, 4, 6, 6, None),
        (10, 6, 4, 4, 12),
        (4, 6, 0, 0, 12),
        (200, 100, 130, 140, None),
        (100, 200, 40, 40, 307.7),
    ],
)
def test_a_submission_leaves_time_to_end(
    competition, tmp_path, monkeypatch, limit_s, started_s_ago, planned_s, latest_s, smallest_s
):
    monkeypatch.setenv("KIT_TIME_LIMIT_S", str(limit_s))
    monkeypatch.setenv("KIT_STARTED", str(time.monotonic() - started_s_ago))
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    assert run.deadline.left() + started_s_ago == pytest.approx(planned_s, abs=1)
    assert run.last_deadline.left() + started_s_ago == pytest.approx(latest_s, abs=1)
    notes = run.ledger.note.str.extract(r"no time for models.*the smallest limit that allows any is (\d+) s")[0].dropna()
    assert len(notes) == (smallest_s is not None)
    assert all(smallest_s <= int(seconds) <= smallest_s + 3 for seconds in notes)
    assert validate(competition / "sample_submission.csv", run.output) == []


def test_slow_files_are_listed_in_the_ledger(competition, weights, tmp_path, monkeypatch):
    decode = XrayCache.decode

    def slow(self, images, workers, limit, pool):
        for outcome in decode(self, images, workers, limit, pool):
            limit()
            yield replace(outcome, seconds=19.9)

    monkeypatch.setattr(XrayCache, "decode", slow)
    # A tenth of 0.65 x 60 s is soon used up, and then a file gets less than the usual 20 s.
    _, ledger = submit(competition, weights, tmp_path, replace(SETTINGS, time_limit_s=60))
    row = ledger[ledger.note.str.contains("the time limit was lowered from 20 s to")].iloc[0]
    files = len(list(competition.glob("test/*/*/*.dcm")))
    assert (row.stage, row.files) == ("decode", files) and f"{files * 19.9:.0f} s in all" in row.note


def test_a_submission_ends_even_if_a_file_is_still_being_decoded(competition, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.xrays.cache.decode_into", wait_for_a_minute)
    began = time.monotonic()
    settings = replace(SETTINGS, time_limit_s=30, share=0.1)
    path, ledger = submit(competition, weights, tmp_path, settings)
    assert time.monotonic() - began < 30
    assert ledger.set_index("stage").note["small-fold0"] == "time was up"
    assert validate(competition / "sample_submission.csv", path) == []


def test_the_first_model_keeps_its_predictions_when_time_is_up(competition, weights, tmp_path, monkeypatch):
    batches, forward = [], StudyClassifier.forward

    def time_is_up_at_third_batch(self, pixels):
        batches.append(pixels)
        if len(batches) == 3:
            signal.raise_signal(signal.SIGALRM)
        return forward(self, pixels)

    monkeypatch.setattr(StudyClassifier, "forward", time_is_up_at_third_batch)
    path, ledger = submit(competition, weights, tmp_path)
    notes = ledger.set_index("stage")
    assert (notes.files["small-fold0"], notes.note["small-fold0"]) == (8, "time was up")
    assert "small-fold1" not in notes.index
    assert 0 < len(on_priors(path)) < read_submission(path).studies.study_id.nunique()


class Remaining:
    """A deadline that is never enforced; `seconds` remain, one value for each model that runs, and an hour before."""

    def __init__(self, *seconds):
        self.seconds = iter((3600.0, *seconds))

    def left(self):
        return next(self.seconds)

    def enforced(self):
        return nullcontext()


def test_a_first_model_stopped_after_its_share_continues_at_the_end(competition, weights, tmp_path):
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.deadline = Remaining(0.0, 60.0, 60.0)  # for the first model, the second model, and the first model again
    run.predict(weights, tmp_path / "scratch")
    rows = [row for row in run.ledger.to_dict("records") if row["stage"] == "small-fold0"]
    readable = len(run.images) - DAMAGED
    assert [row["files"] for row in rows] == [SETTINGS.batch_size, readable - SETTINGS.batch_size]
    assert rows[0]["note"].startswith("stopped after its share")
    assert len(on_priors(run.output)) <= DAMAGED


def test_without_tuned_fusion_the_defaults_are_used(competition, weights, tmp_path):
    untuned = tmp_path / "weights"
    shutil.copytree(weights, untuned)
    (untuned / "fusion.json").unlink()
    path, _ = submit(competition, untuned, tmp_path)
    assert len(on_priors(path)) <= DAMAGED


def test_after_a_full_disk_decoded_images_are_predicted_and_the_rest_is_noted(competition, weights, tmp_path, monkeypatch):
    decode = XrayCache.decode

    def full_after_five(self, *args, **kwargs):
        for number, outcome in enumerate(decode(self, *args, **kwargs)):
            if number == 5:
                raise CacheError("no space left")
            yield outcome

    monkeypatch.setattr(XrayCache, "decode", full_after_five)
    path, ledger = submit(competition, weights, tmp_path)
    last = ledger[ledger.stage == "decode"].iloc[-1]
    assert (last.files, last.note) == (
        len(list(competition.glob("test/*/*/*.dcm"))) - 5,
        "never decoded; failed: CacheError: no space left",
    )
    assert 0 < len(on_priors(path)) < read_submission(path).studies.study_id.nunique()


def test_a_further_model_must_have_time_for_all_images(competition, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.inference.submit.IMAGES_BEFORE_JUDGING", 4)
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.deadline = Remaining(60.0, 1e-3)
    run.predict(weights, tmp_path / "scratch")
    notes = run.finish().set_index("stage")
    assert notes.files["small-fold1"] == 0
    assert notes.note["small-fold1"].startswith("dropped: it needs")
    assert len(on_priors(run.output)) <= DAMAGED


def with_recipe(weights, copy, names=("small-fold0", "small-fold1"), **fields) -> Path:
    """Return a copy of `weights` in which the recipes of the bundles `names` have the given fields."""
    shutil.copytree(weights, copy)
    for name in names:
        recipe = json.loads((copy / name / "model.json").read_text())["recipe"]
        edit_record(copy / name, recipe=recipe | fields)
    return copy


@pytest.mark.gpu
def test_a_bundles_views_are_used_and_missed_lungs_are_noted(competition, weights, tmp_path, monkeypatch):
    calls, forward = [], StudyClassifier.forward
    monkeypatch.setattr("kitlib.lungs.finders.lung_box", lambda _: None)
    monkeypatch.setattr(StudyClassifier, "forward", lambda self, pixels: calls.append(len(pixels)) or forward(self, pixels))
    path, ledger = submit(competition, with_recipe(weights, tmp_path / "weights", views=list(VIEWS)), tmp_path)
    readable = len(list(competition.glob("test/*/*/*.dcm"))) - DAMAGED
    assert sum(calls) == 2 * len(VIEWS) * readable  # two folds
    rows = ledger[ledger.note.str.startswith("no lungs found")]
    assert rows.stage.tolist() == ["small-fold0", "small-fold1"] and rows.files.tolist() == [readable] * 2
    assert len(on_priors(path)) <= DAMAGED


def each_batch_takes(monkeypatch, seconds):
    """Let every batch and view take `seconds`, by a clock that nothing else advances."""
    clock, forward = [0.0], StudyClassifier.forward

    def slow(self, pixels):
        clock[0] += seconds
        return forward(self, pixels)

    monkeypatch.setattr(StudyClassifier, "forward", slow)
    monkeypatch.setattr("kitlib.inference.submit.time", SimpleNamespace(monotonic=lambda: clock[0]))


@pytest.mark.parametrize(("views", "fits"), [(["full"], True), (list(VIEWS), False)])
def test_a_model_is_judged_by_the_pace_of_its_views(competition, weights, tmp_path, monkeypatch, views, fits):
    each_batch_takes(monkeypatch, 1)
    monkeypatch.setattr("kitlib.inference.submit.IMAGES_BEFORE_JUDGING", 4)
    monkeypatch.setattr("kitlib.lungs.finders.lung_box", lambda pixels: np.array([0, 0, *pixels.shape[::-1]]))
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    batches = -(-len(run.images) // SETTINGS.batch_size)
    run.deadline = Remaining(1e3, 2.0 * batches)
    run.predict(with_recipe(weights, tmp_path / "weights", ["small-fold1"], views=views), tmp_path / "scratch")
    note = run.finish().set_index("stage").note["small-fold1"]
    needed = len(views) * len(run.images) / SETTINGS.batch_size
    dropped = f"dropped: it needs {needed:.0f} s, but only {2 * batches:.0f} s remained"
    assert note == ("" if fits else dropped)


def test_a_model_of_none_alone_is_the_first_of_its_kind(competition, weights, tmp_path, monkeypatch):
    shared = with_recipe(weights, tmp_path / "study", ["small-fold0"], outputs="study")
    shared = with_recipe(shared, tmp_path / "weights", ["small-fold1"], outputs="none")
    each_batch_takes(monkeypatch, 1000)
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.deadline = Remaining(100.0, 100.0, 5000.0, 5000.0)
    run.predict(shared, tmp_path / "scratch")
    rows = [row for row in run.ledger.to_dict("records") if row["stage"].startswith("small-fold")]
    # The first model leaves half of the time to the second, which may also end with a part of the images.
    assert [row["note"].split(";")[0] for row in rows] == [
        *("stopped after its share of 50 s", "stopped after its share of 100 s", "", "")
    ]
    assert len(on_priors(run.output)) <= DAMAGED


def test_findings_and_unreadable_bundles_are_refused_and_noted(competition, weights, tmp_path):
    other = tmp_path / "weights"
    shutil.copytree(weights, other)
    edit_record(other / "small-fold0", family="findings", classes=["Mass"])
    manifest = json.loads((other / "weights.json").read_text())
    manifest["bundles"].insert(0, manifest["bundles"][0] | {"folder": "gone"})
    (other / "weights.json").write_text(json.dumps(manifest))
    path, ledger = submit(competition, other, tmp_path)
    notes = ledger.set_index("stage").note
    assert "small predicts classes (Mass), of which a submission" in notes["small-fold0"]
    assert notes["gone"].startswith("failed: BundleError") and "gone/model.json is missing" in notes["gone"]
    assert notes["small-fold1"] == "" and len(on_priors(path)) <= DAMAGED


OF_MASKS = {"lungs": "masks", "views": ["lungs"]}


def with_lungs(folder) -> Path:
    """Add the bundle of an untrained segmenter to the weights, in the layout of build_kernel.py."""
    torch.manual_seed(5)
    recipe = SegmenterRecipe(image_size=64, width=0.125)
    model = Segmenter(recipe)
    record = {"family": "segmenter", "model": "unet", "classes": ["lungs"], "recipe": asdict(recipe), "architecture": {}}
    record |= {"longest_side": 64, "image_size": 64, "placement": recipe.placement, "mean": model.mean, "std": model.std}
    save_bundle(
        folder / "lungs",
        model.state_dict(),
        record | {"fold": 0, "data_fingerprint": "", "precision": "float32", "validation": {}},
    )
    contents = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps(contents | {"lungs": "lungs"}))
    return folder


class Segmenting:
    """Finds a frame and a mask of the left half in every image except two; `asked` lists the images in order."""

    def __init__(self):
        self.asked, self.missed = [], set()

    def find(self, xrays):
        self.asked += [xray.image_id for xray in xrays]
        self.missed |= set(self.asked[:2])
        return [self.lungs(xray) for xray in xrays]

    def lungs(self, xray):
        if xray.image_id in self.missed:
            return Lungs(None)
        mask = np.zeros(xray.pixels.shape, bool)
        mask[:, : mask.shape[1] // 2] = True
        return Lungs(np.array([0, 0, xray.columns / 2, xray.rows]), mask)


@pytest.fixture(scope="module")
def of_whole_images(competition, weights, tmp_path_factory) -> pd.Series:
    return scores_of(submit(competition, weights, tmp_path_factory.mktemp("whole"))[0])


def scores_of(path) -> pd.Series:
    studies = read_submission(path).studies
    return studies.set_index(["study_id", "label"]).score.sort_index()


@pytest.mark.parametrize("masked", [False, True])
def test_each_image_is_segmented_once_for_all_models_and_missed_lungs_are_noted(
    competition, weights, of_whole_images, tmp_path, monkeypatch, masked
):
    segmenter = Segmenting()
    monkeypatch.setattr("kitlib.inference.cached_lungs.load_segmenter", lambda *_, **__: segmenter)
    shared = with_lungs(with_recipe(weights, tmp_path / "weights", **OF_MASKS, masked=masked))
    path, ledger = submit(competition, shared, tmp_path)
    readable = len(list(competition.glob("test/*/*/*.dcm"))) - DAMAGED
    assert sorted(segmenter.asked) == sorted(set(segmenter.asked)) and len(segmenter.asked) == readable
    notes = ledger.set_index("stage")
    assert (notes.files["lungs"], notes.note["lungs"]) == (readable, "2 images without plausible lungs are used uncropped")
    rows = ledger[ledger.note.str.startswith("no lungs found")]
    assert rows.stage.tolist() == ["small-fold0", "small-fold1"] and rows.files.tolist() == [2, 2]
    assert len(on_priors(path)) <= DAMAGED
    assert (scores_of(path) - of_whole_images).abs().max() > 1e-4


@pytest.mark.gpu
def test_a_real_segmenter_runs_if_a_model_needs_it(competition, weights, tmp_path):
    # The segmenter is untrained; the test is that it predicts each image once.
    shared = with_lungs(with_recipe(weights, tmp_path / "weights", ["small-fold1"], **OF_MASKS))
    path, ledger = submit(competition, shared, tmp_path)
    assert ledger.set_index("stage").files["lungs"] == len(list(competition.glob("test/*/*/*.dcm"))) - DAMAGED
    assert len(on_priors(path)) <= DAMAGED and not ledger.note.str.contains("failed").any()
    _, ledger = submit(competition, with_lungs(with_recipe(weights, tmp_path / "unused")), tmp_path / "second")
    assert "lungs" not in set(ledger.stage)


@pytest.mark.parametrize("fault", ["no bundle", "damaged", "another family", "breaks"])
def test_without_a_working_segmenter_all_images_are_used_uncropped(
    competition, weights, of_whole_images, tmp_path, monkeypatch, fault
):
    shared = with_recipe(weights, tmp_path / "weights", **OF_MASKS)
    if fault != "no bundle":
        with_lungs(shared)
    if fault == "damaged":
        (shared / "lungs" / "weights.safetensors").write_bytes(b"no weights")
    elif fault == "another family":
        shutil.copytree(shared / "small-fold0", shared / "lungs", dirs_exist_ok=True)
    elif fault == "breaks":
        monkeypatch.setattr("kitlib.inference.segment_lungs.LungSegmenter.find", lambda *_: {}["a bug"])
    path, ledger = submit(competition, shared, tmp_path)
    rows = ledger[ledger.stage == "lungs"]
    assert rows.files.tolist() == [0] and rows.note.iloc[0].startswith("failed: ")
    assert rows.note.iloc[0].endswith("all further images are used uncropped")
    readable = len(list(competition.glob("test/*/*/*.dcm"))) - DAMAGED
    assert ledger[ledger.note.str.startswith("no lungs found")].files.tolist() == [readable] * 2
    assert (scores_of(path) - of_whole_images).abs().max() < 1e-6 and len(on_priors(path)) <= DAMAGED


def test_a_segmenter_is_no_model_of_a_submission(competition, weights, tmp_path):
    other = with_lungs(shutil.copytree(weights, tmp_path / "weights"))
    contents = json.loads((other / "weights.json").read_text())
    contents["bundles"].insert(0, {"folder": "lungs"})
    (other / "weights.json").write_text(json.dumps(contents))
    path, ledger = submit(competition, other, tmp_path)
    assert "unet predicts lungs (lungs), of which a submission" in ledger.set_index("stage").note["lungs"]
    assert len(on_priors(path)) <= DAMAGED


def with_ensemble(weights, copy) -> Path:
    """Return `weights` with its two folds as two models, small and other, and a FLANNEL of both, as in build_kernel.py."""
    shutil.copytree(weights, copy)
    edit_record(copy / "small-fold1", model="other", fold=0)
    rng = np.random.default_rng(2)
    learnt = {"weight": rng.normal(size=(2, 64)), "bias": np.array([1.0, -0.5])}
    known = {"method": "flannel", "learners": ("other", "small"), "classes": STUDY_CLASSES[::-1], "key": "study_id"}
    write_ensemble(copy / "ensemble", Ensemble("stacked", **known, temperature=0.5, weights=learnt))
    contents = json.loads((copy / "weights.json").read_text())
    (copy / "weights.json").write_text(json.dumps(contents | {"ensemble": "ensemble"}))
    return copy


def test_study_models_are_stacked_by_the_kernels_ensemble(competition, weights, tmp_path):
    shared = with_ensemble(weights, tmp_path / "weights")
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.predict(shared, tmp_path / "scratch")
    notes = run.finish().set_index("stage")
    scores, _ = study_and_image_scores([chunk for model in run.models for chunk in model.predicted.chunks], run.images)
    assert scores.model.value_counts().to_dict() == dict.fromkeys(("small", "other"), scores.study_id.nunique())
    assert (notes.files["ensemble"], notes.note["ensemble"]) == (scores.study_id.nunique(), "")
    ensemble = read_ensemble(shared / "ensemble")
    written = scores_of(run.output)
    for study, rows in scores.groupby("study_id"):
        found = rows.set_index("model").loc[["other", "small"], list(ensemble.classes)].to_numpy()
        expected = scaled(combine("flannel", ensemble.weights, found[None]), 0.5)[0]
        assert written[study][list(ensemble.classes)].to_numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fault", ["learner", "ensemble"])
def test_without_a_learner_or_the_ensemble_the_plain_mean_is_used_and_noted(competition, weights, tmp_path, fault):
    shared = with_ensemble(weights, tmp_path / "weights")
    broken = shared / ("small-fold1" if fault == "learner" else "ensemble")
    (broken / "weights.safetensors").write_bytes(b"no weights")
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.predict(shared, tmp_path / "scratch")
    notes = run.finish().set_index("stage")
    scores, _ = study_and_image_scores([chunk for model in run.models for chunk in model.predicted.chunks], run.images)
    studies = scores.study_id.nunique()
    if fault == "learner":
        note = f"{studies} of {studies} studies lack other; they get the plain mean of the other learners"
        assert (notes.files["ensemble"], notes.note["ensemble"]) == (0, note) and set(scores.model) == {"small"}
    else:
        assert notes.note["ensemble"].startswith("failed: BundleError: ") and set(scores.model) == {"small", "other"}
        assert notes.note["ensemble"].endswith("; copy both files again; the study models are fused without it")
    written = scores_of(run.output)
    for study, mean in scores.groupby("study_id")[list(STUDY_CLASSES)].mean().iterrows():
        assert written[study][mean.index].to_numpy() == pytest.approx(mean.to_numpy(), abs=1e-6)


def test_a_valid_file_exists_if_killed_during_prediction(competition, weights, tmp_path):
    script = (
        "import sys, time\n"
        "from kitlib.inference import submit\n"
        "run = submit.SubmissionRun(sys.argv[1], sys.argv[2], submit.SubmitSettings(longest_side=64, workers=1))\n"
        "print('priors', flush=True)\n"
        "run.predict(sys.argv[3], sys.argv[4])"
    )
    path = tmp_path / "submission.csv"
    command = [sys.executable, "-c", script, competition, path, weights, tmp_path / "scratch"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=project_root())
    assert process.stdout.readline() == "priors\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert validate(competition / "sample_submission.csv", path) == []


@pytest.mark.parametrize(
    "kind", ["hidden", "flat", "no sample", "unreadable sample", "odd sample", "no files", "no images", "no studies"]
)
def test_any_test_set_gets_its_rows(competition, weights, tmp_path, kind):
    other = tmp_path / "competition"
    shutil.copytree(competition / "test", other / "test")
    sample = pd.read_csv(competition / "sample_submission.csv")
    studies = sorted(path.name for path in (other / "test").iterdir())
    if kind == "hidden":
        sample = sample[~sample.id.str.startswith(tuple(studies[::2]))]
        for study in studies[::2]:
            images = [path.stem for path in (other / "test" / study).glob("*/*.dcm")]
            sample = sample[~sample.id.str.startswith(tuple(images))]
            shutil.rmtree(other / "test" / study)
    elif kind == "flat":
        for path in list((other / "test").glob("*/*/*.dcm")):
            path.rename(other / "test" / path.name)
    elif kind == "no files":
        shutil.rmtree(other / "test")
    elif kind in ("no images", "no studies"):
        sample = sample[sample.id.str.endswith("_study" if kind == "no images" else "_image")]
    expected = sample.id.tolist()
    if kind == "unreadable sample":
        (other / "sample_submission.csv").write_bytes(b"\xff\xfe\x00")
    elif kind == "odd sample":
        rows = pd.concat([sample, sample.head(3), pd.DataFrame({"id": ["total"], "PredictionString": [""]})])
        rows.assign(id=rows.id + " ").to_csv(other / "sample_submission.csv", index=False, header=False, sep=";")
    elif kind != "no sample":
        sample.to_csv(other / "sample_submission.csv", index=False)
    run = SubmissionRun(other, tmp_path / "submission.csv", SETTINGS)
    if kind in ("hidden", "flat"):  # those whose files are searched in another way
        run.predict(weights, tmp_path / "scratch")
        assert len(on_priors(run.output)) <= DAMAGED
    ledger = run.finish()
    assert sorted(pd.read_csv(run.output).id) == sorted(expected)
    if "no sample" not in kind and "unreadable" not in kind:
        assert pd.read_csv(run.output).id.tolist() == expected
    assert (ledger.stage.iloc[-1], ledger.note.iloc[-1]) == ("validate", "valid")
    told = {"unreadable sample": 1, "odd sample": 5, "no sample": 1, "hidden": 0}
    listing = ledger[(ledger.stage == "listing") & ledger.note.str.startswith("sample_submission.csv")]
    assert len(listing) == told.get(kind, len(listing))
    if kind == "flat":
        (row,) = ledger[ledger.stage == "studies"].itertuples()
        # All 14 images; one of the damaged files has no readable header.
        assert (row.files, row.note) == (14, "read from the headers; 1 images are of no study in the submission")


def test_faults_of_the_test_set_are_counted_by_problem(competition, tmp_path):
    faults = [["a.csv", "row 1", "odd"], ["b.csv", "row 2", "small"], ["c.csv", "row 3", "odd"]]
    test = replace(SIIM_COVID19.read_test(competition), faults=pd.DataFrame(faults, columns=["file", "row", "problem"]))
    run = SubmissionRun(competition, tmp_path / "s.csv", SETTINGS, replace(SIIM_COVID19, read_test=lambda _: test))
    rows = run.ledger[run.ledger.stage == "listing"]
    assert list(zip(rows.files, rows.note, strict=True)) == [(2, "a.csv row 1 and 1 more: odd"), (1, "b.csv row 2: small")]


def test_faults_of_the_written_file_are_noted(competition, tmp_path):
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    text = run.output.read_text().splitlines()
    run.output.write_text("\n".join(text[:-1]) + "\n")
    note = run.finish().note.iloc[-1]
    assert note.startswith("Kaggle would reject") and f"1 faults; the first is: no row, {run.ids[-1]}" in note
    with pytest.raises(SubmissionError, match=r"Kaggle would reject .* 1 faults; the first is: no row"):
        run.check(allow_placeholders=True)


def test_wheels_are_counted_and_a_failure_is_noted(competition, tmp_path, monkeypatch):
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.install("")
    assert "wheels" not in set(run.ledger.stage)
    run.install("no-such-dataset")
    monkeypatch.setattr("kitlib.inference.submit.install_wheels", lambda slug: [f"{slug}==1", "b==1"])
    run.install("a")
    failed, installed = run.ledger[run.ledger.stage == "wheels"].itertuples()
    assert failed.files == 0 and failed.note.startswith("failed: InputNotFound: ")
    assert (installed.files, installed.note) == (2, "")


def test_weights_without_a_usable_bundle_are_noted(competition, weights, tmp_path):
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.predict(with_manifest(weights, tmp_path / "weights", bundles=[]), tmp_path / "scratch")
    assert "lists no usable bundle" in run.ledger.set_index("stage").note["predict"] and run.usage() == []


def test_what_processes_tell_of_lungs_is_noted_and_they_are_ended(competition, weights, tmp_path, monkeypatch):
    class Process:
        lungs, killed = LungsReport(3, 1, 0, 1.0, ""), 0

        def load(self, _bundle):
            raise PredictionError("no GPU")

        def kill(self):
            self.killed += 1

    processes = [Process(), Process()]
    processes[1].lungs = None
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    monkeypatch.setattr(run, "_prediction_processes", lambda _: processes)
    run.predict(weights, tmp_path / "scratch")
    rows = run.ledger.set_index("stage")
    assert [process.killed for process in processes] == [1, 1]
    assert rows.files[["lungs"]].tolist() == [3]  # one row
    assert rows.note[["small-fold0", "small-fold1"]].tolist() == ["failed: PredictionError: no GPU"] * 2


def test_placeholder_predictions_need_no_package_that_kaggles_image_lacks():
    absent = ["pebble", "imagecodecs", "ensemble_boxes", "ultralytics", "pylibjpeg", "torch", "pydicom"]
    script = f"import sys; sys.modules |= dict.fromkeys({absent}); import kitlib.inference.submit"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=project_root())


@pytest.fixture
def hostile(competition, weights, tmp_path) -> tuple[Path, Path, dict[str, str]]:
    """Return a competition and weights with something bad of every kind, and what the ledger says, keyed by stage.

    Only the bundles small-fold0 and small-fold1, and the competition's own files, are good.
    """
    copy, record = (
        shutil.copytree(weights, tmp_path / "weights"),
        json.loads((weights / "small-fold0/model.json").read_text()),
    )
    ledger = {}

    def bad(name, words, **changes):
        ledger[name] = words
        shutil.copytree(weights / "small-fold0", copy / name)
        edit_record(copy / name, **changes)
        return copy / name

    (bad("nested", "not valid JSON") / "model.json").write_text("[" * 100_000)
    (bad("text", "not valid JSON") / "model.json").write_text("not JSON")
    bad("outputs", "SettingsError", recipe=record["recipe"] | {"outputs": ["study"]})
    bad("longest_side", "'longest_side' is 1000000000000; expected 1 to 65535", longest_side=10**12)
    (bad("no weights", "damaged or from another run") / "weights.safetensors").write_bytes(b"no weights")
    bad("permuted", "the model's classes are", classes=OUTPUTS[::-1])
    changed = bad("changed", "was changed after it was written") / "model.json"
    changed.write_text(changed.read_text().replace('"negative"', '"x"'))
    model = StudyClassifier(RECIPE)
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    not_number = bad("not a number", "has NaN or infinite values; train the model")
    save_bundle(not_number, model.state_dict(), {key: record[key] for key in STATED})
    other = bad("other", "is not the bundle that weights.json lists")
    entries = [{"folder": name} for name in ledger if name != other.name]
    entries += [5, None, {}, {"folder": 3}, {"folder": "gone"}, {"folder": other.name, "record_sha256": "0"}]
    entries += [{"folder": name} for name in ("small-fold0", "small-fold1")]
    ledger |= {"5": "TypeError", "None": "TypeError", "{}": "KeyError", "3": "TypeError", "gone": "model.json is missing"}
    (copy / "weights.json").write_text(json.dumps({"bundles": entries, "ensemble": 5, "lungs": [1]}))
    ledger["ensemble"] = "the study models are fused without it"
    (copy / "fusion.json").write_text('{"colour": 1}')
    ledger["fusion.json"] = "fused with the default settings"
    folder = shutil.copytree(competition, tmp_path / "competition")
    long = folder / "test" / "long" / "series" / f"{'x' * 210}.dcm"
    long.parent.mkdir(parents=True)
    shutil.copyfile(next(competition.glob("test/*/*/*.dcm")), long)
    return folder, copy, ledger | {"decode": "cannot be a file name"}


def test_damaged_files_and_models_do_not_change_other_predictions(hostile, of_whole_images, tmp_path):
    competition, weights, expected = hostile
    # The default longest_side, 0: that of the good models.
    path, ledger = submit(competition, weights, tmp_path, SubmitSettings(time_limit_s=600, workers=1, batch_size=4))
    for stage, words in expected.items():
        rows = ledger[(ledger.stage == stage) & ledger.note.str.contains(words, regex=False)]
        # Files are counted only where decoding failed.
        assert rows.files.tolist() == [int(stage == "decode")], (stage, ledger.note[ledger.stage == stage].tolist())
    notes = ledger.set_index("stage").note
    assert notes["small-fold0"] == notes["small-fold1"] == "" and notes["validate"] == "valid"
    assert (scores_of(path) - of_whole_images).abs().max() < 1e-6


def with_manifest(weights, copy, **changes) -> Path:
    """Return a copy of `weights` whose weights.json has other values for some keys."""
    shutil.copytree(weights, copy)
    manifest = json.loads((copy / "weights.json").read_text())
    (copy / "weights.json").write_text(json.dumps(manifest | changes))
    return copy


def test_usage_counts_every_listed_bundle(competition, weights, tmp_path):
    copy = with_manifest(weights, tmp_path / "weights", bundles=[{"folder": "small-fold0"}, {"folder": "gone"}])
    run = SubmissionRun(competition, tmp_path / "submission.csv", SETTINGS)
    run.predict(copy, tmp_path / "new" / "scratch")
    readable = len(run.images) - DAMAGED
    assert run.usage() == [
        {"bundle": "small-fold0", "predicted": readable, "readable": readable},
        {"bundle": "gone", "predicted": 0, "readable": readable},
    ]
    fused = run.ledger.set_index("stage").loc["fuse and write"]
    on_placeholders = int(fused.note.split()[0])
    assert 0 < on_placeholders < fused.files == len(run.ids) - on_placeholders


def test_a_model_that_makes_fusion_fail_is_dropped(competition, weights, tmp_path, monkeypatch):
    from kitlib.inference import answer

    fuse = answer.fused_answer

    def failing(probabilities, *others):
        if any((chunk.fold == 1).any() for chunk in probabilities):
            raise RuntimeError("cannot be fused")
        return fuse(probabilities, *others)

    monkeypatch.setattr(answer, "fused_answer", failing)
    path, ledger = submit(competition, weights, tmp_path)
    fused = ledger[ledger.stage == "fuse and write"]
    assert fused.note.tolist()[1:] == ["failed: RuntimeError: cannot be fused; small-fold1 is dropped"]
    assert fused.files.tolist()[0] > 0 and fused.files.tolist()[1] == 0
    assert len(on_priors(path)) <= DAMAGED


def test_a_disk_that_is_full_for_a_while_costs_no_model(competition, weights, tmp_path, monkeypatch):
    write, calls = Competition.write, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the first fusion
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(Competition, "write", failing)
    path, ledger = submit(competition, weights, tmp_path)
    fused = ledger[ledger.stage == "fuse and write"]
    notes = fused.note.tolist()
    assert "No space left" in notes[0] and fused.files.tolist()[0] == 0
    assert "placeholder" in notes[1] and not ledger.note.str.contains("is dropped").any()
    assert len(on_priors(path)) <= DAMAGED


def fail_in(bundle, connection, *arguments):
    """Serve like a prediction process, but die, or wait for ever, when the first model of `bundle` sends predictions."""

    class Failing:
        recv = connection.recv

        def send(self, message):
            if message[0] == "predicted" and message[1][0]["fold"].iloc[0] == 0:
                os._exit(7) if bundle == "dies" else time.sleep(3600)
            connection.send(message)

    prediction_process.serve(Failing(), *arguments)


def count_processes() -> int:
    """Return how many processes this one has started with multiprocessing that still run."""
    return len(multiprocessing.active_children())


def test_two_processes_write_the_same_bytes_as_one(competition, weights, tmp_path):
    written = {}
    for processes in (1, 2):
        settings = replace(SETTINGS, processes=processes)
        path, ledger = submit(competition, weights, tmp_path / str(processes), settings)
        written[processes] = path.read_bytes()
        assert ledger.stage.tolist().count("fuse and write") == 2
        assert sorted(ledger.stage[ledger.stage.str.startswith("small")]) == ["small-fold0", "small-fold1"]
        assert (ledger.note[ledger.stage.str.startswith("small")] == "").all()
    assert written[1] == written[2] and len(on_priors(path)) <= DAMAGED


def damage_a_copy(pipe, settings, *arguments):
    """Serve like a prediction process, after one of two processes has damaged the decoded copy of an image."""
    read = settings.cache.read

    def damage_first(image_id):
        with suppress(FileExistsError):  # if the other process has damaged one
            (settings.cache.folder / "damaged").mkdir()
            (settings.cache.folder / f"{image_id}.safetensors").write_bytes(b"damaged")
        return read(image_id)

    object.__setattr__(settings.cache, "read", damage_first)
    prediction_process.serve(pipe, settings, *arguments)


@pytest.mark.parametrize(
    ("gpus", "processes", "models", "used"),
    [
        (["0", "1"], 0, 3, ["0", "1"]),
        (["0", "1"], 3, 3, ["0", "1", "0"]),
        (["0", "1", "2"], 0, 2, ["0", "1"]),
        (["0", "1"], 0, 1, []),  # this process alone predicts
        (["0"], 0, 3, []),
        ([""], 2, 2, ["", ""]),  # without a GPU
    ],
)
def test_each_gpu_gets_a_process_unless_the_settings_say_how_many_or_models_are_fewer(
    competition, tmp_path, monkeypatch, gpus, processes, models, used
):
    monkeypatch.setattr("kitlib.device.visible_gpus", lambda: gpus)
    run = SubmissionRun(competition, tmp_path / "submission.csv", replace(SETTINGS, processes=processes))
    run.models, run.lungs = [Model(None)] * models, CachedLungs(tmp_path, masked=True)
    started = run._prediction_processes(SimpleNamespace(cache="the cache"))
    assert [process.gpu for process in started] == used
    # Each process finds lungs itself, like the one that predicts alone.
    assert {process.settings.lungs for process in started} == ({(tmp_path, True)} if used else set())
    assert (run.lungs is None) is bool(used)
    assert all((each.settings.cache, each.settings.batch_size) == ("the cache", 4) for each in started)
    assert all(1 <= each.settings.threads <= torch.get_num_threads() for each in started)


def test_a_damaged_copy_is_decoded_again_for_processes_too(competition, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_process, "serve", damage_a_copy)
    path, ledger = submit(competition, weights, tmp_path, replace(SETTINGS, processes=2))
    files = ledger.set_index("stage").files
    assert files["small-fold0"] == files["small-fold1"] == len(list(competition.glob("test/*/*/*.dcm"))) - DAMAGED
    assert len(on_priors(path)) <= DAMAGED


@pytest.mark.parametrize(("fault", "note"), [("dies", "ended with exit code 7"), ("hangs", "was stuck for 5 s")])
def test_a_process_that_dies_or_hangs_costs_only_its_model(competition, weights, tmp_path, monkeypatch, fault, note):
    alone = tmp_path / "alone"
    shutil.copytree(weights, alone)
    bundles = [{"folder": "small-fold1"}]
    (alone / "weights.json").write_text(json.dumps({"bundles": bundles}))
    expected, _ = submit(competition, alone, tmp_path / "one")
    monkeypatch.setattr(prediction_process, "STALLED_S", 5.0)
    monkeypatch.setattr(prediction_process, "serve", partial(fail_in, fault))
    path, ledger = submit(competition, weights, tmp_path / "two", replace(SETTINGS, processes=2))
    notes = ledger.set_index("stage").note
    assert note in notes["small-fold0"] and notes["small-fold1"] == ""
    assert path.read_bytes() == expected.read_bytes()
    assert count_processes() == 0


def test_the_deadline_holds_over_processes_that_hang(competition, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_process, "serve", partial(fail_in, "hangs"))
    began = time.monotonic()
    run = SubmissionRun(competition, tmp_path / "submission.csv", replace(SETTINGS, processes=2))
    run.deadline = Deadline(8)
    run.predict(weights, tmp_path / "scratch")
    assert time.monotonic() - began < 25
    assert run.finish().set_index("stage").note["small-fold0"] == "time was up" and run.faults == []
    assert count_processes() == 0


def test_after_a_failed_model_another_process_starts(competition, weights, tmp_path):
    damaged = shutil.copytree(weights, tmp_path / "weights")
    (damaged / "small-fold0" / "weights.safetensors").write_bytes(b"damaged")
    settings = prediction_process.ProcessSettings(XrayCache(tmp_path, 64), batch_size=4, threads=1)
    process = PredictionProcess(settings, "", Deadline(60))
    with pytest.raises(PredictionError, match="BundleError"):
        process.load(damaged / "small-fold0")
    assert count_processes() == 0
    assert process.load(damaged / "small-fold1").fold == 1 and count_processes() == 1
    process.kill()
    assert count_processes() == 0


def test_a_stopped_model_waits_for_no_image_that_is_decoded_again():
    """The parent stops the model instead of answering that the image can be read now."""
    inbox = prediction_process._Inbox()
    inbox.image_ids.put("damaged")
    connection, read = SimpleNamespace(send=lambda _: inbox.stop()), []
    copies = iter([{}, {"damaged": "restored"}])  # a second attempt would succeed
    cache = SimpleNamespace(read=lambda image_id: next(copies)[image_id])
    thread = threading.Thread(target=lambda: read.extend(inbox.xrays(cache, connection)), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and read == []


def test_a_dropped_model_gets_no_more_predictions():
    record = SimpleNamespace(answers=frozenset({"boxes"}), folder=Path("detector"))
    model, predictor = Model(record), SimpleNamespace(model="a", fold=0, seen=["x"], lungs_missed=0, overflowed=0)
    before = model.predicted
    model.add(pd.DataFrame({"image_id": ["x"]}), predictor, before)
    assert model.predicted.seen == ("x",) and model.may_be_fused
    model.drop()  # as fusion does in another thread
    model.add(pd.DataFrame({"image_id": ["y"]}), predictor, before)
    assert model.predicted.seen == () and not model.may_be_fused
