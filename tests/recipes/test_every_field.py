"""Every field of every recipe has an effect: training or prediction reads it, or the recipe rejects any other value."""

import sys
from pathlib import Path

import pytest

import kitlib
from kitlib import settings as kitlib_settings
from kitlib.errors import SettingsError
from kitlib.inference import predict
from kitlib.recipes import fields as recipes
from kitlib.recipes.fields import TrainingRecipe
from kitlib.settings import checked, field_kinds, override
from kitlib.training.apply_lungs import apply_lungs
from kitlib.training.loop import batches_per_step
from tests.small_lungs import stored_lungs
from tests.small_masks import RECIPE as SEGMENTER
from tests.small_masks import SPARSE, SmallMasks
from tests.small_tasks import train_small
from tests.small_xrays import RECIPE as STUDY
from tests.small_xrays import SmallXrays
from tests.training.test_detector import FASTER_RCNN, RETINANET, YOLO
from tests.training.test_findings import RECIPE as FINDINGS
from tests.training.test_findings import SmallFindings
from tests.training.test_patches import RECIPE as PATCHES

LIBRARY = str(Path(kitlib.__file__).parent)
# Files that only check or copy a value do not count as using it.
CHECKS = {kitlib_settings.__file__, recipes.__file__}

# All options that can be used together; each family gets those that it supports.
ON = {
    "epochs": 2,
    "optimizer": "sgd",
    "nominal_batch": 8,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "ema_decay": 0.5,
    "views": ["full", "lungs"],
    "trained_on": "either",
    "rotate_degrees": 5.0,
    "shear_degrees": 5.0,
    "shear_p": 0.5,
    "brightness_contrast": 0.1,
    "gamma_drawn": [0.9, 1.1],
    "salt_pepper": 0.01,
    "salt_pepper_p": 0.5,
    "sharpen_p": 0.2,
    "blur_p": 0.2,
    "blur_pixels": 3,
    "noise": 0.05,
    "noise_p": 0.5,
    "cutouts": 1,
    "erase_p": 0.2,
    "l1": 1e-6,
    "segmentation": 0.5,
}
STEPS = {"epochs": 2, "schedule": "step", "milestones": [1], "warmup_epochs": 0.0}
PLATEAU = {"epochs": 2, "schedule": "plateau", "warmup_epochs": 0.0}
MASKS_ONLY = {"lungs": "masks"}
FROZEN = {"frozen_backbone": True, "unfreeze_every": 1, "starting_weights": "first"}  # "first": the first training's bundle
# For each family: a recipe, and overrides for several trainings that together read all of its fields.
TRAININGS = {
    "study": (STUDY, [ON | MASKS_ONLY, STEPS | FROZEN, PLATEAU]),
    "findings": (FINDINGS, [ON | MASKS_ONLY, STEPS | FROZEN, PLATEAU]),
    "patches": (
        PATCHES,
        [{name: value for name, value in ON.items() if name not in ("views", "trained_on")}, STEPS | FROZEN, PLATEAU],
    ),
    "faster_rcnn": (FASTER_RCNN, [ON | MASKS_ONLY, STEPS, PLATEAU]),
    "retinanet": (RETINANET, [ON | MASKS_ONLY, STEPS, PLATEAU]),
    "yolo": (YOLO, [{"epochs": 2, "optimizer": "sgd", "warmup_epochs": 1.0, **MASKS_ONLY, "trained_on": "either"}]),
    "segmenter": (SEGMENTER, [ON, STEPS | {"loss": "cross_entropy"}, PLATEAU]),
    "sparse_segmenter": (SPARSE, [ON | {"views": ["full", "flip"]}, STEPS, PLATEAU]),
}
# Values of all types; each field is tried with the values that its annotation allows.
VALUES = (
    *(True, False, 0, 1, 2, 3, 17, 32, 64, 0.0, 0.25, 0.75, 1.5, "other"),
    *(
        "sgd",
        "adamw",
        "cosine",
        "step",
        "letterbox",
        "stretch",
        "bicubic",
        "best",
        "last",
        "darkness",
        "masks",
        "full",
        "either",
        "border",
    ),
    *("outside_lungs", "backbone", "half", "study", "both", "auc", "accuracy", "votes", "mean_softmax", "ciou", "yolo"),
    *(
        "faster_rcnn",
        "retinanet",
        "l1",
        "unet",
        "resunet",
        "dice",
        "cross_entropy",
        (0.7, 0.9),
        (1, 3),
        ("full", "flip"),
        ("lungs",),
    ),
    *(("lungs", "heart"), ("pneumothorax",), "bce_dice_focal", (1, 2, 3)),
)


@pytest.mark.parametrize("family", TRAININGS)
def test_each_field_is_read_by_a_training_or_refuses_another_value(family, tmp_path, monkeypatch):
    recipe, trainings = TRAININGS[family]
    read = fields_read(monkeypatch, type(recipe))
    for number, changes in enumerate(trainings):
        if "starting_weights" in changes:
            changes = changes | {"starting_weights": str(tmp_path / "run0" / "bundle")}
        known = {name: value for name, value in changes.items() if name in field_kinds(type(recipe))}
        train(family, override(recipe, **known), tmp_path / f"run{number}")
    monkeypatch.undo()
    ignored = [name for name in field_kinds(type(recipe)) if name not in read and accepted(recipe, name)]
    assert ignored == []


def test_an_unread_field_is_detected(monkeypatch):
    read = fields_read(monkeypatch, type(STUDY))
    override(STUDY, epochs=2)
    assert STUDY.dropout == 0.5 and read == set()  # neither copies nor tests count
    batches_per_step(STUDY)
    assert read == {"batch_size", "nominal_batch"}


def fields_read(monkeypatch, kind):
    """Return a set that collects the fields that the library reads from recipes of a kind or from bundle records."""
    read = set()

    def note(name):
        caller = sys._getframe(2).f_code.co_filename
        if caller.startswith(LIBRARY) and caller not in CHECKS:
            read.add(name)

    def attribute(recipe, name):
        if type(recipe) is kind and not name.startswith("__"):
            note(name)
        return object.__getattribute__(recipe, name)

    class Record(dict):
        def __getitem__(self, name):
            note(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            note(name)
            return super().get(name, default)

    def read_bundle(folder, original=predict.read_bundle):
        record, weights = original(folder)
        return record | {"recipe": Record(record["recipe"])}, weights

    monkeypatch.setattr(TrainingRecipe, "__getattribute__", attribute, raising=False)
    monkeypatch.setattr(predict, "read_bundle", read_bundle)
    return read


def accepted(recipe, name):
    """Return copies of the recipe with other valid values of the field."""
    kind, taken, allowed = field_kinds(type(recipe))[name], [], []
    for value in VALUES:
        try:
            value = checked(value, kind)
        except ValueError:
            continue
        allowed.append(value)
        if value != getattr(recipe, name):
            try:
                taken.append(override(recipe, **{name: value}))
            except SettingsError:
                continue
    assert allowed, f"{name}: VALUES has none that {kind} allows"
    return taken


def train(family, recipe, folder):
    if "segmenter" in family:
        small = SmallMasks(folder.with_name(f"{folder.name}-masks"), sparse=family == "sparse_segmenter")
        train_small(folder, small, recipe, fold=0, masks=small.masks)
        if family == "sparse_segmenter":
            return
        apply_lungs(small.images, small, folder / "bundle", folder.with_name(f"{folder.name}-applied"), progress=False)
        return
    small = SmallFindings(32) if family == "findings" else SmallXrays(16 if family != "patches" else 32)
    lungs = stored_lungs(folder.with_name(f"{folder.name}-lungs"), small) if recipe.lungs == "masks" else None
    train_small(folder, small, recipe, lungs=lungs)
