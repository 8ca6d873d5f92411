"""Every option of a classifier's training learns, frozen weights stay, and a run with all options resumes exactly."""

from functools import partial

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from kitlib.bundle import read_bundle
from kitlib.errors import BundleError
from kitlib.models.classifier import FindingsClassifier, StudyClassifier
from kitlib.models.starting_weights import input_differences
from kitlib.recipes.fields import FindingsRecipe
from kitlib.settings import override
from kitlib.training.classifier import start_from_weights
from kitlib.training.study import StudyTraining
from kitlib.training.xray_dataset import XrayDataset
from tests.small_tasks import train_small
from tests.small_xrays import RECIPE, SmallXrays

LEARNING = override(
    RECIPE, epochs=10, patience=10, learning_rate=1e-2, batch_size=8, brightness_contrast=0.0, rotate_degrees=0.0
)


def train(folder, recipe, count=32):
    return train_small(folder, SmallXrays(count), recipe)


@pytest.fixture(scope="module")
def starting_weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_file(StudyClassifier(RECIPE).backbone.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """A recipe with 64 pixels a side, and the bundle that it has trained."""
    folder, recipe = tmp_path_factory.mktemp("first"), override(RECIPE, image_size=64, epochs=1)
    train(folder, recipe)
    return recipe, str(folder / "bundle")


# Four balanced classes, and a quarter of the images without a box: a constant prediction scores 0.25.
@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.4, "label_smoothing": 0.1},
        {"segmentation": 1.0, "cutmix": 1.0},
        {"ema_decay": 0.9, "nominal_batch": 16, "batch_size": 4},
        {"outputs": "study"},
        {"outputs": "none"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_learns(tmp_path, changes):
    run = train(tmp_path, override(LEARNING, **changes))
    assert run.metrics["best"]["score"] > 0.5
    if "segmentation" in changes:
        assert run.history.train_mask_loss.iloc[-1] < run.history.train_mask_loss.iloc[0]


def test_the_field_outputs_decides_which_tables_are_filled_and_what_the_score_is(tmp_path):
    short = override(LEARNING, epochs=1)
    study = train(tmp_path / "study", override(short, outputs="study"))
    none = train(tmp_path / "none", override(short, outputs="none"))
    assert len(study.tables["study_scores"]) == 8 and study.tables["image_scores"].empty
    assert len(none.tables["image_scores"]) == 16 and none.tables["study_scores"].empty
    assert "none" not in study.history and "typical" not in none.history
    assert none.metrics["best"]["score"] == none.metrics["best"]["none"]
    validation = read_bundle(none.run_folder / "bundle")[0]["validation"]
    assert set(validation) == {"score", "none"}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_weights_and_statistics_of_a_frozen_backbone_stay_bit_for_bit(tmp_path, starting_weights, ema_decay):
    recipe = override(LEARNING, epochs=2, frozen_backbone=True, starting_weights=starting_weights, ema_decay=ema_decay)
    train(tmp_path, recipe)
    torch.manual_seed(3)
    before = StudyClassifier(RECIPE).backbone.state_dict()
    after = read_bundle(tmp_path / "bundle")[1]
    for name, value in before.items():
        assert torch.equal(after[f"backbone.{name}"], value), name


def test_each_epoch_unfreezes_one_more_stage(tmp_path, starting_weights):
    """Epochs 2 and 3 unfreeze one stage each: after three epochs layer4 and layer3 have changed, and no other stage."""
    recipe = override(
        LEARNING, epochs=3, patience=3, frozen_backbone=True, unfreeze_every=1, starting_weights=starting_weights
    )
    train(tmp_path, recipe)
    # Checks the last epoch's weights, because the best weights may be from an earlier epoch.
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    torch.manual_seed(3)
    before = StudyClassifier(RECIPE).backbone.state_dict()
    weights = {name.removeprefix("model.backbone."): value for name, value in state["state_dict"].items()}
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(weights[name], value)}
    assert changed == {"layer3", "layer4"}
    rates = sorted({group["lr"] for group in state["optimizer_states"][0]["param_groups"]})
    assert len(rates) == 2 and rates[0] == pytest.approx(rates[1] * 0.1)


def test_starting_weights_that_lack_tensors_of_a_frozen_backbone_are_refused(tmp_path):
    torch.manual_seed(0)
    weights = StudyClassifier(RECIPE).backbone.state_dict()
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("layer4")}, tmp_path / "half.safetensors"
    )
    recipe = override(LEARNING, frozen_backbone=True, starting_weights=str(tmp_path / "half.safetensors"))
    with pytest.raises(
        ValueError, match=r"half\.safetensors lacks \d+ tensors of the frozen test_resnet; the first is backbone\.layer4"
    ):
        train(tmp_path / "run", recipe)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"image_size": 32, "placement": "stretch"}, "image_size 32 instead of 64, placement stretch instead of letterbox"),
        ({"canvas": 80}, "canvas 80 instead of 0"),
        ({"channels": 3}, "channels 3 instead of 1"),
        ({"image_size": 32, "frozen_backbone": False}, ""),
    ],
)
def test_a_frozen_backbone_on_another_input_than_it_was_trained_on_gives_a_warning(one_epoch, caplog, changes, told):
    recipe, bundle = one_epoch
    recipe = override(recipe, **{"frozen_backbone": True, "starting_weights": bundle, **changes})
    model = StudyClassifier(recipe)
    text = start_from_weights(model)
    warned = "trained on another input" in text
    assert warned == bool(told) == ("trained on another input" in caplog.text) and told in text


def test_another_normalisation_of_a_single_channel_is_a_difference(one_epoch):
    recipe, bundle = one_epoch
    model = StudyClassifier(override(recipe, starting_weights=bundle))
    assert input_differences(model) == []
    model.mean = [0.25]
    assert input_differences(model) == ["mean [0.25] instead of [0.5]"]


def test_weights_of_another_backbone_are_refused_and_the_number_of_random_tensors_is_reported(tmp_path):
    whole = StudyClassifier(RECIPE).backbone.state_dict()
    # test_resnet has 372,688 parameters, of which layer4 has 267,840 and layer1's first convolution 9,216.
    for name, left_out in (("little", "layer4"), ("most", "layer1.0.conv1")):
        kept = {key: value for key, value in whole.items() if not key.startswith(left_out)}
        save_file(kept, tmp_path / f"{name}.safetensors")

    def started(make, name):
        return start_from_weights(make(f"{tmp_path / name}.safetensors"))

    for make in (
        lambda path, **more: StudyClassifier(override(RECIPE, starting_weights=path, **more)),
        lambda path, **more: FindingsClassifier(
            FindingsRecipe(backbone="test_resnet", hidden=8, starting_weights=path, **more), ["Mass"]
        ),
    ):
        with pytest.raises(
            BundleError, match=r"little\.safetensors lacks 15 tensors of test_resnet, 7\d% .* random: backbone\.layer4"
        ):
            started(make, "little")
        with pytest.raises(
            BundleError, match=r"most\.safetensors lacks 1 tensors of test_resnet, .* random: backbone\.layer1\.0"
        ):
            started(make, "most")
        allowed = partial(make, random_parts=["backbone.layer1.0.conv1"])
        # Random are the convolution and the head's two layers.
        assert started(allowed, "most").endswith(f"most.safetensors: {len(whole) - 1} tensors, 5 left random")


ALL_ON = {
    "ema_decay": 0.9,
    "mixup": 0.4,
    "cutmix": 1.0,
    "segmentation": 1.0,
    "label_smoothing": 0.05,
    "frozen_backbone": True,
    "unfreeze_every": 1,
    "nominal_batch": 8,
    "batch_size": 4,
    "epochs": 3,
}


def test_a_resumed_run_with_every_option_equals_an_uninterrupted_one_bit_for_bit(tmp_path, starting_weights, monkeypatch):
    recipe = override(RECIPE, starting_weights=starting_weights, **ALL_ON)
    whole = train(tmp_path / "whole", recipe)
    step = StudyTraining.training_step
    with monkeypatch.context() as patch:

        def dying(self, batch, number):
            if (self.current_epoch, number) == (2, 1):
                raise ConnectionError("the session ended")
            return step(self, batch, number)

        patch.setattr(StudyTraining, "training_step", dying)
        with pytest.raises(ConnectionError):
            train(tmp_path / "halves", recipe)
    torch.manual_seed(12345)  # the random state of a new session
    halves = train(tmp_path / "halves", recipe)
    weights, again = (read_bundle(run.run_folder / "bundle")[1] for run in (whole, halves))
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    times = ["seconds", "images_per_s"]
    pd.testing.assert_frame_equal(halves.history.drop(columns=times), whole.history.drop(columns=times), check_exact=True)
    pd.testing.assert_frame_equal(halves.tables["image_scores"], whole.tables["image_scores"], check_exact=True)


def test_the_penalty_is_the_sum_of_absolute_trainable_weights():
    small = SmallXrays(8)
    examples = XrayDataset(small.images, small.labels, small.boxes, small, RECIPE)
    module = StudyTraining(StudyClassifier(override(RECIPE, l1=0.5)), examples, small.images.study_id.to_numpy())
    module.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    module.model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    module.model[0].bias.data = torch.tensor([-0.5, 0.5])
    module.model[1].requires_grad_(False)
    penalty = module.penalty()
    assert penalty.item() == 0.5 * (1 + 2 + 3 + 4 + 0.5 + 0.5)
    penalty.backward()
    assert torch.equal(module.model[0].weight.grad, 0.5 * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
