"""Recipes: a published system's settings as frozen dataclasses, and strict overrides of single fields.

A notebook names a recipe and may override fields; a name or a type that does not exist is an error that lists what does.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from kitlib.classes import MASK_CODES

R = TypeVar("R")
# The canvases a model can look at, each as it is or mirrored.
VIEWS = {"full": ("full", False), "flip": ("full", True), "lungs": ("lungs", False), "lungs_flip": ("lungs", True)}
# Fields that take one of a few words.
CHOICES = {
    "lungs": ("darkness", "masks"),
    "trained_on": ("full", "lungs", "either"),
    "schedule": ("cosine", "plateau"),
    "network": ("unet", "resunet", "fc_densenet103"),
    "loss": ("dice", "cross_entropy"),
}
# Fields of every training that a segmenter would not heed.
NOT_OF_SEGMENTERS = (
    *("backbone", "channels", "ema_decay", "views", "lungs", "trained_on", "masked"),
    *("sharpen_p", "cutouts", "erase_p"),
)


class RecipeError(ValueError):
    """An unknown recipe, an unknown field, or a value of the wrong type."""


@dataclass(frozen=True)
class TrainingRecipe:
    """What every training has: starting point, canvas, optimiser, augmentation, and the views that a prediction averages.

    Defaults: Heidelberg SIIM project, report section 3, as the kit mends it. A `_p` is the probability that an image meets
    the augmentation.
    """

    backbone: str = "resnext101_32x8d"  # any timm name; Heidelberg's NIH backbone
    starting_weights: str = (
        ""  # a run's bundle folder, or a .safetensors or .npz file; empty: from scratch, as the record says
    )
    channels: int = 1  # 1 grey, 3 for weights that want RGB
    image_size: int = 512  # side of the square canvas, pixels
    placement: str = "letterbox"  # or "stretch", as most public solutions do, or "centre_crop"
    epochs: int = 50
    batch_size: int = 10
    nominal_batch: int = 0  # images a step of the optimiser, gathered over whole batches; 0: one batch
    optimizer: str = "sgd"  # "adam" or "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    schedule: str = "cosine"  # or "plateau": a tenth of the rate where the validation score has stopped to rise
    plateau_epochs: int = 5  # without a better score until the rate falls
    schedule_every: int = 0  # of the cosine: epochs a step; 0: every batch; Heidelberg's 2 never reaches the floor
    keep: str = "best"  # the epoch that validates best; or "last", where nothing may be chosen on the fold that is predicted
    patience: int = 10  # epochs without a better validation score before training stops; not if the last one is kept
    ema_decay: float = 0.0  # of the moving average of the weights that is judged and kept; 0: the weights themselves
    views: tuple[str, ...] = ("full",)  # of "full", "flip", "lungs", "lungs_flip": what a prediction averages
    lungs: str = "darkness"  # who finds them: "darkness" (kitlib.lung_box), or "masks" of a trained segmenter
    trained_on: str = "full"  # what training sees: "full" images, crops of the "lungs", or "either", drawn image by image
    masked: bool = False  # outside of the lungs' mask all is black, in training and prediction; wants lungs "masks"
    horizontal_flip: float = 0.5  # probability
    vertical_flip: float = 0.0  # probability; of Heidelberg's YOLO
    rotate_degrees: float = 0.0  # to either side; inflates boxes
    shift: float = 0.0  # to either side, share of the canvas
    turn_p: float = 0.5  # of rotation and shift, together
    brightness_contrast: float = 0.2  # strength of each
    brightness_contrast_p: float = 0.5
    sharpen_p: float = 0.0  # sharpened or blurred, never both
    blur_p: float = 0.0
    cutouts: int = 0  # most square holes, each a sixteenth of the canvas's side
    cutouts_p: float = 0.3
    erase_p: float = 0.0  # one rectangle of 1 to 10 % of the canvas

    def __post_init__(self) -> None:
        # Before a training, and not when it predicts at its end.
        if not self.views or set(self.views) - VIEWS.keys():
            raise RecipeError(f"views are {list(self.views)}; there are: {', '.join(VIEWS)}")
        for name, choices in CHOICES.items():
            if getattr(self, name, choices[0]) not in choices:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; there are: {', '.join(choices)}")
        if self.schedule == "plateau" and self.warmup_epochs:
            raise RecipeError(f"schedule is 'plateau', which has no warm-up; set warmup_epochs=0, not {self.warmup_epochs}")
        if self.masked and self.lungs != "masks":
            raise RecipeError(
                f'masked is true and lungs is {self.lungs!r}; what darkness finds is no mask: set lungs="masks"'
            )
        if self.trained_on == "lungs" and any(VIEWS[view][0] != "lungs" for view in self.views):
            raise RecipeError(
                f"trained_on is 'lungs' and views are {list(self.views)}: a model of crops knows no whole images; set views "
                "to lungs and lungs_flip, or trained_on to either"
            )


@dataclass(frozen=True)
class ClassifierRecipe(TrainingRecipe):
    """A backbone with Heidelberg's head: 2048-1024-ReLU-dropout-classes."""

    hidden: int = 1024  # units of the head's hidden layer
    dropout: float = 0.5
    frozen_backbone: bool = False
    frozen_statistics: bool = True  # of a frozen backbone's batch norm; Heidelberg's code lets them run on
    unfreeze_every: int = 0  # epochs after which one more stage of a frozen backbone learns, the last first; 0: none does
    unfrozen_rate: float = 0.1  # learning rate of such stages, share of the head's
    label_smoothing: float = 0.0  # share of the truth that is spread evenly over the classes
    mixup: float = 0.0  # of the beta distribution that draws how two images are blended; 0: none; Zhang et al. 2018
    cutmix: float = 0.0  # the same for a rectangle of the other image; Yun et al. 2019


@dataclass(frozen=True)
class StudyRecipe(ClassifierRecipe):
    """Study-level classifier with the image-level `none` beside it. Defaults: report section 3.4."""

    outputs: str = "both"  # "study", "none" (a classifier of its own, 15th place) or both: what is learnt and answered
    none_weight: float = 0.5  # weight of the image-level `none` loss beside the study's cross entropy
    segmentation: float = 0.0  # weight of the auxiliary loss of the boxes' mask (0.6 BCE + 0.4 Dice, 1st place); 0: no head
    epochs: int = 58
    batch_size: int = 15
    learning_rate: float = 5e-4
    rotate_degrees: float = 10.0


@dataclass(frozen=True)
class FindingsRecipe(ClassifierRecipe):
    """Classifier of single images over the classes of their table labels. Defaults: report section 3.1, the NIH backbone."""

    multi_label: bool = True  # each class for itself (BCE), or exactly one is true (cross entropy)
    channels: int = 3
    image_size: int = 224
    placement: str = "centre_crop"  # the shorter side is resized to 256, its middle 224 are the canvas
    epochs: int = 35
    batch_size: int = 32
    schedule_every: int = 1
    rotate_degrees: float = 20.0
    turn_p: float = 1.0
    brightness_contrast: float = 0.0
    blur_p: float = 0.3
    erase_p: float = 0.3


@dataclass(frozen=True)
class DetectorRecipe(TrainingRecipe):
    """Opacity detector of either family. Defaults: report section 3.1, Faster R-CNN."""

    family: str = "faster_rcnn"  # or "yolo", whose backbone is an ultralytics name such as "yolov5lu" or "squeezenet1_1"
    inference_size: int = 0  # side of the canvas at prediction, a multiple of 32; 0: as in training
    negatives: float = 1.0  # images without a box to train on, at most this share of those with one; Heidelberg: 0
    box_loss: str = ""  # faster_rcnn: "smooth_l1" or "ciou"; yolo: "ciou" or "giou"; empty: the first
    box_gain: float = 7.5  # yolo: weights of the losses, ultralytics' own
    class_gain: float = 0.5
    dfl_gain: float = 1.5
    mosaic: float = 0.0  # yolo: probability that four images make one
    mixup: float = 0.0  # yolo: probability that two images are blended
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
    horizontal_flip: float = 0.3
    brightness_contrast: float = 0.3
    schedule_every: int = 1


@dataclass(frozen=True)
class SegmenterRecipe(TrainingRecipe):
    """Network that draws the lungs' mask, and what is made of it. Defaults: UNet + HRNet paper, sections 3.2, 3.3 and 4.

    Its schedule and the number of epochs without gain are the kit's; the paper names none.
    """

    network: str = "unet"  # or "resunet", "fc_densenet103"
    width: float = 1.0  # channels, as a share of the published network's
    structures: tuple[str, ...] = ("lungs",)  # of MASK_CODES: one has a sigmoid; several, and background, a softmax
    loss: str = "dice"  # with squared denominators; or "cross_entropy"
    background_weight: float = 1.0  # of the background in cross entropy
    equalise: bool = False  # the histogram, as Patched FLANNEL does
    gamma: float = 1.0  # grey 0..1 to this power, after that
    backbone: str = ""
    image_size: int = 512
    epochs: int = 25
    batch_size: int = 8
    optimizer: str = "adam"
    learning_rate: float = 0.005
    schedule: str = "plateau"
    horizontal_flip: float = 0.0
    rotate_degrees: float = 45.0
    turn_p: float = 1.0
    brightness_contrast: float = 0.0
    scale_x: tuple[float, float] = (0.8, 1.1)  # of widths, drawn evenly between the two
    scale_y: tuple[float, float] = (1.0, 1.0)
    shear_degrees: float = 11.3  # along x, to either side; tan of it is the paper's 0.2
    shear_p: float = 0.7
    gamma_drawn: tuple[float, float] = (0.5, 3.0)  # of the grey of training images, drawn evenly between the two
    salt_pepper: float = 0.01  # share of pixels that turn black or white
    salt_pepper_p: float = 0.3
    blur_p: float = 0.5  # Gaussian, 11 x 11 pixels, sigma 0.5
    noise: float = 0.05  # standard deviation, of grey 0..1; the paper's 0.5 has no unit
    noise_p: float = 0.3
    # What becomes of a mask before anything is cropped to it: published for 512 pixels a side, and done at that size.
    least_island: float = 0.01  # of the canvas; a smaller part of a mask is dropped before all else, by the kit's own rule
    dilations: int = 8  # by 3 x 3 pixels
    closings: int = 2
    least_area: float = 50_000 / 512**2  # of the canvas, after that; smaller masks are not trusted
    least_width: float = 0.65  # of the lungs' frame, in heights; a narrower one holds one lung
    margin: float = 0.05  # of the frame's sides, added around

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not self.structures
            or set(self.structures) - MASK_CODES.keys()
            or len(set(self.structures)) < len(self.structures)
        ):
            raise RecipeError(f"structures are {list(self.structures)}; there are, each once: {', '.join(MASK_CODES)}")
        if "lungs" in self.structures and {"left_lung", "right_lung"} & set(self.structures):
            raise RecipeError(f"structures are {list(self.structures)}; lungs are both sides as one: take them or the sides")
        if "lungs" not in self.structures and not {"left_lung", "right_lung"} <= set(self.structures):
            raise RecipeError(
                f"structures are {list(self.structures)}; wanted lungs, or left_lung and right_lung, among them"
            )
        if self.horizontal_flip and {"left_lung", "right_lung"} & set(self.structures):
            raise RecipeError(
                f"horizontal_flip is {self.horizontal_flip}, and structures are {list(self.structures)}: a mirrored left "
                "lung looks like a right one; set horizontal_flip=0.0, or structures to lungs"
            )
        usual = SegmenterRecipe.__dataclass_fields__
        told = [name for name in NOT_OF_SEGMENTERS if getattr(self, name) != usual[name].default]
        if told:
            leave = ", ".join(f"{name} (leave it at {usual[name].default!r})" for name in told)
            raise RecipeError(f"a segmenter takes no {leave}")


# Heidelberg's augmentation of the Faster R-CNN, report section 3.1.
_HEIDELBERG_BOXES = {
    "rotate_degrees": 20.0,
    "shift": 0.0625,  # albumentations' own, which the report leaves at its default
    "turn_p": 0.3,
    "brightness_contrast": 0.2,
    "brightness_contrast_p": 0.3,
    "sharpen_p": 0.5,
    "blur_p": 0.25,
    "cutouts": 6,
}
_HEIDELBERG_YOLO = DetectorRecipe(
    family="yolo",
    backbone="yolov5lu",
    epochs=35,
    batch_size=16,
    nominal_batch=64,
    learning_rate=0.01,
    weight_decay=5e-4,
    warmup_epochs=3.0,
    horizontal_flip=0.5,
    vertical_flip=0.1,
    mosaic=1.0,
    mixup=0.5,
    box_loss="giou",
)

# The published settings, and sizes that two CPU cores finish in a minute.
RECIPES: dict[str, TrainingRecipe] = {
    "heidelberg_backbone": FindingsRecipe(),
    "heidelberg_study": StudyRecipe(frozen_backbone=True, schedule_every=1),
    "heidelberg_faster_rcnn": DetectorRecipe(inference_size=1024, **_HEIDELBERG_BOXES),
    # The losses' gains are ultralytics' own: those of the report's equation 2 belong to YOLOv5's anchors, whose losses are
    # scaled otherwise, and make the boxes' gradients a hundredth, so that SGD at the published rate learns less of them.
    "heidelberg_yolo": _HEIDELBERG_YOLO,
    # Those gains all the same (with one class and no objectness the class output carries both of theirs; dfl, which the
    # report's network has not, keeps ultralytics' ratio to the box), and the report's thresholds, which cut off boxes that
    # would earn average precision.
    "heidelberg_yolo_published": dataclasses.replace(
        _HEIDELBERG_YOLO, box_gain=0.075, class_gain=0.05 + 0.75, dfl_gain=0.015, nms_iou=0.2, min_score=0.1
    ),
    # 6th place, the leanest of the strong ones: one classifier and one Faster R-CNN, mirror images averaged.
    "lean_study": StudyRecipe(
        backbone="tf_efficientnet_b7",
        channels=3,
        image_size=600,
        epochs=20,
        batch_size=8,
        nominal_batch=32,
        optimizer="adamw",
        learning_rate=2e-4,
        weight_decay=0.01,
        warmup_epochs=1.0,
        views=("full", "flip"),
    ),
    "lean_faster_rcnn": DetectorRecipe(
        backbone="resnet101d",
        channels=3,
        image_size=1024,
        epochs=20,
        batch_size=4,
        nominal_batch=16,
        learning_rate=0.01,
        weight_decay=1e-4,
        warmup_epochs=1.0,
        views=("full", "flip"),
        rotate_degrees=10.0,
    ),
    # What the strongest have in common: auxiliary segmentation, moving averages, lung crops.
    "strong_study": StudyRecipe(
        backbone="tf_efficientnetv2_m",
        channels=3,
        epochs=20,
        batch_size=16,
        nominal_batch=32,
        optimizer="adamw",
        learning_rate=2e-4,
        weight_decay=0.01,
        warmup_epochs=1.0,
        segmentation=1.0,
        ema_decay=0.998,
        label_smoothing=0.05,
        views=("full", "flip", "lungs", "lungs_flip"),
    ),
    "strong_faster_rcnn": DetectorRecipe(
        backbone="resnet101d",
        channels=3,
        image_size=1024,
        epochs=20,
        batch_size=4,
        nominal_batch=16,
        learning_rate=0.01,
        weight_decay=1e-4,
        warmup_epochs=1.0,
        ema_decay=0.998,
        views=("full", "flip"),
        rotate_degrees=10.0,
    ),
    "strong_yolo": dataclasses.replace(
        _HEIDELBERG_YOLO,
        backbone="yolo11x",
        image_size=768,
        epochs=40,
        vertical_flip=0.0,
        box_loss="",
        views=("full", "flip"),
    ),
    "unet_lungs": SegmenterRecipe(),
    # ResUNet + ensembles, sections 4.1 and 4.2; the optimiser's settings are the kit's.
    "resunet_lungs": SegmenterRecipe(
        network="resunet",
        image_size=256,
        epochs=45,
        batch_size=16,
        learning_rate=1e-3,
        horizontal_flip=0.5,
        rotate_degrees=180.0,
        shift=0.3,
        scale_x=(0.8, 1.2),
        scale_y=(0.8, 1.2),
        shear_p=1.0,
        gamma_drawn=(1.0, 1.0),
        salt_pepper_p=0.0,
        blur_p=0.0,
        noise_p=0.0,
    ),
    # Patched FLANNEL, section 2.1, and Oh et al.'s code, whose network it is.
    "fc_densenet103_lungs": SegmenterRecipe(
        network="fc_densenet103",
        structures=("heart", "left_lung", "right_lung"),
        loss="cross_entropy",
        background_weight=0.5,
        equalise=True,
        gamma=0.5,
        image_size=256,
        epochs=100,
        batch_size=2,
        learning_rate=1e-4,
        weight_decay=1e-6,
        rotate_degrees=0.0,
        scale_x=(1.0, 1.0),
        shear_p=0.0,
        gamma_drawn=(1.0, 1.0),
        salt_pepper_p=0.0,
        blur_p=0.0,
        noise_p=0.0,
    ),
    "small_lungs": SegmenterRecipe(
        width=0.25,
        image_size=96,
        epochs=12,
        batch_size=4,
        learning_rate=4e-3,
        rotate_degrees=10.0,
        gamma_drawn=(0.7, 1.5),
        noise_p=0.0,
        least_area=0.1,  # the published rule refuses small chests whose lungs are right
    ),
    "small_backbone": FindingsRecipe(
        backbone="test_efficientnet",
        channels=1,
        image_size=96,
        hidden=64,
        dropout=0.2,
        epochs=6,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.02,
        warmup_epochs=1.0,
        schedule_every=0,
        rotate_degrees=5.0,
        erase_p=0.0,
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
        schedule_every=0,
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
