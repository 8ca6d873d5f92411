"""A segmenter's run: its outputs, exact resume, scores recomputed from its masks, and errors."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet34

from kitlib.bundle import read_bundle
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.competitions.siim_acr import SIIM_ACR
from kitlib.deadline import SessionOver
from kitlib.errors import BundleError, MaskError, TrainingError
from kitlib.inference.answer import read_answering_model
from kitlib.inference.predict import load_predictor
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.inference.systems import read_system
from kitlib.letterbox import letterbox
from kitlib.models.segmenter import Segmenter
from kitlib.runs.run_kinds import find_kind
from kitlib.scoring.metrics import threshold_map
from kitlib.settings import override
from kitlib.training.driver import train_fold
from kitlib.training.fold_folder import NOT_METRICS
from kitlib.training.lungs import LungsTraining, SegmenterStrategy, check_other_source, score_masks
from kitlib.training.mask_dataset import MaskDataset, collate_masks
from kitlib.training.task import Task
from kitlib.xrays.mask_store import MaskStore, decode_grey
from tests.small_masks import COLUMNS, RECIPE, ROWS, SPARSE, SmallMasks
from tests.small_tasks import small_task, train_small
from tests.training.test_sessions import EndsAfter

TIMES = ["seconds", "images_per_s"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("masks"))


def train(small, folder, recipe=RECIPE, **options):
    return train_small(folder, small, recipe, **{"fold": 0, "masks": small.masks, "model_name": "m"} | options)


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    return train(small, tmp_path_factory.mktemp("run"), override(RECIPE, epochs=12))


@pytest.mark.gpu
def test_a_segmenter_learns_two_dark_ellipses(run):
    # The heart, the brightest structure, cuts into both lungs; a box around the lungs would have a Dice below 0.75.
    assert run.tables["mask_scores"].dice.min() > 0.85


@pytest.mark.gpu
def test_scores_are_those_of_the_masks_that_lie_in_the_run(run, small):
    assert set(run.tables["mask_scores"].image_id) == set(small.fold_table.id[small.fold_table.fold == 0])
    for row in run.tables["mask_scores"].itertuples():
        found, drawn = (np.isin(store.read(row.image_id), LUNG_CODES) for store in (run.masks, small.masks))
        assert row.dice == pytest.approx(2 * (found & drawn).sum() / (found.sum() + drawn.sum()))
        assert row.jaccard == pytest.approx((found & drawn).sum() / (found | drawn).sum())


@pytest.mark.gpu
def test_the_bundle_segments_as_the_run_did(run, small):
    segmenter = load_segmenter(run.run_folder / "bundle", batch_size=3)
    again = score_masks(segmenter, small, small.masks, run.tables["mask_scores"].image_id)
    pd.testing.assert_series_equal(again.dice, run.tables["mask_scores"].dice, atol=0.02)
    record, _ = read_bundle(run.run_folder / "bundle")
    assert record["family"] == "segmenter" and record["classes"] == ["lungs"]
    assert set(again.fold) == {-1} and set(run.tables["mask_scores"].fold) == {0}
    assert sorted(run.history.columns) == sorted([*NOT_METRICS, "train_loss", "validation_loss", "score", "jaccard"])


@pytest.mark.gpu
def test_sides_and_heart_are_judged_each_and_the_lungs_together(tmp_path):
    small = SmallMasks(tmp_path / "masks", sides=True)
    structures = ("heart", "left_lung", "right_lung")
    recipe = override(RECIPE, structures=structures, loss="cross_entropy", background_weight=0.5, epochs=12)
    run = train(small, tmp_path / "run", recipe)
    dice = run.tables["mask_scores"].pivot_table("dice", "image_id", "structure")
    assert set(dice) == {*structures, "lungs"}
    assert dice.mean().min() > 0.6
    for image_id in dice.index:
        found, drawn = run.masks.read(image_id), small.masks.read(image_id)
        left = found == MASK_CODES["left_lung"], drawn == MASK_CODES["left_lung"]
        assert dice.left_lung[image_id] == pytest.approx(2 * (left[0] & left[1]).sum() / (left[0].sum() + left[1].sum()))


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_a_training_that_sessions_interrupt_ends_bit_for_bit_alike(small, tmp_path, schedule):
    # With plateau_epochs 0 the rate falls after each epoch without a better score.
    recipe = override(RECIPE, epochs=4, schedule=schedule, plateau_epochs=0, learning_rate=0.03)
    whole = train(small, tmp_path / "whole", recipe)
    with pytest.raises(SessionOver):
        train(small, tmp_path / "parts", recipe, deadline=EndsAfter(1))
    with pytest.raises(SessionOver):
        train(small, tmp_path / "parts", recipe, deadline=EndsAfter(2))
    parts = train(small, tmp_path / "parts", recipe)
    pd.testing.assert_frame_equal(parts.history.drop(columns=TIMES), whole.history.drop(columns=TIMES), check_exact=True)
    weights = [read_bundle(run.run_folder / "bundle")[0]["weights_sha256"] for run in (whole, parts)]
    assert weights[0] == weights[1]
    pd.testing.assert_frame_equal(parts.tables["mask_scores"], whole.tables["mask_scores"], check_exact=True)


def test_the_validation_score_is_the_mean_dice_of_the_structures(tmp_path, monkeypatch):
    small = SmallMasks(tmp_path, count=6, sides=True)
    structures = ("heart", "left_lung", "right_lung")
    torch.manual_seed(0)
    model = Segmenter(override(RECIPE, structures=structures)).eval()
    training, logged = LungsTraining(model, 6), {}
    monkeypatch.setattr(training, "log", lambda name, value, **_: logged.update({name: value.item()}))
    monkeypatch.setattr(training, "log_dict", logged.update)
    dataset = MaskDataset(small.images, small, small.masks, model.recipe)
    dice = np.zeros((6, 3))
    for rows in ([0, 1, 2, 3], [5, 4]):
        batch = collate_masks([dataset[row] for row in rows])
        training.validation_step(batch, 0)
        found, truth = model.labels(model(model.normalise(batch["pixels"]))), batch["truth"].numpy()
        for row, one, other in zip(rows, found, truth, strict=True):
            for number in range(3):
                a, b = one == number + 1, other == number + 1
                dice[row, number] = 2 * (a & b).sum() / (a.sum() + b.sum())
    training.on_validation_epoch_end()
    assert logged.pop("validation_loss") > 0 and dice.std() > 0
    jaccard = (dice / (2 - dice)).mean()
    expected = {"score": dice.mean(), "jaccard": jaccard, **dict(zip(structures, dice.mean(axis=0), strict=True))}
    assert logged == pytest.approx(expected)


def test_a_source_that_shares_images_or_patients_is_not_independent(small):
    other = small.images.assign(image_id="x" + small.images.image_id, patient_id="x" + small.images.patient_id)
    check_other_source(small.images, other, "elsewhere")
    for column in ("image_id", "patient_id"):
        shared = other.assign(**{column: [small.images[column].iloc[0], *other[column][1:]]})
        with pytest.raises(
            ValueError, match=f"elsewhere is not an independent source: 1 of its .* the same {column} as .*000"
        ):
            check_other_source(small.images, shared, "elsewhere")


def test_another_set_of_masks_is_another_run(small, tmp_path):
    train(small, tmp_path / "run", override(RECIPE, epochs=1))
    other = SmallMasks(tmp_path / "others")
    assert other.masks.fingerprint() == small.masks.fingerprint()
    assert train(other, tmp_path / "run", override(RECIPE, epochs=1)).metrics["epochs"] == 1
    changed = {image_id: np.roll(small.masks.read(image_id), 1, axis=0) for image_id in small.image_ids}
    other.masks = MaskStore.create_empty(tmp_path / "others")
    other.masks.add(changed)
    with pytest.raises(TrainingError, match="masks_fingerprint"):
        train(other, tmp_path / "run", override(RECIPE, epochs=1))


def test_images_without_a_mask_are_left_out_and_none_at_all_is_an_error(small, tmp_path):
    some = MaskStore(tmp_path / "some")
    some.add({image_id: small.masks.read(image_id) for image_id in small.image_ids[2:]})
    run = train(small, tmp_path / "run", override(RECIPE, epochs=1), masks=some)
    assert run.metrics["train_images"] + run.metrics["validation_images"] == len(small.image_ids) - 2
    with pytest.raises(MaskError, match="none of the 16 images has a mask"):
        train(small, tmp_path / "no", masks=MaskStore(tmp_path / "none"))


def test_masks_of_two_conventions_are_never_learnt_as_one(small, tmp_path):
    images = small.images.assign(convention=["lung_fields", "with_heart"] * 8)
    task = Task({**small.tables(), "images": images}, small, RECIPE, "m", masks=small.masks)
    with pytest.raises(MaskError, match="follow 2 conventions \\(lung_fields, with_heart\\)"):
        train_fold(task, 0, tmp_path)


@pytest.mark.gpu
def test_weights_of_another_network_are_refused_and_its_own_are_taken(run, small, tmp_path):
    bundle = str(run.run_folder / "bundle")
    with pytest.raises(BundleError, match="does not fit the network unet"):
        train(small, tmp_path / "a", override(RECIPE, network="unet", starting_weights=bundle))
    going_on = train(small, tmp_path / "b", override(RECIPE, epochs=1, starting_weights=bundle, learning_rate=1e-6))
    assert going_on.tables["mask_scores"].dice.mean() == pytest.approx(run.tables["mask_scores"].dice.mean(), abs=0.05)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("sparse"), count=32, sparse=True)


@pytest.fixture(scope="module")
def sparse_run(sparse, tmp_path_factory):
    return train(sparse, tmp_path_factory.mktemp("sparse_run"), SPARSE)


@pytest.mark.gpu
def test_a_structure_that_most_images_lack_is_learnt(sparse_run, sparse):
    scores = sparse_run.tables["mask_scores"]
    has = scores.image_id.map(sparse.masks.shows)
    assert has.sum() == 4 and len(scores) == 16 and set(scores.structure) == {"pneumothorax"}
    # Empty masks alone would have a mean of 12 / 16.
    assert scores.dice[has].min() > 0.6 and scores.dice[~has].mean() > 0.9
    for image_id in scores.image_id[has]:
        assert set(np.unique(sparse_run.masks.read(image_id))) == {0, MASK_CODES["pneumothorax"]}
    assert find_kind(sparse_run.run_folder) == "masks"
    (model,) = read_system(sparse_run.run_folder, "masks", {}, {}).models
    assert model.answers == {"masks"} and model.classes == ("pneumothorax",)


@pytest.mark.gpu
def test_its_maps_are_written_and_predicted_again_from_the_bundle(sparse_run, sparse):
    maps, bundle = sparse_run.tables["mask_maps"], sparse_run.run_folder / "bundle"
    assert maps.image_id.tolist() == sparse_run.tables["mask_scores"].image_id.tolist() and set(maps.fold) == {0}
    predictor = load_predictor(bundle, batch_size=5)
    chunks = list(predictor.predict(map(sparse.read, maps.image_id)))
    assert predictor.seen == maps.image_id.tolist() and [len(chunk) for chunk in chunks] == [5, 5, 5, 1]
    again = pd.concat(chunks, ignore_index=True)
    assert (again.drop(columns="map") == maps.drop(columns="map")).all(axis=None)
    place = letterbox(ROWS, COLUMNS, SPARSE.image_size)
    for image_id, png, other in zip(maps.image_id, maps["map"], again["map"], strict=True):
        level = decode_grey(png)
        assert level.shape == (place.inner_rows, place.inner_columns) == (32, 27)  # 120 x 100 pixels, without the padding
        assert np.abs(level.astype(int) - decode_grey(other)).max() <= 3  # batches of another size
        mask = sparse_run.masks.read(image_id)
        shown = threshold_map(cv2.resize(level, mask.shape[::-1]), SPARSE.top, SPARSE.least_area * mask.size, SPARSE.bottom)
        assert np.mean(shown == (mask > 0)) > 0.99
    assert read_answering_model(bundle, competition=SIIM_ACR).answers == {"masks"}
    with pytest.raises(ValueError, match=r"predicts masks \(pneumothorax\), of which a submission to siim-covid19"):
        read_answering_model(bundle)
    with pytest.raises(BundleError, match="contains a segmenter of pneumothorax; choose a lung segmenter"):
        load_segmenter(bundle)


def test_masks_that_show_other_structures_are_refused(small, sparse, tmp_path):
    for data, recipe, structures in ((small, SPARSE, "pneumothorax"), (sparse, RECIPE, "lungs")):
        with pytest.raises(MaskError, match=f"no mask in {data.masks.folder} shows {structures}; choose a recipe"):
            train(data, tmp_path, recipe)


def test_an_albunet_starts_from_a_resnet34(sparse, tmp_path):
    weights = resnet34(weights=None).state_dict()
    save_file(weights, tmp_path / "resnet34.safetensors")
    save_file({name: each for name, each in weights.items() if "layer4.2" not in name}, tmp_path / "part.safetensors")

    def start(name):
        recipe = override(SPARSE, network="albunet", width=0.1, starting_weights=str(tmp_path / name))
        strategy = SegmenterStrategy(small_task(sparse, recipe, masks=sparse.masks), 0, tmp_path)
        model = Segmenter(recipe)
        return model.network.encoder, strategy.start(model)

    encoder, told = start("resnet34.safetensors")
    assert told.endswith("tensors of the encoder")
    assert torch.equal(encoder.layer4[2].conv2.weight, weights["layer4.2.conv2.weight"])
    torch.testing.assert_close(encoder.conv1.weight, weights["conv1.weight"].sum(dim=1, keepdim=True))
    with pytest.raises(
        BundleError, match=r"part.safetensors lacks 10 tensors of a resnet34, such as network.encoder.layer4.2"
    ):
        start("part.safetensors")
