"""Training recipes as frozen dataclasses: one class per kind of model, with fields, valid values and defaults.

A field's annotation defines its valid values (see kitlib.settings). Each class has only the fields that its kind of model
uses. The published recipes are in kitlib.recipes.named.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from kitlib.classes import SPARSE_STRUCTURES
from kitlib.errors import SettingsError
from kitlib.settings import (
    AtLeastOne,
    Count,
    Distinct,
    Increasing,
    NotNegative,
    Ordered,
    Positive,
    Probability,
    Range,
    Settings,
    Share,
    ZeroOrOdd,
)

# Networks with large strides need a canvas of at least 8 pixels a side.
Side = Annotated[int, Range(at_least=8)]
Zero = Annotated[float, Range(at_least=0, at_most=0)]  # of a field that a derived recipe does not use
Degrees = Annotated[float, Range(at_least=0, at_most=180)]
Factors = Annotated[tuple[Positive, Positive], Ordered()]
# albumentations accepts no smaller exponent.
Exponent = Annotated[float, Range(at_least=0.01)]
Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "plateau", "step"]
Placing = Literal["letterbox", "stretch", "centre_crop"]
View = Literal["full", "flip", "lungs", "lungs_flip"]
Structure = Literal["lungs", "heart", "left_lung", "right_lung"]
SparseStructure = Literal["pneumothorax"]  # kitlib.classes.SPARSE_STRUCTURES

# The clean-up of masks in the UNet + HRNet paper, section 3.2; no other publication has one.
PUBLISHED_CLEAN_UP: dict[str, Any] = {"dilations": 8, "closings": 2, "least_area": 50_000 / 512**2}

# For each view: whether the canvas shows the full image or the lungs, and whether it is mirrored.
VIEWS = {"full": ("full", False), "flip": ("full", True), "lungs": ("lungs", False), "lungs_flip": ("lungs", True)}
# The box losses of each detector family; the first is the default.
BOX_LOSSES = {"faster_rcnn": ("smooth_l1", "ciou"), "retinanet": ("l1", "ciou", "giou"), "yolo": ("ciou", "giou")}
# Fields of DetectorRecipe that not all families use. Most are for the two with a feature pyramid, because ultralytics has
# its own augmentation, moving average and schedule, and its networks always have three input channels.
_OF_A_PYRAMID = (
    *("fpn_channels", "proposals", "channels", "ema_decay", "schedule", "step_factor", "plateau_epochs", "schedule_every"),
    *("shift", "turn_p", "sharpen_p", "blur_p", "cutouts", "cutouts_p", "erase_p", "brightness_contrast_p", "gradient_clip"),
)
FAMILY_FIELDS = {
    "faster_rcnn": (*_OF_A_PYRAMID, "box_hidden", "box_samples"),
    "retinanet": _OF_A_PYRAMID,
    "yolo": ("box_gain", "class_gain", "dfl_gain", "mosaic", "mixup", "zoom", "width", "norm_momentum"),
}


@dataclass(frozen=True)
class TrainingRecipe(Settings):
    """Fields of every recipe: starting weights, canvas, optimiser, schedule and common augmentation.

    The defaults are those of the Heidelberg SIIM project (report, section 3), with the kit's corrections. A field whose name
    ends in `_p` is the probability that an augmentation is applied to an image.
    """

    starting_weights: str = ""  # a run, an input SLUG or SLUG/FILE, a bundle folder or a weights file; empty: random weights
    image_size: Side = 512  # side of the model's square input canvas, pixels
    placement: Placing = "letterbox"  # how the image is fitted to the canvas; most public solutions stretch it
    epochs: AtLeastOne = 50
    batch_size: AtLeastOne = 10
    nominal_batch: Count = 0  # images per optimiser step; gradients of whole batches are accumulated; 0: one batch per step
    optimizer: Optimizer = "sgd"
    momentum: Share = 0.9  # SGD only; with Nesterov's correction
    learning_rate: Positive = 1e-3
    gradient_clip: NotNegative = 0.0  # longer gradients are scaled to this norm; 0: no limit. ultralytics' is always 10
    weight_decay: NotNegative = 0.0
    warmup_epochs: NotNegative = 0.0  # cosine only: epochs during which the rate rises to learning_rate
    schedule: Schedule = "cosine"  # "plateau" divides the rate by 10 whenever the validation score stops rising
    milestones: Annotated[tuple[AtLeastOne, ...], Increasing()] = ()  # step only: epochs after which the rate falls
    step_factor: Probability = 0.1  # step only: factor of the rate at each milestone
    plateau_epochs: Count = 5  # plateau only: epochs without a better score before the rate falls
    # cosine only: epochs between changes of the rate; 0: changes every batch. Heidelberg's 2 never reaches the lowest rate.
    schedule_every: Count = 0
    keep: Literal["best", "last"] = "best"  # epoch whose weights are kept; "last" uses no validation score to choose
    # Epochs without a better score before training stops; unused with keep="last". At least `epochs`: never stops early.
    patience: AtLeastOne = 10
    # Program in whose format each epoch's metrics are also written to the fold's folder `curves`; W&B sends nothing.
    curves: Literal["", "tensorboard", "wandb", "mlflow"] = ""
    ema_decay: Share = 0.0  # decay of the weights' moving average, which is then validated and kept; 0: no average
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    rotate_degrees: Degrees = 0.0  # largest rotation in either direction; boxes grow when rotated
    shift: Probability = 0.0  # largest shift in either direction, as a share of the canvas
    turn_p: Probability = 0.5  # probability of rotation, shift and scaling, which are one transform
    brightness_contrast: Probability = 0.2  # largest relative change of brightness and of contrast
    brightness_contrast_p: Probability = 0.5
    blur_p: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "cosine" and self.warmup_epochs:
            raise SettingsError(
                f"schedule is {self.schedule!r}, which has no warm-up, but warmup_epochs is {self.warmup_epochs}; set "
                "warmup_epochs=0"
            )
        if self.milestones and self.schedule != "step":
            raise SettingsError(
                f'milestones are {list(self.milestones)}, but schedule is {self.schedule!r}; set schedule="step"'
            )


@dataclass(frozen=True)
class WithBackbone(TrainingRecipe):
    """Recipe fields of a model with a backbone: which backbone, and whether its input is whole images or lung crops."""

    backbone: str = "resnext101_32x8d"  # name of a timm model; the default is Heidelberg's NIH backbone
    # Parts that starting weights may lack, besides the head: the beginnings of their names, such as "backbone.pos_embed".
    random_parts: tuple[str, ...] = ()
    channels: Literal[1, 3] = 1  # 1: grey; 3: grey repeated three times, for weights that were trained on RGB
    views: Annotated[tuple[View, ...], Distinct()] = ("full",)  # views whose predictions are averaged
    lungs: Literal["darkness", "masks"] = "darkness"  # how lungs are found: kitlib.lungs.darkness, or a segmenter's masks
    trained_on: Literal["full", "lungs", "either"] = "full"  # whole images, lung crops, or either at random
    masked: bool = False  # blackens pixels outside the lungs' mask in training and prediction; requires lungs="masks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_parts and not self.starting_weights:
            raise SettingsError(
                f"random_parts are {list(self.random_parts)}, but starting_weights is empty, so all parts are random; set "
                "random_parts=()"
            )
        if self.masked and self.lungs != "masks":
            raise SettingsError(
                f'masked is True, but lungs is {self.lungs!r}, which finds a bounding box, not a mask; set lungs="masks"'
            )
        if self.trained_on == "lungs" and any(VIEWS[view][0] != "lungs" for view in self.views):
            raise SettingsError(
                f"trained_on is 'lungs', but views are {list(self.views)}: a model trained on crops cannot predict whole "
                'images; use only the views "lungs" and "lungs_flip", or set trained_on="either"'
            )


@dataclass(frozen=True)
class WithOcclusions(TrainingRecipe):
    """Recipe fields for augmentation by sharpening and by covering parts of the image."""

    sharpen_p: Probability = 0.0  # an image is sharpened or blurred, never both
    cutouts: Count = 0  # largest number of black squares, each with a sixteenth of the canvas side
    cutouts_p: Probability = 0.3
    erase_p: Probability = 0.0  # blackens a rectangle of 1 to 10 % of the canvas area

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpen_p + self.blur_p > 1:
            raise SettingsError(
                f"sharpen_p {self.sharpen_p} and blur_p {self.blur_p} add up to more than 1, but an image cannot be both "
                "sharpened and blurred; lower one of them"
            )


@dataclass(frozen=True)
class WithDistortions(TrainingRecipe):
    """Recipe fields for adjusting grey levels, and for augmentation by scaling, shearing, gamma and noise."""

    equalise: bool = False  # histogram equalisation of the image, as in Patched FLANNEL
    gamma: Positive = 1.0  # exponent of the grey level 0..1, after equalisation
    scale_x: Factors = (1.0, 1.0)  # lowest and highest factor of widths, drawn uniformly
    scale_y: Factors = (1.0, 1.0)  # lowest and highest factor of heights, drawn uniformly
    shear_degrees: Annotated[float, Range(at_least=0, below=90)] = 0.0  # largest shear along x in either direction
    shear_p: Probability = 0.0
    gamma_drawn: Annotated[tuple[Exponent, Exponent], Ordered()] = (1.0, 1.0)  # lowest and highest exponent, drawn uniformly
    salt_pepper: Probability = 0.0  # share of pixels that turn black or white
    salt_pepper_p: Probability = 0.0
    blur_pixels: Annotated[int, ZeroOrOdd()] = 0  # kernel side of a Gaussian blur (sigma 0.5); 0: box blur of 3 to 7 pixels
    noise: Probability = 0.0  # standard deviation of Gaussian noise, for grey levels 0..1
    noise_p: Probability = 0.0


@dataclass(frozen=True)
class ClassifierRecipe(WithBackbone, WithOcclusions, WithDistortions):
    """Recipe fields of a classifier: a backbone and a head with hidden layers.

    The default is the head of the Heidelberg SIIM project: 2048 inputs from the backbone, a layer of 1024 units, ReLU,
    dropout, and one output per class.
    """

    # Side of a larger canvas, from which training crops a random square of image_size and prediction crops the middle;
    # 0: no larger canvas.
    canvas: Count = 0
    resize: Literal["area", "bicubic"] = "area"  # how images are reduced to the canvas; bicubic: as Pillow does, in FLANNEL
    probe: Literal["", "border", "outside_lungs"] = ""  # tests for shortcuts by showing the model only this region
    l1: NotNegative = 0.0  # factor of the sum of absolute weights in the loss, as in Oh et al.
    # Numbers of units of the head's hidden layers, each with ReLU and dropout; 0: the head is dropout and a linear layer.
    hidden: Count | tuple[AtLeastOne, ...] = 1024
    dropout: Share = 0.5
    # Arguments of timm's network, such as {"drop_path_rate": 0.1}; see kitlib.models.backbones.OPTIONS.
    backbone_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    pooling: Literal["backbone", "gem"] = (
        "backbone"  # "gem": generalised mean (Radenovic et al. 2018), for convolutional networks
    )
    # Mean and standard deviation by which the input is normalised: those of the backbone, 0.5 for both, or those of the
    # batch (as in ResUNet + ensembles), with which a prediction depends on the other images in its batch.
    normalisation: Literal["backbone", "half", "batch"] = "backbone"
    frozen_backbone: bool = False
    frozen_statistics: bool = True  # whether a frozen backbone's batch norm statistics stay; Heidelberg's code updates them
    thawed_statistics: bool = True  # whether unfrozen stages update batch norm statistics; not in ResUNet + ensembles
    unfreeze_every: Count = 0  # epochs after which one more stage of a frozen backbone is unfrozen, last first; 0: never
    unfrozen_rate: NotNegative = 0.1  # learning rate of unfrozen stages, relative to the head's
    layer_decay: Positive = 1.0  # factor of the learning rate from each stage of the backbone to the one before it; 1: equal
    label_smoothing: Share = 0.0  # share of the target that is spread evenly over the classes
    mixup: NotNegative = 0.0  # alpha of MixUp's beta distribution (Zhang et al. 2018); 0: no MixUp
    cutmix: NotNegative = 0.0  # alpha of CutMix's beta distribution (Yun et al. 2019); 0: no CutMix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay != 1 and self.frozen_backbone and not self.unfreeze_every:
            raise SettingsError(
                f"layer_decay is {self.layer_decay}, but the backbone stays frozen; set layer_decay=1, or unfreeze_every=1"
            )
        if self.canvas and self.canvas < self.image_size:
            raise SettingsError(
                f"canvas is {self.canvas}, smaller than the crop, whose image_size is {self.image_size}; set a larger "
                "canvas, or canvas=0 for no crop"
            )
        if self.probe == "border" and self.canvas > self.image_size:
            raise SettingsError(
                f'probe is "border", but prediction crops away the border: canvas is {self.canvas} and image_size is '
                f"{self.image_size}; set canvas=0"
            )
        if self.probe == "border" and self.masked:
            raise SettingsError('probe is "border", but masked=True blackens everything outside the lungs; set masked=False')
        if self.probe == "outside_lungs" and (self.lungs != "masks" or self.masked):
            raise SettingsError(
                'probe="outside_lungs" requires lungs="masks" and masked=False, but lungs is '
                f"{self.lungs!r} and masked is {self.masked}"
            )
        if self.unfreeze_every and not self.frozen_backbone:
            raise SettingsError(
                f"unfreeze_every is {self.unfreeze_every}, but the backbone is not frozen; set frozen_backbone=True, or "
                "unfreeze_every=0"
            )
        if not self.thawed_statistics and not (self.frozen_backbone and self.frozen_statistics):
            raise SettingsError(
                "thawed_statistics is False, but no batch norm statistics are frozen; set frozen_backbone=True and "
                "frozen_statistics=True, or thawed_statistics=True"
            )


@dataclass(frozen=True)
class StudyRecipe(ClassifierRecipe):
    """Recipe of a classifier of the four study classes and of `none`, the probability that an image has no opacity.

    Epochs, batch size, learning rate and head are those of the Heidelberg report, section 3.4. The report's input and
    augmentation are not the defaults; the recipe `heidelberg_study` has them.
    """

    outputs: Literal["study", "none", "both"] = "both"  # outputs of the model; 15th place trains a model for each
    none_weight: NotNegative = 0.5  # weight of the image-level `none` loss, relative to the study's cross entropy
    segmentation: NotNegative = 0.0  # weight of a loss on the boxes' mask (0.6 BCE + 0.4 Dice, 1st place); 0: no such loss
    epochs: AtLeastOne = 58
    batch_size: AtLeastOne = 15
    learning_rate: Positive = 5e-4
    rotate_degrees: Degrees = 10.0


@dataclass(frozen=True)
class FindingsRecipe(ClassifierRecipe):
    """Recipe of a classifier that predicts each image by itself. Its classes are the class columns of the `labels` table.

    The defaults are those of the NIH backbone in the Heidelberg report, section 3.1.
    """

    multi_label: bool = True  # True: independent classes (BCE); False: exactly one class is true (cross entropy)
    one_logit: bool = False  # for two exclusive classes: one output, whose sigmoid is the first class's probability
    class_weights: bool = False  # class weights N / (C n) in the loss: N images, C classes, n images of the class
    judged_by: Literal["auc", "macro_f1", "accuracy"] = "auc"  # score that selects the best epoch; "auc" is the mean ROC AUC
    auxiliary: NotNegative = 0.0  # loss weight of inception_v3's auxiliary head; 0: no such head
    channels: Literal[1, 3] = 3
    image_size: Side = 224
    placement: Placing = "centre_crop"  # resizes the shorter side to 256 and crops the middle 224
    epochs: AtLeastOne = 35
    batch_size: AtLeastOne = 32
    schedule_every: Count = 1
    rotate_degrees: Degrees = 20.0
    turn_p: Probability = 1.0
    brightness_contrast: Probability = 0.0
    blur_p: Probability = 0.3
    erase_p: Probability = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        exclusive_fields = [name for name in ("one_logit", "class_weights") if getattr(self, name)]
        exclusive_fields += ["judged_by"] if self.judged_by != "auc" else []
        if self.multi_label and exclusive_fields:
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in exclusive_fields)
            raise SettingsError(f"{values} can be used only if exactly one class is true; set multi_label=False")
        if self.auxiliary and (self.backbone.partition(".")[0] != "inception_v3" or self.frozen_backbone):
            raise SettingsError(
                f"auxiliary is {self.auxiliary}, but {'a frozen ' * self.frozen_backbone}{self.backbone} has no auxiliary "
                "head; set auxiliary=0.0, or use a trainable inception_v3"
            )


@dataclass(frozen=True)
class PatchRecipe(FindingsRecipe):
    """Recipe of a classifier of lung patches. An image's scores combine the scores of the image's patches.

    The image and its lung mask are stretched to `canvas` pixels a side, pixels outside the lungs are blackened, and patches
    of `image_size` pixels a side are cut around lung pixels. The defaults are those of Patched FLANNEL, section 2.2.
    """

    patches: AtLeastOne = 100  # per image, at prediction
    patch_score: Literal["votes", "mean_softmax"] = "votes"  # share of patches that predict the class, or the mean softmax
    validation_patches: AtLeastOne = 8  # per image, at validation
    least_lungs: Share = 0.01  # smallest lung area, as a share of the canvas; below it, the whole image is one patch
    multi_label: Literal[False] = False
    judged_by: Literal["auc", "macro_f1", "accuracy"] = "macro_f1"
    canvas: Side = 1024
    placement: Placing = "stretch"
    views: tuple[Literal["full"]] = ("full",)
    trained_on: Literal["full"] = "full"
    lungs: Literal["masks"] = "masks"
    masked: Literal[True] = True
    probe: Literal[""] = ""
    equalise: bool = True
    gamma: Positive = 0.5
    hidden: Count = 0
    dropout: Share = 0.0
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 16
    optimizer: Optimizer = "adam"
    learning_rate: Positive = 1e-5
    weight_decay: NotNegative = 1e-4
    l1: NotNegative = 1e-5
    schedule: Schedule = "step"
    horizontal_flip: Probability = 0.0
    rotate_degrees: Degrees = 0.0
    blur_p: Probability = 0.0
    erase_p: Probability = 0.0


@dataclass(frozen=True)
class DetectorRecipe(WithBackbone, WithOcclusions):
    """Recipe of a detector of findings, which is a Faster R-CNN, a RetinaNet or a YOLO.

    The defaults are those of the Faster R-CNN in the Heidelberg report, section 3.1.
    """

    family: Literal["faster_rcnn", "retinanet", "yolo"] = "faster_rcnn"  # yolo: `backbone` is a name such as "yolov5lu"
    inference_size: Count = 0  # side of the canvas at prediction, a multiple of 32; 0: as in training
    negatives: NotNegative = 1.0  # largest ratio of training images without a box to those with one; Heidelberg: 0
    box_loss: Literal["", "smooth_l1", "l1", "ciou", "giou"] = ""  # one of the family's BOX_LOSSES; "": its default
    box_gain: NotNegative = 7.5  # yolo: weight of the box loss; the defaults of these three gains are ultralytics'
    class_gain: NotNegative = 0.5  # yolo: weight of the class loss
    dfl_gain: NotNegative = 1.5  # yolo: weight of the distribution focal loss
    mosaic: Probability = 0.0  # yolo: probability that four images are combined
    mixup: Probability = 0.0  # yolo: probability that two images are blended
    zoom: Share = 0.5  # yolo: scale factors between 1 - zoom and 1 + zoom
    width: Positive = 1.0  # yolo: number of channels, relative to the named model
    norm_momentum: Probability = 0.03  # yolo: batch norm momentum; short training needs a higher value
    fpn_channels: AtLeastOne = 256  # faster_rcnn, retinanet: width of the feature pyramid
    box_hidden: AtLeastOne = 1024  # faster_rcnn: units of the two hidden layers of the box head
    box_samples: AtLeastOne = 512  # faster_rcnn: regions per image in the box head's loss
    proposals: AtLeastOne = 1000  # faster_rcnn: regions per image for the second stage; retinanet: boxes per map before NMS
    nms_iou: Probability = 0.5  # if two boxes have a larger IoU, the box with the lower score is dropped
    max_detections: AtLeastOne = 100  # boxes kept per image at prediction
    min_score: Share = 0.001  # low, because boxes with low confidence still add to average precision (VOC 2010)
    horizontal_flip: Probability = 0.3
    brightness_contrast: Probability = 0.3
    schedule_every: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        default = type(self).__dataclass_fields__
        special = dict.fromkeys(name for names in FAMILY_FIELDS.values() for name in names)
        unused = [name for name in special if name not in FAMILY_FIELDS[self.family]]
        changed = [name for name in unused if getattr(self, name) != default[name].default]
        if changed:
            listed = ", ".join(f"{name} (leave it at {default[name].default!r})" for name in changed)
            raise SettingsError(
                f"{self.backbone} is a {self.family}, which does not use {listed}; it uses: "
                f"{', '.join(FAMILY_FIELDS[self.family])}"
            )
        if self.box_loss not in ("", *BOX_LOSSES[self.family]):
            raise SettingsError(
                f"box_loss is {self.box_loss!r}; valid for a {self.family}: {', '.join(BOX_LOSSES[self.family])}"
            )
        if self.family == "yolo" and self.optimizer == "sgd" and not self.momentum:
            raise SettingsError("momentum is 0.0, but ultralytics' SGD requires a positive value, such as its default 0.937")


@dataclass(frozen=True)
class SegmenterRecipe(WithDistortions):
    """Recipe of a lung segmenter, with the settings for cleaning up its masks.

    The defaults are those of the UNet + HRNet paper, sections 3.3 and 4, except for `schedule` and `patience`, which the
    paper does not state; their defaults are the kit's. The paper's clean-up of masks (the fields `dilations`, `closings`,
    `least_area`) is off by default, because no other publication cleans its masks up.
    """

    network: Literal["unet", "resunet", "fc_densenet103", "albunet"] = "unet"
    width: Positive = 1.0  # number of channels, relative to the published network; of an albunet, without its encoder
    structures: Annotated[tuple[Structure, ...], Distinct()] = ("lungs",)  # sigmoid for one structure, softmax for several
    loss: Literal["dice", "cross_entropy"] = "dice"  # Dice with squared denominators
    background_weight: NotNegative = 1.0  # weight of the background in cross entropy
    image_size: Side = 512
    epochs: AtLeastOne = 25
    batch_size: AtLeastOne = 8
    optimizer: Optimizer = "adam"
    learning_rate: Positive = 0.005
    schedule: Schedule = "plateau"
    horizontal_flip: Probability = 0.0
    rotate_degrees: Degrees = 45.0
    turn_p: Probability = 1.0
    brightness_contrast: Probability = 0.0
    scale_x: Factors = (0.8, 1.1)
    shear_degrees: Annotated[float, Range(at_least=0, below=90)] = 11.3  # tan(11.3 degrees) is the paper's 0.2
    shear_p: Probability = 0.7
    gamma_drawn: Annotated[tuple[Exponent, Exponent], Ordered()] = (0.5, 3.0)
    salt_pepper: Probability = 0.01
    salt_pepper_p: Probability = 0.3
    blur_p: Probability = 0.5
    blur_pixels: Annotated[int, ZeroOrOdd()] = 11
    noise: Probability = 0.05  # the paper states 0.5, without a unit
    noise_p: Probability = 0.3
    # Clean-up of a mask, at 512 pixels a side. The cleaned mask decides the lungs' frame and whether the lungs can be used.
    # It replaces the network's mask only if it was dilated or closed.
    least_island: Share = 0.01  # smaller components, as a share of the canvas, are removed first (not in the paper)
    dilations: Count = 0  # number of dilations by 3 x 3 pixels
    closings: Count = 0  # number of closings by 3 x 3 pixels, after the dilations
    least_area: Share = 0.0  # after closing, masks with a smaller share of the canvas are rejected
    least_width: NotNegative = 0.65  # smallest width / height of the lungs' frame; a narrower frame holds only one lung
    margin: NotNegative = 0.05  # added on each side of the frame, as a share of its width or height

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.structures) <= set(SPARSE_STRUCTURES):  # only a SparseSegmenterRecipe allows them
            return
        if "lungs" in self.structures and {"left_lung", "right_lung"} & set(self.structures):
            raise SettingsError(
                f'structures are {list(self.structures)}, but "lungs" includes "left_lung" and "right_lung"; use '
                'either "lungs" or these two'
            )
        if "lungs" not in self.structures and not {"left_lung", "right_lung"} <= set(self.structures):
            raise SettingsError(f'structures are {list(self.structures)}; add "lungs", or both "left_lung" and "right_lung"')
        if self.horizontal_flip and {"left_lung", "right_lung"} & set(self.structures):
            raise SettingsError(
                f"horizontal_flip is {self.horizontal_flip}, but structures are {list(self.structures)}: a mirrored left "
                'lung looks like a right lung; set horizontal_flip=0.0, or structures=["lungs"]'
            )


@dataclass(frozen=True)
class SparseSegmenterRecipe(SegmenterRecipe):
    """Recipe of a segmenter of one structure that most images do not have, such as a pneumothorax.

    Images with an empty mask are valid examples. The defaults are those of the 1st place in SIIM-ACR Pneumothorax
    Segmentation (github.com/sneddy/pneumothorax-segmentation), without its elastic distortions. Masks are not cleaned up. A
    mask has the pixels with a probability above `bottom`. It is empty if the pixels with a probability above `top` cover a
    smaller share of the image than `least_area` (see kitlib.scoring.metrics.threshold_map).
    """

    # albunet starts from weights of a resnet34, or of another run
    network: Literal["unet", "resunet", "fc_densenet103", "albunet"] = "albunet"
    structures: tuple[SparseStructure] = ("pneumothorax",)  # type: ignore[assignment]  # instead of those of a chest
    placement: Literal["letterbox", "stretch"] = "letterbox"  # nothing is cropped, because a map shows the whole image
    views: Annotated[tuple[Literal["full", "flip"], ...], Distinct()] = ("full", "flip")  # views whose maps are averaged
    # Share of images with the structure in the first and in the last epoch, between which it changes linearly. An epoch has
    # as many images as the lower share needs to show each image with the structure once. Empty: all images once.
    positives: tuple[Annotated[float, Range(above=0, at_most=1)], ...] = (0.8, 0.4)
    loss: Literal["bce_dice_focal"] = "bce_dice_focal"  # type: ignore[assignment]  # instead of those for lungs
    loss_weights: tuple[NotNegative, NotNegative, NotNegative] = (3.0, 1.0, 4.0)  # of binary cross entropy, Dice and focal
    background_weight: Annotated[float, Range(at_least=1, at_most=1)] = 1.0
    top: Probability = 0.75
    least_area: Share = 2000 / 1024**2  # of the image
    bottom: Probability = 0.3
    least_island: Zero = 0.0
    dilations: Literal[0] = 0
    closings: Literal[0] = 0
    least_width: Zero = 0.0
    margin: Zero = 0.0
    epochs: AtLeastOne = 50
    batch_size: AtLeastOne = 4
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 5e-6
    plateau_epochs: Count = 2
    horizontal_flip: Probability = 0.5
    turn_p: Probability = 0.5
    shift: Probability = 0.0625
    brightness_contrast: Probability = 0.2
    brightness_contrast_p: Probability = 0.2
    scale_x: Factors = (0.9, 1.1)
    scale_y: Factors = (0.9, 1.1)
    shear_p: Probability = 0.0
    gamma_drawn: Annotated[tuple[Exponent, Exponent], Ordered()] = (0.8, 1.2)
    salt_pepper_p: Probability = 0.0
    blur_p: Probability = 0.0
    noise_p: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.positives) not in (0, 2):
            raise SettingsError(
                f"positives is {list(self.positives)}; expected the shares of images with the structure in the first and in "
                "the last epoch, such as [0.8, 0.4], or []"
            )
        if not sum(self.loss_weights):
            raise SettingsError("loss_weights are all 0; set the weight of binary cross entropy, Dice or focal loss above 0")
        if self.bottom > self.top:
            raise SettingsError(f"bottom is {self.bottom}, but top is only {self.top}; set bottom to at most top")
