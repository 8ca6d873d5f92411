"""Detectors of both families: outputs of a run, exact resume, learning, and the inputs of ultralytics."""

import os

import numpy as np
import pandas as pd
import pytest
import torch

from kitlib.bundle import read_bundle
from kitlib.errors import SettingsError, TrainingError
from kitlib.inference.predict import Predictor
from kitlib.letterbox import letterbox, stretch, within
from kitlib.models.families import load_network
from kitlib.recipes.fields import DetectorRecipe
from kitlib.recipes.named import recipe as find_recipe
from kitlib.runs.finished_run import ExtraImages
from kitlib.scoring.average_precision import average_precision, box_hits
from kitlib.settings import override
from kitlib.tables import BOX, check_table, read_table
from kitlib.training.detector import canvas_precision, sample_negatives
from kitlib.training.pyramid_detector import PyramidDetectorTraining
from kitlib.training.strategy import Strategy
from kitlib.training.xray_dataset import XrayDataset
from kitlib.training.yolo import Canvases, Trainer, settings
from tests.small_lungs import FRAME, stored_lungs
from tests.small_tasks import train_small
from tests.small_xrays import COLUMNS, ROWS, SmallXrays, TwoFindings

from ultralytics.cfg import get_cfg  # isort: skip  (kitlib.models.yolo makes the import offline)

TIMES = ["seconds", "images_per_s"]
COMMON = DetectorRecipe(
    backbone="test_resnet",
    image_size=32,
    placement="stretch",
    epochs=2,
    batch_size=4,
    optimizer="adamw",
    learning_rate=2e-3,
)
YOLO = override(COMMON, family="yolo", backbone="yolov8n", width=0.25, mosaic=0.5, mixup=0.2)
FASTER_RCNN = override(COMMON, fpn_channels=16, box_hidden=16, box_samples=16, proposals=20, schedule_every=0)
RETINANET = override(COMMON, family="retinanet", fpn_channels=16, proposals=20, schedule_every=0)
RECIPES = {"faster_rcnn": FASTER_RCNN, "retinanet": RETINANET, "yolo": YOLO}


def train(folder, recipe, small=None, **options):
    return train_small(folder, small or SmallXrays(16), recipe, **options)


@pytest.fixture(scope="module", params=list(RECIPES))
def uninterrupted(request, tmp_path_factory):
    elsewhere, before = tmp_path_factory.mktemp("elsewhere"), os.getcwd()
    os.chdir(elsewhere)
    try:
        run = train(tmp_path_factory.mktemp("run"), RECIPES[request.param])
    finally:
        os.chdir(before)
    assert not list(elsewhere.iterdir())  # ultralytics writes runs/detect to the working directory
    return run


@pytest.mark.gpu
def test_a_run_leaves_what_later_stages_read(uninterrupted):
    small, folder = SmallXrays(16), uninterrupted.run_folder
    fold = small.fold_table[small.fold_table.fold == 1]
    detections = read_table("detections", folder / "tables" / "detections.parquet")
    assert set(detections.image_id) <= set(fold.id) and set(detections.model) == {"small"} and set(detections.fold) == {1}
    assert detections[["xmin", "ymin"]].min().min() >= 0  # cut at the edges of the original image
    assert detections.xmax.max() <= COLUMNS and detections.ymax.max() <= ROWS
    # The `coverage` table includes images without a detection.
    coverage = read_table("coverage", folder / "tables" / "coverage.parquet")
    expected = pd.DataFrame({"image_id": fold.id, "model": "small", "fold": 1}).reset_index(drop=True)
    pd.testing.assert_frame_equal(coverage, expected)
    pd.testing.assert_frame_equal(uninterrupted.tables["coverage"], coverage)
    record, _ = read_bundle(folder / "bundle")
    assert record["family"] == uninterrupted.metrics["recipe"]["family"]
    assert record["classes"] == ["opacity"] and record["fold"] == 1 and record["longest_side"] == 50
    assert record["validation"]["score"] == pytest.approx(uninterrupted.metrics["best"]["score"])
    assert uninterrupted.history.epoch.tolist() == [1, 2]
    # Each fold has 8 images, 6 of them with a box.
    counts = [uninterrupted.metrics[name] for name in ("train_images", "train_images_with_boxes", "validation_images")]
    assert counts == [8, 6, 8]
    assert (folder / "figures" / "curves.png").is_file() and not list(folder.rglob("*.pt"))


def pooled_precision(small, detections):
    """Return the mean over the findings of the average precision in fold 1."""
    true_boxes = check_table(small.boxes, "boxes")
    true_boxes = true_boxes[true_boxes.image_id.isin(small.fold_table.id[small.fold_table.fold == 1])]
    precision = []
    for finding, true in true_boxes.groupby("finding"):
        found = detections[detections.finding == finding]
        hits = box_hits(found.image_id, found.score, found[list(BOX)], true.image_id, true[list(BOX)])
        precision.append(average_precision(found.score.to_numpy(), hits, len(true)))
    return np.mean(precision)


def test_the_out_of_fold_boxes_have_the_score_that_chose_the_epoch(uninterrupted):
    # Prediction is independent of validation: it loads the bundle, draws its own canvases and returns original pixels. A
    # stretched canvas has no padding in which boxes are clipped, and IoU does not depend on the scale of an axis.
    again = pooled_precision(SmallXrays(16), uninterrupted.tables["detections"])
    assert again == pytest.approx(uninterrupted.metrics["best"]["score"], abs=1e-6)


@pytest.mark.parametrize("family", list(RECIPES))
def test_a_detector_is_validated_on_the_canvas_that_it_predicts_on(tmp_path, monkeypatch, family):
    sizes = []
    judged = Strategy.validation_batches

    def noted(strategy):
        loader = judged(strategy)
        sizes.append(loader.batch_sampler.batch_size)
        return loader

    monkeypatch.setattr(Strategy, "validation_batches", noted)
    run = train(tmp_path, override(RECIPES[family], epochs=1, inference_size=64))
    # With four times as many pixels as in training, a validation batch has a quarter of the eight images.
    assert sizes == [2]
    assert pooled_precision(SmallXrays(16), run.tables["detections"]) == pytest.approx(
        run.metrics["best"]["score"], abs=1e-6
    )


def stop_at(patch, epoch, batch):
    """Make training of either family raise ConnectionError in this epoch and batch (from 0)."""
    step = PyramidDetectorTraining.training_step

    def dying_step(self, batch_of_images, number):
        if (self.current_epoch, number) == (epoch, batch):
            raise ConnectionError("the session ended")
        return step(self, batch_of_images, number)

    prepare = Trainer.preprocess_batch

    def dying_batch(self, batch_of_images):
        self.batches_seen = 0 if getattr(self, "seen_epoch", -1) != self.epoch else self.batches_seen + 1
        self.seen_epoch = self.epoch
        if (self.epoch, self.batches_seen) == (epoch, batch):
            raise ConnectionError("the session ended")
        return prepare(self, batch_of_images)

    patch.setattr(PyramidDetectorTraining, "training_step", dying_step)
    patch.setattr(Trainer, "preprocess_batch", dying_batch)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, uninterrupted):
    recipe = RECIPES[uninterrupted.metrics["recipe"]["family"]]
    with monkeypatch.context() as patch:
        stop_at(patch, 1, 1)
        with pytest.raises(ConnectionError):
            train(tmp_path, recipe)
    assert not (tmp_path / "metrics.json").exists()
    torch.manual_seed(12345)  # the random state of a new session
    np.random.seed(12345)  # noqa: NPY002
    resumed = train(tmp_path, recipe)
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=TIMES), uninterrupted.history.drop(columns=TIMES), check_exact=True
    )
    first, second = (read_bundle(folder / "bundle")[1] for folder in (uninterrupted.run_folder, tmp_path))
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    pd.testing.assert_frame_equal(resumed.tables["detections"], uninterrupted.tables["detections"], check_exact=True)


def test_a_finished_run_is_read_back_and_another_is_refused(uninterrupted, monkeypatch):
    recipe = RECIPES[uninterrupted.metrics["recipe"]["family"]]
    monkeypatch.setattr("kitlib.training.driver.seed_everything", lambda _: pytest.fail("trained again"))
    again = train(uninterrupted.run_folder, recipe)
    assert again.metrics == uninterrupted.metrics
    pd.testing.assert_frame_equal(again.tables["detections"], uninterrupted.tables["detections"])
    with pytest.raises(TrainingError, match=r"recipe\.nms_iou: 0\.5 recorded, 0\.4 requested"):
        train(uninterrupted.run_folder, override(recipe, nms_iou=0.4))
    with pytest.raises(TrainingError, match="longest_side: 50 recorded, 40 requested"):
        train(uninterrupted.run_folder, recipe, SmallXrays(16, longest_side=40))


@pytest.mark.parametrize(("nominal_batch", "steps"), [(0, 4), (8, 2)])
def test_a_faster_rcnn_gathers_batches_into_a_step(tmp_path, monkeypatch, nominal_batch, steps):
    step, losses = PyramidDetectorTraining.training_step, []

    def noted(self, batch, number):
        losses.append(step(self, batch, number))
        return losses[-1]

    monkeypatch.setattr(PyramidDetectorTraining, "training_step", noted)
    # Two epochs of two batches of four images.
    history = train(tmp_path, override(FASTER_RCNN, nominal_batch=nominal_batch)).history
    parts = history.drop(columns=[*TIMES, "epoch", "learning_rate", "score", "train_loss"])
    assert parts.shape[1] == 4  # losses of regions and of boxes
    means = np.array([each.item() for each in losses]).reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(history.train_loss, means, rtol=1e-5)
    np.testing.assert_allclose(parts.sum(axis=1), means, rtol=1e-5)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps


def test_patience_ends_a_run_and_the_best_epoch_is_kept(tmp_path):
    # The model learns nothing at this rate, so the first epoch stays the best.
    # Not a RetinaNet's, whose first scores are so similar that batch norm's statistics change their order.
    for family in ("faster_rcnn", "yolo"):
        run = train(tmp_path / family, override(RECIPES[family], epochs=9, patience=1, learning_rate=1e-12))
        assert (run.metrics["epochs"], run.metrics["best_epoch"]) == (2, 1), family


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Faster R-CNN that learns to find white blocks. At twice this learning rate, some random starts learn nothing."""
    return train(tmp_path_factory.mktemp("taught"), override(FASTER_RCNN, image_size=64, epochs=20), SmallXrays(32))


@pytest.mark.gpu
def test_training_learns_a_white_block(taught):
    # Three of four images have the same box; predicting it for every image has an AP of 0.75.
    assert taught.history.train_loss.iloc[-1] < taught.history.train_loss.iloc[0]
    assert taught.metrics["best"]["score"] > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["retinanet", "yolo"])
def test_training_learns_discs_and_squares(tmp_path, family):
    small = TwoFindings(64)
    if family == "retinanet":
        run = train(tmp_path, override(RETINANET, image_size=64, learning_rate=4e-3, gradient_clip=1.0, epochs=8), small)
    else:
        plain = {"mosaic": 0.0, "mixup": 0.0, "zoom": 0.1, "norm_momentum": 0.1}
        run = train(tmp_path, override(YOLO, image_size=64, learning_rate=5e-3, epochs=11, patience=99, **plain), small)
    assert run.history.train_loss.iloc[-1] < run.history.train_loss.iloc[0]
    # The mean over both findings, whose boxes are at random places. Were all of one class, it would be 0.25 at most.
    best = run.metrics["best"]
    assert best["score"] == pytest.approx((best["disc"] + best["square"]) / 2) and best["score"] > 0.4
    record, _ = read_bundle(run.run_folder / "bundle")
    assert record["classes"] == ["disc", "square"] and record["validation"].keys() == {"score", "disc", "square"}
    assert pooled_precision(small, run.tables["detections"]) == pytest.approx(best["score"], abs=1e-6)


@pytest.mark.gpu
def test_a_loss_that_is_no_number_ends_a_yolo_with_advice(tmp_path, monkeypatch):
    step = Trainer.optimizer_step

    def spoil(self):
        step(self)
        self.loss = self.loss * float("nan")

    monkeypatch.setattr(Trainer, "optimizer_step", spoil)
    with pytest.raises(ValueError, match=r"epoch 1: the loss is nan.*Lower `learning_rate`"):
        train(tmp_path, YOLO)


def test_a_fold_without_boxes_is_refused(tmp_path):
    small = SmallXrays(16)
    fold = small.fold_table.id[small.fold_table.fold == 1]
    small.boxes = small.boxes[~small.boxes.image_id.isin(fold)]
    with pytest.raises(ValueError, match="none of the 8 images in the validation fold 1 has a box; raise limit_train"):
        train(tmp_path, FASTER_RCNN, small)
    small.boxes = small.boxes[:0]
    with pytest.raises(ValueError, match="images in the training folds has a box; the prepared run has no boxes"):
        train(tmp_path, FASTER_RCNN, small)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 24), (0.25, 24 + 6), (1.0, 32), (9.0, 32)])
def test_negatives_are_a_share_of_the_images_with_boxes(share, expected):
    small = SmallXrays(32)  # 24 with a box, 8 without
    kept = sample_negatives(small.images, small.boxes, share, seed=3)
    assert len(kept) == expected and kept.image_id.is_monotonic_increasing
    assert set(small.boxes.image_id) <= set(kept.image_id)
    again = sample_negatives(small.images, small.boxes, share, seed=3)
    assert kept.image_id.tolist() == again.image_id.tolist()


def test_canvas_precision_of_a_case_worked_by_hand():
    true = [np.array([[0, 0, 10, 10, 0.0]]), np.zeros((0, 5)), np.array([[0, 0, 10, 10, 0], [20, 20, 30, 30, 0.0]])]
    found = [
        np.array([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 9, 0.5, 0]]),  # right; a second one of the same box, wrong
        np.array([[0, 0, 10, 10, 0.8, 0]]),  # no box there
        np.array([[20, 20, 30, 30, 0.7, 0]]),  # right; the other box is not found
    ]
    # Recall 1/3 at precision 1, 2/3 at 2/3: the area is (1 + 2/3) / 3.
    assert canvas_precision(found, true, ["opacity"]) == {"score": pytest.approx(5 / 9)}
    assert canvas_precision([np.zeros((0, 6))] * 3, true, ["opacity"]) == {"score": 0}
    # A box of another class is no hit, and takes none away; no true box has the last class.
    found[0] = np.concatenate([[[0, 0, 10, 10, 0.95, 1]], found[0]])
    true[1] = np.array([[0, 0, 10, 10, 1.0]])
    scores = canvas_precision(found, true, ["Effusion", "Mass", "Nodule"])
    expected = {"score": pytest.approx(5 / 18), "Effusion": pytest.approx(5 / 9), "Mass": 0.0}
    assert np.isnan(scores.pop("Nodule")) and scores == expected


@pytest.mark.parametrize("changes", [{}, {"zoom": 0.5, "mosaic": 1.0}, {"rotate_degrees": 15.0, "horizontal_flip": 1.0}])
def test_ultralytics_moves_boxes_with_the_picture(tmp_path, changes):
    # Every image is a white block on black: the boxes must cover the white pixels.
    small = SmallXrays(16)
    for image_id in small.image_ids:
        small.pixels[image_id] = (small.pixels[image_id] == 255).astype(np.uint8) * 255
    still = {"zoom": 0.0, "mosaic": 0.0, "mixup": 0.0, "horizontal_flip": 0.0, "brightness_contrast": 0.0}
    recipe = override(YOLO, placement="letterbox", image_size=64, **(still | changes))
    examples = XrayDataset(small.images, small.labels, small.boxes, small, recipe)
    hyp = settings(recipe, tmp_path, torch.device("cpu"), seed=0, workers=0)
    canvases = Canvases(examples, augment=True, settings=get_cfg(overrides=hyp))
    framed, missed = 0, []
    for index in range(len(canvases)):
        example = canvases[index]
        white = (example["img"][0] > 127).numpy()
        mask = np.zeros_like(white)
        for x, y, width, height in example["bboxes"].numpy() * 64:
            left, top = int(np.floor(x - width / 2)), int(np.floor(y - height / 2))
            mask[max(0, top) : int(np.ceil(y + height / 2)), max(0, left) : int(np.ceil(x + width / 2))] = True
            framed += 1
        # ultralytics drops boxes that are clipped to slivers, so an image may lose one; misplaced boxes miss all.
        missed.append((white & ~mask).sum() / max(1, white.sum()))
    assert framed > 8 and np.median(missed) < 0.02 and np.mean(missed) < 0.1


def test_an_unaugmented_canvas_reaches_ultralytics_as_it_is(tmp_path):
    small, recipe = SmallXrays(4), override(YOLO, placement="letterbox", image_size=64)
    examples = XrayDataset(small.images, small.labels, small.boxes, small, recipe)
    hyp = settings(recipe, tmp_path, torch.device("cpu"), seed=0, workers=0)
    example = Canvases(examples, augment=False, settings=get_cfg(overrides=hyp))[2]
    place = letterbox(ROWS, COLUMNS, 64)
    np.testing.assert_array_equal(example["img"].numpy(), np.stack([place.image(small.pixels["image002"])] * 3))
    x, y, width, height = example["bboxes"].numpy()[0] * 64
    corners = place.boxes_to_original(np.array([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]]))
    np.testing.assert_allclose(corners[0], small.boxes.iloc[0][list(BOX)].to_numpy(float), atol=1e-3)


EITHER = {"lungs": "masks", "trained_on": "either"}


def test_ultralytics_gets_the_crops_and_boxes_of_each_epoch(tmp_path):
    small, recipe = SmallXrays(16), override(YOLO, image_size=64, **EITHER)
    lungs = stored_lungs(tmp_path / "lungs", small)
    examples = XrayDataset(small.images, small.labels, small.boxes, small, recipe, seed=3, lungs=lungs)
    hyp = settings(recipe, tmp_path, torch.device("cpu"), seed=0, workers=0)
    canvases, crops = Canvases(examples, augment=True, settings=get_cfg(overrides=hyp)), []
    places = stretch(ROWS, COLUMNS, 64), within(stretch, FRAME, ROWS, COLUMNS, 64)
    for epoch in range(6):
        canvases.epoch = epoch
        for index in (2, 12, 15):
            given = canvases.get_image_and_label(index)
            np.testing.assert_array_equal(given["img"][..., 0], examples[epoch, index]["pixels"].numpy())
            whole, crop = (np.array_equal(given["img"][..., 0], p.image(small.pixels[f"image{index:03d}"])) for p in places)
            assert whole != crop
            crops.append(crop)
            x, y, width, height = given["instances"].bboxes[0] * 64
            corners = np.array([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])
            true = small.boxes.iloc[0][list(BOX)].to_numpy(float)  # the same in every image
            np.testing.assert_allclose(places[crop].boxes_to_original(corners)[0], true, atol=1e-3)
    assert 0 < sum(crops) < len(crops)


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(RECIPES))
def test_a_detector_of_lung_crops_leaves_boxes_in_original_pixels(tmp_path, family):
    small, changes = (
        SmallXrays(16),
        {"lungs": "masks", "trained_on": "lungs", "views": ["lungs"], "masked": True, "epochs": 1},
    )
    validation_ids = small.fold_table.id[small.fold_table.fold == 1].tolist()
    lungs = stored_lungs(tmp_path / "lungs", small, missed=validation_ids[:2])
    run = train(tmp_path / "run", override(RECIPES[family], **changes), small, lungs=lungs)
    assert run.metrics["lungs_missed"] == {"training": 0, "predicted": 2}
    assert run.metrics["lungs_fingerprint"] == lungs.fingerprint
    assert set(run.tables["coverage"].image_id) == set(validation_ids)
    found = run.tables["detections"][~run.tables["detections"].image_id.isin(validation_ids[:2])]
    # No box of a crop reaches beyond its frame, and stretched crops have no padding.
    assert len(found) and (found[["xmin", "ymin"]].to_numpy() >= np.array(FRAME[:2]) - 1e-6).all()
    assert (found[["xmax", "ymax"]].to_numpy() <= np.array(FRAME[2:]) + 1e-6).all()
    with pytest.raises(ValueError, match=r"small: .*set lungs_run"):
        train(tmp_path / "refused", override(RECIPES[family], **changes), small)


def test_a_yolo_on_either_resumes_bit_for_bit(tmp_path, monkeypatch):
    small, recipe = SmallXrays(16), override(YOLO, **EITHER)
    lungs = stored_lungs(tmp_path / "lungs", small)
    whole = train(tmp_path / "whole", recipe, small, lungs=lungs, workers=1)
    validate, calls = Trainer.validate, []

    def dies_in_the_second_epoch(self):
        calls.append(self.epoch)
        if len(calls) == 2:
            raise ConnectionError("the session ended")
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", dies_in_the_second_epoch)
        with pytest.raises(ConnectionError):
            train(tmp_path / "stopped", recipe, small, lungs=lungs)
    resumed = train(tmp_path / "stopped", recipe, small, lungs=lungs)
    pairs = [read_bundle(run.run_folder / "bundle")[1] for run in (whole, resumed)]
    assert all(torch.equal(value, pairs[1][name]) for name, value in pairs[0].items())


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (YOLO, {"sharpen_p": 0.5, "ema_decay": 0.9}, r"a yolo, which does not use ema_decay \(.* 0\.0\), sharpen_p"),
        (YOLO, {"schedule": "plateau"}, r"yolov8n is a yolo, which does not use schedule \(leave it at 'cosine'\)"),
        (YOLO, {"schedule_every": 0}, r"schedule_every \(leave it at 1\); it uses: box_gain, class_gain"),
        (YOLO, {"fpn_channels": 32}, r"fpn_channels \(leave it at 256\)"),
        (
            FASTER_RCNN,
            {"mosaic": 1.0, "zoom": 0.2},
            r"is a faster_rcnn, which does not use mosaic \(.* 0\.0\), zoom \(.* 0\.5\)",
        ),
        (FASTER_RCNN, {"width": 0.5}, r"width \(leave it at 1\.0\); it uses: fpn_channels"),
    ],
)
def test_a_setting_of_the_other_family_is_refused_when_the_recipe_is_made(recipe, changes, message):
    with pytest.raises(SettingsError, match=message):
        override(recipe, **changes)


def test_the_published_settings_reach_ultralytics(tmp_path):
    # Heidelberg report, section 3.2: flips, learning rate, decay, nominal batch.
    given = settings(find_recipe("heidelberg_yolo", DetectorRecipe), tmp_path, torch.device("cpu"), 0, 0)
    expected = {"flipud": 0.1, "fliplr": 0.5, "lr0": 0.01, "momentum": 0.937, "weight_decay": 5e-4, "nbs": 64, "mixup": 0.5}
    expected["mosaic"] = 0.0
    assert {name: given[name] for name in expected} == expected and given["imgsz"] == 512
    # The kit's schedule; neither plots nor ultralytics' test of float16, which downloads a model.
    assert (given["lrf"], given["cos_lr"], given["patience"], given["batch"]) == (0.05, True, 0, 16)
    assert (given["warmup_bias_lr"], given["amp"], given["plots"], given["device"]) == (0.1, False, False, "cpu")
    adam = settings(override(YOLO, epochs=40, optimizer="adam", momentum=0.8), tmp_path, torch.device("cuda", 1), 0, 0)
    assert (adam["momentum"], adam["warmup_bias_lr"], adam["device"]) == (0.9, 0.0, "1")
    # Without mosaic: ultralytics' last 10 epochs, but at most a third of all.
    assert adam["close_mosaic"] == 10 and settings(YOLO, tmp_path, torch.device("cpu"), 0, 0)["close_mosaic"] == 0
    short = settings(override(YOLO, epochs=6, batch_size=3), tmp_path, torch.device("cpu"), 0, 0)
    assert (short["close_mosaic"], short["nbs"]) == (2, 3)
    published = settings(find_recipe("heidelberg_yolo_published", DetectorRecipe), tmp_path, torch.device("cpu"), 0, 0)
    assert (published["box"], published["cls"]) == (0.075, 0.8)


def test_the_moving_average_is_validated_and_kept(tmp_path):
    # A RetinaNet, which has found the first boxes after these epochs.
    plain = override(RETINANET, image_size=64, epochs=4, learning_rate=4e-3)
    average, last = (train(tmp_path / str(decay), override(plain, ema_decay=decay)).history for decay in (0.5, 0.0))
    np.testing.assert_allclose(average.train_loss, last.train_loss, rtol=1e-6)
    assert last.score.max() > 0 and average.score.tolist() != last.score.tolist()


def test_extra_images_are_trained_on_and_never_validated_on(tmp_path):
    small, other = SmallXrays(16), SmallXrays(32)
    extra = ExtraImages(other.images.iloc[16:], other.labels, other.boxes, other)
    run = train(tmp_path, override(FASTER_RCNN, epochs=1, negatives=9.0), small, extra=extra)
    assert run.metrics["train_images"] == 8 + 16 and run.metrics["validation_images"] == 8
    with pytest.raises(TrainingError, match="extra"):
        train(tmp_path, override(FASTER_RCNN, epochs=1, negatives=9.0), small)
    named = ExtraImages(extra.images, extra.labels, extra.boxes.assign(finding="Mass"), other)
    with pytest.raises(ValueError, match="extra images have boxes of Mass, but the prepared run has only boxes of opacity"):
        train(tmp_path, FASTER_RCNN, small, extra=named)


def test_letterbox_and_stretch_give_similar_scores(taught):
    # One trained detector on canvases of either kind; it was trained on stretched ones of nearly the same shape (4 : 5).
    small = SmallXrays(32)
    record, weights = read_bundle(taught.run_folder / "bundle")
    network = load_network(record, weights, torch.device("cpu"))
    validation_ids = small.fold_table.id[small.fold_table.fold == 1]
    scores = {}
    for placement in ("stretch", "letterbox"):
        chunks = Predictor(record | {"placement": placement}, network, torch.device("cpu"), 4).predict(
            map(small.read, validation_ids)
        )
        scores[placement] = pooled_precision(small, pd.concat(chunks))
    assert scores["stretch"] > 0.7 and abs(scores["stretch"] - scores["letterbox"]) < 0.15
