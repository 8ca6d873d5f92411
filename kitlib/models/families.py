"""Lists the model families with their recipe, network and kind of prediction, and loads a bundle's network.

Only this file decides by the names of families; kitlib.training.driver adds how each family is trained. A network's module
is imported only when a network is built: importing ultralytics takes seconds, and kernels without a YOLO do not have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitlib.device import memory_format
from kitlib.errors import BundleError
from kitlib.recipes.fields import (
    DetectorRecipe,
    FindingsRecipe,
    PatchRecipe,
    SegmenterRecipe,
    SparseSegmenterRecipe,
    StudyRecipe,
    TrainingRecipe,
)
from kitlib.settings import from_dict

STUDIES, CLASSES, BOXES, LUNGS, MASKS = "studies", "classes", "boxes", "lungs", "masks"


@dataclass(frozen=True)
class Family:
    """A model family: its recipe, its network and what it predicts.

    `answers` is STUDIES (the family predicts the four study classes and `none`), CLASSES (the classes of the training data),
    BOXES, LUNGS (lung masks), or MASKS (masks of a structure that most images do not have). `network` is a function
    that builds the network, with random or starting weights, from a recipe and the class names. `sees_patches` is True if
    the network's input is patches of an image. `one_process` is True if several processes cannot train one model together.
    """

    name: str
    recipe: type[TrainingRecipe]
    answers: str
    network: Callable[[Any, Sequence[str]], Any]
    sees_patches: bool = False
    one_process: bool = False


def _study(recipe: StudyRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.classifier import StudyClassifier

    return StudyClassifier(recipe)


def _findings(recipe: FindingsRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.classifier import FindingsClassifier

    return FindingsClassifier(recipe, classes)


def _patches(recipe: PatchRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.patch_classifier import PatchClassifier

    return PatchClassifier(recipe, classes)


def _faster_rcnn(recipe: DetectorRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.faster_rcnn import FasterRCNNDetector

    return FasterRCNNDetector(recipe, classes)


def _retinanet(recipe: DetectorRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.retinanet import RetinaNetDetector

    return RetinaNetDetector(recipe, classes)


def _yolo(recipe: DetectorRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.yolo import YoloDetector

    return YoloDetector(recipe, classes)


def _segmenter(recipe: SegmenterRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.segmenter import Segmenter

    return Segmenter(recipe)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("study", StudyRecipe, STUDIES, _study),
        Family("findings", FindingsRecipe, CLASSES, _findings),
        Family("patches", PatchRecipe, CLASSES, _patches, sees_patches=True),
        Family("faster_rcnn", DetectorRecipe, BOXES, _faster_rcnn),
        Family("retinanet", DetectorRecipe, BOXES, _retinanet),
        Family("yolo", DetectorRecipe, BOXES, _yolo, one_process=True),
        Family("segmenter", SegmenterRecipe, LUNGS, _segmenter),
        Family("sparse_segmenter", SparseSegmenterRecipe, MASKS, _segmenter),
    )
}


def family_of(recipe: TrainingRecipe) -> Family:
    """Return the Family to which the recipe's class belongs. Raises ValueError if there is none."""
    for family in FAMILIES.values():
        if type(recipe) is family.recipe and getattr(recipe, "family", family.name) == family.name:
            return family
    raise ValueError(f"{type(recipe).__name__} belongs to no model family; the families are: {', '.join(FAMILIES)}")


def recorded_family(record: Mapping[str, Any], bundle: str | Path = "this bundle") -> Family:
    """Return the Family of a bundle's `record`. Raises BundleError, with the path `bundle`, if the family is unknown."""
    if record["family"] not in FAMILIES:
        raise BundleError(f"{bundle}: unknown family {record['family']!r}; the families are: {', '.join(FAMILIES)}")
    return FAMILIES[record["family"]]


def load_network(record: Mapping[str, Any], weights: dict[str, torch.Tensor], device: torch.device) -> Any:
    """Build the network that a bundle's record describes, with `weights`; return it on `device` in evaluation mode.

    Raises BundleError for an unknown family, and RuntimeError if names or shapes of the weights do not fit the network.
    """
    family = recorded_family(record)
    # The bundle's weights replace the starting weights, which may no longer exist.
    fields = {name: value for name, value in record["recipe"].items() if name not in ("starting_weights", "random_parts")}
    recipe = from_dict(family.recipe, fields)
    network = family.network(recipe, record["classes"])
    network.load_state_dict(weights, strict=True)
    return network.eval().to(device, memory_format=memory_format(device))
