"""A study classifier's run: outputs, exact resume, refusal of another run, and the validation score."""

import dataclasses
import json
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.bundle import data_fingerprint, read_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import TrainingError
from kitlib.models.box_mask import mask_loss
from kitlib.models.classifier import StudyClassifier, study_loss
from kitlib.runs.finished_run import ExtraImages
from kitlib.scoring.metrics import CALL_METRICS
from kitlib.settings import override
from kitlib.tables import read_table
from kitlib.training.study import StudyTraining, validation_scores
from kitlib.training.xray_dataset import XrayDataset, batches
from tests.small_lungs import stored_lungs
from tests.small_tasks import train_small
from tests.small_xrays import RECIPE, SmallXrays

TIMES = ["seconds", "images_per_s"]
TABLES = ["images", "labels", "boxes"]


def train(folder, small=None, recipe=RECIPE, **options):
    return train_small(folder, small or SmallXrays(32), recipe, **options)


def weights_of(run):
    return read_bundle(run.run_folder / "bundle")[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


@pytest.mark.gpu
def test_a_run_leaves_what_later_stages_read(uninterrupted):
    small, folder = SmallXrays(32), uninterrupted.run_folder
    fold = small.fold_table[small.fold_table.fold == 1]
    images = read_table("image_scores", folder / "tables" / "image_scores.parquet")
    studies = read_table("study_scores", folder / "tables" / "study_scores.parquet")
    assert set(images.image_id) == set(fold.id) and set(images.model) == {"small"} and set(images.fold) == {1}
    assert set(studies.study_id) == set(small.images.study_id[small.images.image_id.isin(fold.id)])
    assert studies[list(STUDY_CLASSES)].sum(axis=1).to_numpy() == pytest.approx(np.ones(len(studies)), abs=1e-5)
    record, _ = read_bundle(folder / "bundle")
    assert record["classes"] == [*STUDY_CLASSES, "none"] and record["recipe"]["backbone"] == "test_resnet"
    assert record["fold"] == 1 and record["validation"]["score"] == pytest.approx(uninterrupted.metrics["best"]["score"])
    assert record["longest_side"] == uninterrupted.metrics["longest_side"] == 50
    assert uninterrupted.history.epoch.tolist() == [1, 2, 3]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    assert uninterrupted.metrics["starting_weights"] == "from scratch" and uninterrupted.metrics["device"] == device
    assert (folder / "figures" / "curves.png").is_file()


def test_the_out_of_fold_tables_have_the_score_that_chose_the_epoch(uninterrupted):
    # Prediction is independent of validation: it loads the bundle, draws its own canvases and averages over studies.
    small = SmallXrays(32)
    studies, images = uninterrupted.tables["study_scores"], uninterrupted.tables["image_scores"]
    truth = small.labels.set_index("id").loc[studies.study_id, list(STUDY_CLASSES)].to_numpy()
    studies_alone = validation_scores(
        np.c_[studies[list(STUDY_CLASSES)], np.zeros(len(studies))], studies.study_id.to_numpy(), truth, np.zeros(len(truth))
    )
    none = (~images.image_id.isin(small.boxes.image_id)).to_numpy(float)
    images_alone = validation_scores(
        np.c_[np.zeros((len(images), 4)), images.none], images.image_id.to_numpy(), np.full((len(images), 4), np.nan), none
    )
    best = uninterrupted.metrics["best"]
    for name in STUDY_CLASSES:
        assert studies_alone[name] == pytest.approx(best[name], abs=1e-6)
    assert images_alone["none"] == pytest.approx(best["none"], abs=1e-6)


def stop_at(monkeypatch, epoch, batch):
    """Make training raise ConnectionError in this epoch and batch (from 0)."""
    step = StudyTraining.training_step

    def dying(self, batch_of_images, number):
        if (self.current_epoch, number) == (epoch, batch):
            raise ConnectionError("the session ended")
        return step(self, batch_of_images, number)

    monkeypatch.setattr(StudyTraining, "training_step", dying)


@pytest.mark.parametrize(("epoch", "batch"), [(0, 2), (1, 0), (2, 3)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, uninterrupted, epoch, batch):
    with monkeypatch.context() as patch:
        stop_at(patch, epoch, batch)
        with pytest.raises(ConnectionError):
            train(tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    torch.manual_seed(12345)  # the random state of a new session
    resumed = train(tmp_path)
    first, second = (read_bundle(folder / "bundle")[1] for folder in (uninterrupted.run_folder, tmp_path))
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=TIMES), uninterrupted.history.drop(columns=TIMES), check_exact=True
    )
    pd.testing.assert_frame_equal(resumed.tables["image_scores"], uninterrupted.tables["image_scores"], check_exact=True)
    pd.testing.assert_frame_equal(resumed.tables["study_scores"], uninterrupted.tables["study_scores"], check_exact=True)


def test_a_run_that_ended_early_and_died_before_its_results_trains_no_further(tmp_path, monkeypatch):
    recipe = override(RECIPE, epochs=6, patience=1, learning_rate=1e-12)  # nothing gets better after the first epoch

    def dies(*_):
        raise ConnectionError("the session ended")

    with monkeypatch.context() as patch:
        patch.setattr("kitlib.training.driver.save_trained", dies)
        with pytest.raises(ConnectionError):
            train(tmp_path, recipe=recipe)
    patched = []
    monkeypatch.setattr(StudyTraining, "training_step", lambda *_: patched.append(1))
    run = train(tmp_path, recipe=recipe)
    assert patched == [] and run.metrics["epochs"] == 2 and run.metrics["best_epoch"] == 1


def test_a_finished_run_is_read_back(uninterrupted, monkeypatch):
    monkeypatch.setattr("kitlib.training.strategy.fit", lambda *_, **__: pytest.fail("trained again"))
    again = train(uninterrupted.run_folder)
    assert again.metrics == uninterrupted.metrics
    pd.testing.assert_frame_equal(again.tables["study_scores"], uninterrupted.tables["study_scores"])
    pd.testing.assert_frame_equal(again.history, uninterrupted.history)


def test_another_recipe_fold_or_data_is_refused(uninterrupted):
    folder = uninterrupted.run_folder
    with pytest.raises(TrainingError, match=r"recipe\.dropout: 0\.5 recorded, 0\.1 requested"):
        train(folder, recipe=override(RECIPE, dropout=0.1))
    with pytest.raises(TrainingError, match="fold: 1 recorded, 0 requested"):
        train(folder, fold=0)
    changed = SmallXrays(32)
    changed.boxes = changed.boxes.iloc[1:]
    with pytest.raises(TrainingError, match="data_fingerprint"):
        train(folder, changed)
    with pytest.raises(TrainingError, match="longest_side: 50 recorded, 40 requested"):
        train(folder, SmallXrays(32, longest_side=40))


def test_a_backbone_frozen_at_random_weights_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r'test_resnet would stay random.*"starting_weights".*"frozen_backbone": false'):
        train(tmp_path, recipe=override(RECIPE, frozen_backbone=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_training_learns_starts_from_a_bundle_and_freezes(tmp_path, caplog):
    # The classes are four grey levels; images of unseen patients must be classified almost perfectly.
    learnt = train(
        tmp_path / "learnt", recipe=override(RECIPE, epochs=16, learning_rate=1e-2, batch_size=8, brightness_contrast=0.0)
    )
    assert learnt.metrics["best"]["score"] > 0.9  # a constant prediction scores 0.25
    recipe = override(RECIPE, epochs=1, frozen_backbone=True, starting_weights=str(tmp_path / "learnt"))
    with caplog.at_level("INFO"):
        started = train(tmp_path / "started", recipe=recipe, limit_train=8, limit_validation=4)
    assert "tensors loaded" in caplog.text and "left random: nothing" in caplog.text
    assert started.metrics["starting_weights"] == f"{tmp_path / 'learnt'}: {len(weights_of(learnt))} tensors, 0 left random"
    assert started.metrics["train_images"] == 8 and len(started.tables["image_scores"]) == 4
    before, after = weights_of(learnt), weights_of(started)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone"))
    assert not torch.equal(before["head.3.weight"], after["head.3.weight"])


class Renamed(SmallXrays):
    """Copies of the images with new ids, such as `extra003` for `image003`, and with other patients and studies."""

    def __post_init__(self):
        super().__post_init__()
        for table in (self.images, self.labels, self.boxes):
            for column in table.columns.intersection(["image_id", "study_id", "patient_id", "id"]):
                table[column] = table[column].str.replace("image", "extra").str.replace("study", "extra_study")
        self.images["patient_id"] = "extra_" + self.images.patient_id

    def read(self, image_id):
        return dataclasses.replace(super().read(image_id.replace("extra", "image")), image_id=image_id)

    def extra(self):
        return ExtraImages(self.images, self.labels, self.boxes, self)


def test_extra_images_are_trained_on_and_never_validated_on(tmp_path, uninterrupted):
    recipe = override(RECIPE, epochs=1)
    run = train(tmp_path, recipe=recipe, extra=Renamed(8).extra(), limit_train=4)
    assert run.metrics["train_images"] == 4 + 8 and run.metrics["validation_images"] == 16
    assert set(run.tables["image_scores"].image_id) == set(uninterrupted.tables["image_scores"].image_id)
    with pytest.raises(TrainingError, match="extra"):
        train(tmp_path, recipe=recipe, limit_train=4)
    with pytest.raises(ValueError, match="image"):
        train(
            tmp_path / "leak",
            recipe=recipe,
            extra=ExtraImages(*(getattr(SmallXrays(), name) for name in TABLES), SmallXrays()),
        )
    assert not (tmp_path / "leak").exists()


@pytest.mark.gpu
def test_training_learns_from_extra_images(tmp_path):
    # The single patient of the task has two of the four classes; the extra images have all of them.
    recipe = override(RECIPE, epochs=8, patience=8, learning_rate=1e-2, batch_size=8, brightness_contrast=0.0)
    taught = train(tmp_path, recipe=recipe, limit_train=4, extra=Renamed(32).extra())
    assert taught.metrics["best"]["score"] > 0.8


CROPS = override(RECIPE, lungs="masks", trained_on="lungs", views=["lungs"], masked=True)


def test_a_run_on_lung_crops_is_validated_on_crops_and_counts_missed_lungs(tmp_path):
    small = SmallXrays(32)
    validation_ids = small.fold_table.id[small.fold_table.fold == 1].tolist()
    lungs = stored_lungs(tmp_path / "lungs", small, missed=[validation_ids[0], validation_ids[1], "image000"])
    run = train(tmp_path / "run", small, override(CROPS, epochs=2), lungs=lungs)
    assert run.metrics["lungs_missed"] == {"training": 1, "predicted": 2}
    assert run.metrics["lungs_fingerprint"] == lungs.fingerprint
    # The predictor crops the images itself, independently of the data set.
    images = run.tables["image_scores"]
    none = (~images.image_id.isin(small.boxes.image_id)).to_numpy(float)
    found = np.c_[np.zeros((len(images), 4)), images.none]
    alone = validation_scores(found, images.image_id.to_numpy(), np.full((len(images), 4), np.nan), none)
    assert alone["none"] == pytest.approx(run.metrics["best"]["none"], abs=1e-6)
    other = stored_lungs(tmp_path / "other", small)
    with pytest.raises(TrainingError, match="lungs_fingerprint"):
        train(tmp_path / "run", small, override(CROPS, epochs=2), lungs=other)


def test_a_training_on_either_resumes_bit_for_bit(tmp_path, monkeypatch):
    small = SmallXrays(32)
    lungs, recipe = stored_lungs(tmp_path / "lungs", small), override(RECIPE, lungs="masks", trained_on="either")
    whole = train(tmp_path / "whole", small, recipe, lungs=lungs)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, 2)
        with pytest.raises(ConnectionError):
            train(tmp_path / "stopped", small, recipe, lungs=lungs)
    resumed = train(tmp_path / "stopped", small, recipe, lungs=lungs)
    assert all(torch.equal(value, weights_of(resumed)[name]) for name, value in weights_of(whole).items())
    # Training on whole images alone gives other weights.
    full = train(tmp_path / "full", small, override(recipe, trained_on="full"), lungs=lungs)
    assert not all(torch.equal(value, weights_of(full)[name]) for name, value in weights_of(whole).items())


def test_lungs_that_do_not_fit_the_recipe_are_refused_before_anything_is_written(tmp_path):
    lungs = stored_lungs(tmp_path / "lungs", SmallXrays(32))
    with pytest.raises(ValueError, match=r"small: .*set lungs_run"):
        train(tmp_path / "run", recipe=CROPS)
    with pytest.raises(ValueError, match=r'small: .*\{"lungs": "masks"\}'):
        train(tmp_path / "run", lungs=lungs)
    assert not (tmp_path / "run").exists()


def test_the_score_is_the_mean_over_classes_with_positives():
    study = np.eye(4)[[0, 0, 1, 2]]
    found = np.c_[study, [0.9, 0.2, 0.8, 0.1]]
    scores = validation_scores(found, np.array(list("abcd")), study, np.array([1.0, 0, 0, np.nan]))
    assert np.isnan(scores["atypical"])
    assert scores["score"] == scores["negative"] == scores["none"] == 1


def test_only_trained_outputs_are_scored():
    study = np.eye(4)[[0, 1, 2, 3]]
    found = np.c_[study[:, ::-1], [0.9, 0.2, 0.8, 0.1]]  # all classes wrong, none right
    none = np.array([1.0, 0, 0, 0])
    alone = validation_scores(found, np.arange(4), study, none, "none")
    assert alone == {"score": 1, "none": 1}
    classes = validation_scores(np.c_[study, [np.nan] * 4], np.arange(4), study, none, "study")
    assert classes == dict.fromkeys(["score", *STUDY_CLASSES, *CALL_METRICS], 1)


def test_the_loss_of_a_batch_adds_that_of_its_mask(monkeypatch):
    torch.manual_seed(0)
    small, recipe = SmallXrays(8), override(RECIPE, image_size=64, segmentation=0.25, label_smoothing=0.1, none_weight=2.0)
    model = StudyClassifier(recipe).eval()
    training = StudyTraining(model, [None] * 8, small.images.study_id.to_numpy())
    monkeypatch.setattr(training, "log", lambda *_, **__: None)
    examples = XrayDataset(small.images, small.labels, small.boxes, small, recipe)
    batch = training.targets(next(iter(batches(examples, 8))))
    assert batch["mask"].shape == (8, model.mask_cells, model.mask_cells) and batch["mask"][2].max() == 1
    logits, mask = model.with_mask(model.normalise(batch["pixels"]))
    of_classes = study_loss(logits, batch["label"], batch["none"], 2.0, "both", 0.1)
    torch.testing.assert_close(training.training_loss(batch), of_classes + 0.25 * mask_loss(mask, batch["mask"]))


def test_classes_are_scored_over_studies():
    # Study a's two images average to 0.55 against b's 0.5: right over studies, wrong over images.
    study = np.array([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    found = np.array([[0.9, 0.1, 0, 0, 0], [0.2, 0.8, 0, 0, 0], [0.5, 0.5, 0, 0, 0]])
    scores = validation_scores(found, np.array(["a", "a", "b"]), study, np.zeros(3))
    assert scores["negative"] == 1 and scores["typical"] == 1


def test_metrics_describe_the_run(uninterrupted):
    small = SmallXrays(32)
    metrics = json.loads((uninterrupted.run_folder / "metrics.json").read_text())
    fingerprint = data_fingerprint(images=small.images, labels=small.labels, boxes=small.boxes, folds=small.fold_table)
    assert metrics["data_fingerprint"] == fingerprint
    assert metrics["folds_fingerprint"] == data_fingerprint(folds=small.fold_table)
    assert metrics["epochs"] == 3 and metrics["images_per_s"] > 0 and metrics["precision"] == "32-true"
    # A process with torch in it takes more than 100 MB.
    assert metrics["peak_memory_mb"] > 100 and metrics["gpu"] is None and metrics["peak_gpu_memory_mb"] is None
    assert metrics["versions"]["torch"] == version("torch") and "timm" in metrics["versions"]
