"""Recipes: a published system's settings as frozen dataclasses, and strict overrides of single fields.

A notebook names a recipe and may override fields; a name or a type that does not exist is an error that lists what does.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")


class RecipeError(ValueError):
    """An unknown recipe, an unknown field, or a value of the wrong type."""


@dataclass(frozen=True)
class StudyRecipe:
    """Study-level classifier. Defaults: Heidelberg SIIM project, report section on the study model, as the kit mends it."""

    backbone: str = "resnext101_32x8d"  # any timm name; Heidelberg's NIH backbone
    pretrained_file: str = ""  # ImageNet weights as a local file; empty: from scratch, and the record says so
    channels: int = 1  # 1 grey, 3 for weights that want RGB
    image_size: int = 512  # side of the square canvas, pixels
    placement: str = "letterbox"  # or "stretch", as most public solutions do
    hidden: int = 1024  # units of the head's hidden layer (2048-1024-ReLU-dropout-5)
    dropout: float = 0.5
    none_weight: float = 0.5  # weight of the image-level `none` loss beside the study's cross entropy
    epochs: int = 58
    batch_size: int = 15
    optimizer: str = "sgd"  # or "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    patience: int = 10  # epochs without a better validation score before training stops
    frozen_backbone: bool = False  # frozen means batch-norm statistics too
    horizontal_flip: float = 0.5  # probabilities and strengths of the training augmentation
    rotate_degrees: float = 10.0
    brightness_contrast: float = 0.2


@dataclass(frozen=True)
class DetectorRecipe:
    """Opacity detector of either family. Defaults: Heidelberg SIIM project, report section on Faster R-CNN."""

    family: str = "faster_rcnn"  # or "yolo"
    backbone: str = "resnext101_32x8d"  # faster_rcnn: a timm name; yolo: an ultralytics name such as "yolov5lu"
    pretrained_file: str = ""  # weights as a local file: timm's for the backbone, or a YOLO bundle's weights.safetensors
    channels: int = 1  # faster_rcnn: 1 grey, 3 for weights that want RGB; yolo always sees the grey image three times
    image_size: int = 512  # a multiple of 32
    placement: str = "letterbox"
    epochs: int = 50
    batch_size: int = 10
    nominal_batch: int = 0  # images a step of the optimiser, gathered over whole batches; 0: one batch
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    patience: int = 10
    horizontal_flip: float = 0.3
    rotate_degrees: float = 0.0  # the report's 20 degrees inflate boxes; a parameter
    brightness_contrast: float = 0.3
    mosaic: float = 0.0  # yolo: probability that four images make one
    mixup: float = 0.0  # yolo: probability that two images are blended
    negatives: float = 1.0  # images without a box to train on, at most this share of those with one; Heidelberg: 0
    zoom: float = 0.5  # yolo: scale of a training image, between 1 - zoom and 1 + zoom
    width: float = 1.0  # yolo: channels, as a share of the named model's
    norm_momentum: float = 0.03  # yolo: a batch's weight in the running statistics; a short training needs more
    fpn_channels: int = 256  # faster_rcnn: width of the feature pyramid
    box_hidden: int = 1024  # faster_rcnn: units of the two hidden layers that judge a region
    box_samples: int = 512  # faster_rcnn: regions an image that training judges
    proposals: int = 1000  # faster_rcnn: regions an image that reach the second stage
    nms_iou: float = 0.5  # of two boxes that overlap more, the lower score goes
    max_detections: int = 100  # boxes kept an image at prediction
    min_score: float = 0.001  # low-confidence boxes earn average precision; see VOC 2010 AP


# The published settings, and sizes that two CPU cores finish in a minute.
RECIPES: dict[str, StudyRecipe | DetectorRecipe] = {
    "heidelberg_study": StudyRecipe(frozen_backbone=True),
    "heidelberg_faster_rcnn": DetectorRecipe(),
    # Gains and mosaic are ultralytics' own; the optimiser's settings are the report's.
    "heidelberg_yolo": DetectorRecipe(
        family="yolo",
        backbone="yolov5lu",
        epochs=35,
        batch_size=16,
        nominal_batch=64,
        learning_rate=0.01,
        weight_decay=5e-4,
        warmup_epochs=3.0,
        horizontal_flip=0.5,
        mosaic=1.0,
        mixup=0.5,
    ),
    "small_study": StudyRecipe(
        backbone="test_efficientnet",
        image_size=128,
        hidden=128,
        dropout=0.2,
        epochs=10,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.02,
        warmup_epochs=1.0,
        rotate_degrees=5.0,
        brightness_contrast=0.1,
    ),
    "small_faster_rcnn": DetectorRecipe(
        backbone="test_resnet",
        image_size=96,
        epochs=3,
        batch_size=4,
        optimizer="adamw",
        learning_rate=3e-3,
        fpn_channels=32,
        box_hidden=64,
        box_samples=32,
        proposals=40,
        max_detections=30,
    ),
    "small_yolo": DetectorRecipe(
        family="yolo",
        backbone="yolov8n",
        width=0.25,
        image_size=128,
        epochs=7,
        batch_size=8,
        optimizer="adamw",
        learning_rate=5e-3,
        zoom=0.2,
        norm_momentum=0.1,
        max_detections=30,
    ),
}


def recipe(name: str, kind: type[R], **overrides: Any) -> R:
    """The recipe `name`, which must be a `kind`, with fields replaced. Raises RecipeError with the valid names."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe is called {name!r}; there are: {', '.join(RECIPES)}")
    found = RECIPES[name]
    if not isinstance(found, kind):
        fitting = [other for other, value in RECIPES.items() if isinstance(value, kind)]
        raise RecipeError(f"recipe {name!r} is a {type(found).__name__}, wanted a {kind.__name__}: {', '.join(fitting)}")
    return override(found, **overrides)


def override(settings: R, **overrides: Any) -> R:
    """A copy of a frozen dataclass with fields replaced, names and types checked. An int passes for a float."""
    hints = typing.get_type_hints(type(settings))
    fields = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    for name, value in overrides.items():
        if name not in fields:
            raise RecipeError(f"{type(settings).__name__} has no field {name!r}; it has: {', '.join(fields)}")
        overrides[name] = _checked(value, fields[name], f"{type(settings).__name__}.{name}")
    return dataclasses.replace(settings, **overrides)


def from_dict(kind: type[R], values: dict[str, Any]) -> R:
    """A settings dataclass from JSON or YAML: missing fields keep their default, unknown or ill-typed ones are errors."""
    if not isinstance(values, dict):
        raise RecipeError(f"{kind.__name__} wants a mapping of its fields, got {values!r}")
    return override(kind(), **values)


def _checked(value: Any, kind: Any, place: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        return _checked(value, next(choice for choice in choices if choice is not type(None)), place)
    if kind is float and type(value) is int:
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if type(value) is not (origin or kind):
        raise RecipeError(f"{place} wants {getattr(kind, '__name__', kind)}, got {value!r} ({type(value).__name__})")
    return value
