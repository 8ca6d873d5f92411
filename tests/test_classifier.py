"""The head's size, freezing, probabilities, the loss, and that any kind of backbone fits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_xrays import RECIPE

from kitlib.classifier import StudyClassifier, head, load, probabilities, study_loss
from kitlib.recipes import StudyRecipe, override


def size(module):
    return sum(each.numel() for each in module.parameters())


def test_the_head_has_the_published_size():
    # 2048-1024-ReLU-4: 2,102,276 parameters, published by the Heidelberg project
    assert size(head(2048, 1024, 0.5, outputs=4)) == 2_102_276


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_the_heads_size_in_closed_form(features, hidden, outputs):
    assert size(head(features, hidden, 0.0, outputs)) == (features + 1) * hidden + (hidden + 1) * outputs


def test_the_heidelberg_backbone_gives_the_head_2048_features():
    with torch.device("meta"):
        model = StudyClassifier(StudyRecipe())
    assert size(model.head) == 2049 * 1024 + 1025 * 5
    # torchvision's resnext101_32x8d has 88,791,336, its last layer 2049 * 1000; one colour instead of three at the stem
    assert size(model.backbone) == 88_791_336 - 2049 * 1000 - 64 * 2 * 7 * 7


# A residual net, a ConvNeXt, an EfficientNet whose head is wider than its features, a transformer built for one side.
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "mobilenetv3_small_050", "test_vit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_backbone_gives_five_logits(backbone, channels):
    model = StudyClassifier(override(RECIPE, backbone=backbone, channels=channels, image_size=64)).eval()
    x = model.normalise(torch.zeros(2, 64, 64, dtype=torch.uint8))
    assert x.shape == (2, channels, 64, 64)
    assert model(x).shape == (2, 5)


def test_an_unknown_backbone_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no backbone 'resnet19'.*resnet18"):
        StudyClassifier(override(RECIPE, backbone="resnet19"))


def test_grey_is_normalised_by_the_mean_over_the_colours():
    model = StudyClassifier(override(RECIPE, backbone="resnet18"))
    # ImageNet: 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225
    assert model.mean == pytest.approx([0.449]) and model.std == pytest.approx([0.226])
    assert model.normalise(torch.full((1, 32, 32), 255, dtype=torch.uint8))[0, 0, 0, 0] == pytest.approx(0.551 / 0.226)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_means_batch_norm_statistics_too(frozen):
    torch.manual_seed(0)
    model = StudyClassifier(override(RECIPE, frozen_backbone=frozen)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    pixels = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    study_loss(model(model.normalise(pixels)), torch.eye(4), torch.zeros(4), 0.5).backward()
    optimizer.step()
    changed = {name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"head"} if frozen else {"backbone", "head"})


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(-50, 50), min_size=5, max_size=5), min_size=1, max_size=4))
def test_four_classes_sum_to_one_and_none_stands_alone(rows):
    found = probabilities(torch.tensor(rows)).numpy()
    assert found[:, :4].sum(axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-5)
    assert found[:, 4] == pytest.approx(1 / (1 + np.exp(-np.array(rows)[:, 4])), abs=1e-6)


def test_the_loss_is_its_formula():
    logits = torch.tensor([[2.0, 0, 0, 0, 1], [0, 1, 0, 3, -2]])
    study, none = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0.5, 0.5]]), torch.tensor([1.0, 0])
    x = logits.numpy().astype(float)
    log_p = x[:, :4] - np.log(np.exp(x[:, :4]).sum(axis=1, keepdims=True))
    entropy = -(study.numpy() * log_p).sum(axis=1).mean()
    binary = (np.log1p(np.exp(-1)) + np.log1p(np.exp(-2))) / 2
    assert study_loss(logits, study, none, 0.3).item() == pytest.approx(entropy + 0.3 * binary, abs=1e-6)


def test_unknown_labels_do_not_count():
    torch.manual_seed(1)
    logits = torch.randn(3, 5, requires_grad=True)
    study = torch.tensor([[0, 1.0, 0, 0], [torch.nan] * 4, [1.0, 0, 0, 0]])
    none = torch.tensor([torch.nan, 1.0, 0.0])
    loss = study_loss(logits, study, none, 0.5)
    known = study_loss(logits[[0, 2]], study[[0, 2]], torch.full((2,), torch.nan), 0.5)
    told = study_loss(logits[1:], torch.full((2, 4), torch.nan), none[1:], 0.5)
    assert loss.item() == pytest.approx((known + told).item(), abs=1e-6)
    loss.backward()
    assert logits.grad[0, 4] == 0 and (logits.grad[1, :4] == 0).all()


def test_a_batch_without_any_label_costs_nothing_and_still_has_gradients():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = study_loss(logits, torch.full((2, 4), torch.nan), torch.full((2,), torch.nan), 0.5)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_a_loaded_model_needs_no_starting_weights_and_all_of_its_own():
    recipe = override(RECIPE, starting_weights="/gone/imagenet.safetensors")
    weights = StudyClassifier(recipe).state_dict()
    record = {
        "family": "study",
        "recipe": {"backbone": "test_resnet", "image_size": 32, "hidden": 16, "starting_weights": "/gone"},
    }
    model = load(record, weights, torch.device("cpu"))
    assert not model.training
    del weights["head.3.bias"]
    with pytest.raises(RuntimeError, match=r"head\.3\.bias"):
        load(record, weights, torch.device("cpu"))
