"""The model families: the recipe each is trained by, its network, what it answers, and how a bundle becomes a model.

No other file compares names of families; kitlib.training.driver adds how each is trained. A network's file is imported when
one is built: ultralytics takes seconds, and is missing from a kernel that carries no YOLO.
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
    StudyRecipe,
    TrainingRecipe,
)
from kitlib.settings import from_dict, override

STUDIES, CLASSES, BOXES, LUNGS = "studies", "classes", "boxes", "lungs"


@dataclass(frozen=True)
class Family:
    """One kind of model.

    `answers` is STUDIES (the four study classes and none), CLASSES (those of its labels), BOXES or LUNGS (label images).
    `network` builds it, with random or starting weights, from a recipe and the names of its classes. `sees_patches`: its
    input is patches of an image. `one_process`: several processes cannot train one model together. `no_submission` says, of
    a family that answers no row of a submission, what to submit in its place; empty where it does.
    """

    name: str
    recipe: type[TrainingRecipe]
    answers: str
    network: Callable[[Any, Sequence[str]], Any]
    sees_patches: bool = False
    one_process: bool = False
    no_submission: str = ""


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

    return FasterRCNNDetector(recipe)


def _yolo(recipe: DetectorRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.yolo import YoloDetector

    return YoloDetector(recipe)


def _segmenter(recipe: SegmenterRecipe, classes: Sequence[str]) -> Any:
    from kitlib.models.segmenter import Segmenter

    return Segmenter(recipe)


_FINDINGS = "knows findings, which no row of a submission asks for; submit a study model or a detector that starts from it"
_LUNGS = "draws lungs, which no row of a submission asks for; name its run by the kernel's key `lungs`"

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("study", StudyRecipe, STUDIES, _study),
        Family("findings", FindingsRecipe, CLASSES, _findings, no_submission=_FINDINGS),
        Family("patches", PatchRecipe, CLASSES, _patches, sees_patches=True, no_submission=_FINDINGS),
        Family("faster_rcnn", DetectorRecipe, BOXES, _faster_rcnn),
        Family("yolo", DetectorRecipe, BOXES, _yolo, one_process=True),
        Family("segmenter", SegmenterRecipe, LUNGS, _segmenter, no_submission=_LUNGS),
    )
}


def family_of(recipe: TrainingRecipe) -> Family:
    """The family that a recipe trains. Raises ValueError for a recipe of no family."""
    for family in FAMILIES.values():
        if type(recipe) is family.recipe and getattr(recipe, "family", family.name) == family.name:
            return family
    raise ValueError(f"{type(recipe).__name__} trains no model; there are: {', '.join(FAMILIES)}")


def recorded_family(record: Mapping[str, Any], bundle: str | Path = "this bundle") -> Family:
    """The family of the model in `bundle`, by its record. Raises BundleError for one that this kit does not know."""
    if record["family"] not in FAMILIES:
        raise BundleError(f"{bundle}: no family {record['family']!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[record["family"]]


def load_network(record: Mapping[str, Any], weights: dict[str, torch.Tensor], device: torch.device) -> Any:
    """The network of a bundle's record and weights on `device`, ready to predict. Raises where the weights do not fit."""
    family = recorded_family(record)
    # Its weights are these, wherever it started from.
    recipe = override(from_dict(family.recipe, record["recipe"]), starting_weights="")
    network = family.network(recipe, record["classes"])
    network.load_state_dict(weights, strict=True)
    return network.eval().to(device, memory_format=memory_format(device))
