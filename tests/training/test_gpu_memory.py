"""GPU memory of training: what a recipe needs, whether it fits a T4, and what the error for too little memory says."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from kitlib.errors import TrainingError
from kitlib.models.classifier import Classifier
from kitlib.models.yolo import Network
from kitlib.recipes.fields import StudyRecipe
from kitlib.recipes.named import RECIPES, recipe
from kitlib.settings import override
from kitlib.training.gpu_memory import GIB, SURCHARGE, T4_GIB, explaining_memory, training_memory_gib
from tests.small_tasks import train_small
from tests.small_xrays import SmallXrays

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"
ROW = re.compile(r"\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|")


@cache
def memory_gib(name):
    return training_memory_gib(RECIPES[name])


@pytest.fixture(scope="module")
def documented():
    """The memory of each recipe in the document, in GiB; the other columns are those of the recipes."""
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    expected = [
        (name, recipe.image_size, recipe.batch_size, recipe.nominal_batch or recipe.batch_size)
        for name, recipe in RECIPES.items()
        if not name.startswith("small_")
    ]
    assert [(name, *map(int, numbers)) for name, *numbers, _ in rows] == expected
    return {name: float(gib) for name, *_, gib in rows}


# The others would fit with twice their batch; benchmarks/memory.py computes them, too.
LARGE = ("heidelberg_faster_rcnn", "lean_study", "lean_faster_rcnn", "lean_vinbigdata_yolo", "lean_vinbigdata_faster_rcnn")
LARGE += ("lean_vinbigdata_classifier", "lean_ranzcr", "strong_study", "strong_faster_rcnn", "strong_yolo")


def test_every_published_recipe_fits_a_t4(documented):
    assert max(documented.values()) < T4_GIB
    assert {name for name, gib in documented.items() if gib > T4_GIB / 2} == set(LARGE)


@pytest.mark.parametrize("name", sorted({*LARGE} - {"lean_faster_rcnn"}))  # the strong one has the same network
def test_the_document_has_the_memory_that_is_computed(documented, name):
    assert memory_gib(name) == pytest.approx(documented[name], abs=0.051)


def test_each_image_adds_what_its_forward_pass_keeps():
    one, batch = training_memory_gib(recipe("lean_study", StudyRecipe, batch_size=1)), memory_gib("lean_study")
    # Counted separately: EfficientNet-B7 keeps 1,837 MiB for each image of 600 x 600 pixels.
    assert (batch - one) / (RECIPES["lean_study"].batch_size - 1) / SURCHARGE * 1024 == pytest.approx(1837, rel=0.01)


def test_the_weights_count_once_for_each_of_their_copies():
    def copies(**changes):
        small = StudyRecipe(backbone="resnet18", hidden=0, channels=3, image_size=64, batch_size=1)
        return training_memory_gib(override(small, **changes)) * GIB / SURCHARGE / (4 * parameters)

    parameters = 11_689_512 - 513_000 + 513 * 5  # torchvision's ResNet18 without its classifier, five outputs
    plain = copies(optimizer="sgd")  # weights, gradients, momentum, and a float16 copy for the backward pass
    assert plain == pytest.approx(3.5, abs=0.03)
    assert copies(optimizer="adamw") - plain == pytest.approx(1, abs=0.01)
    assert copies(optimizer="sgd", ema_decay=0.9) - plain == pytest.approx(1, abs=0.01)
    assert copies(frozen_backbone=True) == pytest.approx(1, abs=0.01)
    # The last stage, 8.39 of the 11.18 million parameters, is unfrozen in the second epoch.
    unfrozen = copies(frozen_backbone=True, unfreeze_every=1, epochs=2, optimizer="sgd")
    assert 2 < unfrozen < plain


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "cudnn"])
@pytest.mark.parametrize("name", ["small_study", "small_yolo"])
def test_a_training_without_enough_memory_names_the_fields_to_change(tmp_path, monkeypatch, name, error):
    calls = []

    def fail(*_):
        calls.append(1)
        raise error

    network = Classifier if name == "small_study" else Network
    monkeypatch.setattr(network, "forward" if name == "small_study" else "loss", fail)
    small = override(RECIPES[name], image_size=64, batch_size=6, nominal_batch=12)
    said = "out" if isinstance(error, torch.OutOfMemoryError) else "probably out"
    message = (
        rf"^{said} of memory with batch_size 6 and nominal_batch 12 at image_size 64 \({str(error).splitlines()[0]}\)\. "
        r'Set overrides \{"batch_size": 3, "nominal_batch": 12\}: .* a step still has 12 images'
    )
    with pytest.raises(TrainingError, match=message):
        train_small(tmp_path, SmallXrays(16), small)
    assert len(calls) == 1  # ultralytics would go on with half of the batch


@pytest.mark.parametrize(
    ("batch_size", "advice"),
    [(1, "Lower image_size, or choose a smaller backbone"), (2, r'Set overrides \{"batch_size": 1, "nominal_batch": 2\}')],
)
def test_a_batch_is_halved_unless_it_is_a_single_image(batch_size, advice):
    recipe = override(RECIPES["small_study"], batch_size=batch_size)
    with pytest.raises(TrainingError, match=rf"batch_size {batch_size} .*{advice}"), explaining_memory(recipe):
        raise ERRORS[0]


def test_other_errors_are_not_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        train_small(tmp_path, SmallXrays(16), override(RECIPES["small_study"], image_size=64))
