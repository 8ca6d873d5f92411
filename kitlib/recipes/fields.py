"""Training recipes as frozen dataclasses: one class per kind of model, with fields, valid values and defaults.

A field's annotation defines its valid values (see kitlib.settings). A kind of model has only the fields that it uses.
Published recipes, by name, are in kitlib.recipes.named.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

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

# Networks with large strides need a canvas of at least this side.
Side = Annotated[int, Range(at_least=8)]
Degrees = Annotated[float, Range(at_least=0, at_most=180)]
Factors = Annotated[tuple[Positive, Positive], Ordered()]
# The smallest exponent that albumentations accepts.
Exponent = Annotated[float, Range(at_least=0.01)]
Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "plateau", "step"]
Placing = Literal["letterbox", "stretch", "centre_crop"]
View = Literal["full", "flip", "lungs", "lungs_flip"]
Structure = Literal["lungs", "heart", "left_lung", "right_lung"]

# For each view: whether the canvas shows the full image or the lungs, and whether it is mirrored.
VIEWS = {"full": ("full", False), "flip": ("full", True), "lungs": ("lungs", False), "lungs_flip": ("lungs", True)}
# The box losses of each detector family, its default first.
BOX_LOSSES = {"faster_rcnn": ("smooth_l1", "ciou"), "yolo": ("ciou", "giou")}
# Fields of DetectorRecipe that only one family uses: ultralytics has its own augmentation, moving average and schedule, and
# its networks have three input channels.
OF_ONE_FAMILY = {
    "faster_rcnn": (
        *("fpn_channels", "box_hidden", "box_samples", "proposals", "channels", "ema_decay", "schedule", "step_factor"),
        *("plateau_epochs", "schedule_every", "shift", "turn_p", "sharpen_p", "blur_p", "cutouts", "cutouts_p", "erase_p"),
        "brightness_contrast_p",
    ),
    "yolo": ("box_gain", "class_gain", "dfl_gain", "mosaic", "mixup", "zoom", "width", "norm_momentum"),
}


@dataclass(frozen=True)
class TrainingRecipe(Settings):
    """Fields of every training: starting weights, canvas, optimiser, schedule and common augmentation.

    Defaults: Heidelberg SIIM project, report section 3, with the kit's corrections. A field that ends in `_p` is the
    probability of an augmentation per image.
    """

    starting_weights: str = ""  # a bundle folder, or a .safetensors or .npz file; empty: random weights
    image_size: Side = 512  # side of the square canvas that the model sees, pixels
    placement: Placing = "letterbox"  # how the image is fitted to the canvas; most public solutions stretch
    epochs: AtLeastOne = 50
    batch_size: AtLeastOne = 10
    nominal_batch: Count = 0  # images per optimiser step, accumulated over whole batches; 0: one batch
    optimizer: Optimizer = "sgd"
    momentum: Share = 0.9  # of SGD, with Nesterov's correction
    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    warmup_epochs: NotNegative = 0.0  # of the cosine schedule
    schedule: Schedule = "cosine"  # "plateau": a tenth of the rate whenever the validation score has stopped rising
    milestones: Annotated[tuple[AtLeastOne, ...], Increasing()] = ()  # "step": the rate falls after these epochs
    step_factor: Probability = 0.1  # "step": what the rate is multiplied by at each milestone
    plateau_epochs: Count = 5  # "plateau": epochs without a better score before the rate falls
    schedule_every: Count = 0  # "cosine": epochs per step; 0: every batch. Heidelberg's 2 never reaches the floor
    keep: Literal["best", "last"] = "best"  # the epoch kept; "last" selects nothing on the validation fold
    patience: AtLeastOne = 10  # epochs without a better score before training stops; unused if the last epoch is kept
    ema_decay: Share = 0.0  # of the weights' moving average, which is validated and kept; 0: no average
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    rotate_degrees: Degrees = 0.0  # largest rotation in either direction; rotated boxes grow
    shift: Probability = 0.0  # largest shift in either direction, as a share of the canvas
    turn_p: Probability = 0.5  # of rotation, shift and scaling, as one transform
    brightness_contrast: Probability = 0.2  # largest relative change of brightness and of contrast
    brightness_contrast_p: Probability = 0.5
    blur_p: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "cosine" and self.warmup_epochs:
            raise SettingsError(
                f"schedule is {self.schedule!r}, which has no warm-up, but warmup_epochs is {self.warmup_epochs}; set 0"
            )
        if self.milestones and self.schedule != "step":
            raise SettingsError(
                f'milestones are {list(self.milestones)}, but schedule is {self.schedule!r}; set schedule="step"'
            )


@dataclass(frozen=True)
class WithBackbone(TrainingRecipe):
    """Fields of a model with a named backbone, on whole images or lung crops."""

    backbone: str = "resnext101_32x8d"  # any timm name; Heidelberg's NIH backbone
    channels: Literal[1, 3] = 1  # 1: grey; 3: grey repeated three times, for weights trained on RGB
    views: Annotated[tuple[View, ...], Distinct()] = ("full",)  # test-time augmentation, averaged
    lungs: Literal["darkness", "masks"] = "darkness"  # how lungs are found: by kitlib.lungs.darkness or a trained segmenter
    trained_on: Literal["full", "lungs", "either"] = "full"  # whole images, lung crops, or one of both at random
    masked: bool = False  # black outside the lungs' mask, in training and prediction; requires lungs "masks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked and self.lungs != "masks":
            raise SettingsError(
                f'masked is true, but lungs is {self.lungs!r}, which finds a frame and no mask; set lungs="masks"'
            )
        if self.trained_on == "lungs" and any(VIEWS[view][0] != "lungs" for view in self.views):
            raise SettingsError(
                f"trained_on is 'lungs', but views are {list(self.views)}: a model trained on crops cannot predict whole "
                "images; set views to lungs and lungs_flip, or trained_on to either"
            )


@dataclass(frozen=True)
class WithOcclusions(TrainingRecipe):
    """Fields of augmentation by sharpening and by covering parts of the image."""

    sharpen_p: Probability = 0.0  # an image is either sharpened or blurred
    cutouts: Count = 0  # largest number of square holes, with a side of a sixteenth of the canvas
    cutouts_p: Probability = 0.3
    erase_p: Probability = 0.0  # erases a rectangle of 1 to 10 % of the canvas

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpen_p + self.blur_p > 1:
            raise SettingsError(
                f"sharpen_p {self.sharpen_p} and blur_p {self.blur_p} add to more than 1, but an image is sharpened or "
                "blurred, not both; lower one of them"
            )


@dataclass(frozen=True)
class WithDistortions(TrainingRecipe):
    """Fields of adjusted grey levels, and of augmentation by scaling, shearing, gamma and noise."""

    equalise: bool = False  # histogram equalisation of the image, as in Patched FLANNEL
    gamma: Positive = 1.0  # exponent of the grey level 0..1, after equalisation
    scale_x: Factors = (1.0, 1.0)  # factor of widths, uniform between the two
    scale_y: Factors = (1.0, 1.0)  # factor of heights, uniform between the two
    shear_degrees: Annotated[float, Range(at_least=0, below=90)] = 0.0  # largest shear along x in either direction
    shear_p: Probability = 0.0
    gamma_drawn: Annotated[tuple[Exponent, Exponent], Ordered()] = (1.0, 1.0)  # exponent, uniform between the two
    salt_pepper: Probability = 0.0  # share of pixels that turn black or white
    salt_pepper_p: Probability = 0.0
    blur_pixels: Annotated[int, ZeroOrOdd()] = 0  # side of a Gaussian blur of sigma 0.5; 0: box blur of 3 to 7 pixels
    noise: Probability = 0.0  # standard deviation of the grey level 0..1
    noise_p: Probability = 0.0


@dataclass(frozen=True)
class ClassifierRecipe(WithBackbone, WithOcclusions, WithDistortions):
    """Fields of a classifier: a backbone with Heidelberg's head, 2048-1024-ReLU-dropout-classes."""

    # Side of a larger canvas, of which training crops a random square of image_size and prediction the middle; 0: none.
    canvas: Count = 0
    probe: Literal["", "border", "outside_lungs"] = ""  # test for shortcuts: shows the model only this region
    l1: NotNegative = 0.0  # factor of the sum of absolute weights in the loss, as in Oh et al.
    hidden: Count = 1024  # units of the head's hidden layer; 0: dropout and one linear layer
    dropout: Share = 0.5
    normalisation: Literal["backbone", "half"] = "backbone"  # the backbone's own mean and deviation, or 0.5 for both
    frozen_backbone: bool = False
    frozen_statistics: bool = True  # whether batch norm statistics of a frozen backbone stay; Heidelberg's code updates them
    thawed_statistics: bool = True  # whether batch norm statistics of unfrozen stages update; not in ResUNet + ensembles
    unfreeze_every: Count = 0  # epochs after which one more stage of a frozen backbone is unfrozen, last first; 0: never
    unfrozen_rate: NotNegative = 0.1  # learning rate of unfrozen stages, as a share of the head's
    label_smoothing: Share = 0.0  # share of the target that is spread evenly over the classes
    mixup: NotNegative = 0.0  # alpha of MixUp's beta distribution; 0: no MixUp; Zhang et al. 2018
    cutmix: NotNegative = 0.0  # alpha of CutMix's beta distribution; 0: no CutMix; Yun et al. 2019

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.canvas and self.canvas < self.image_size:
            raise SettingsError(
                f"canvas is {self.canvas}, smaller than the image_size of {self.image_size} that is cropped from it; set a "
                "larger canvas, or 0"
            )
        if self.probe == "border" and self.canvas > self.image_size:
            raise SettingsError(
                f'probe is "border", but prediction crops the middle {self.image_size} of a canvas of {self.canvas}, '
                "without its border; set canvas=0"
            )
        if self.probe == "border" and self.masked:
            raise SettingsError('probe is "border", but masked blackens everything outside the lungs; set masked=False')
        if self.probe == "outside_lungs" and (self.lungs != "masks" or self.masked):
            raise SettingsError(
                'probe is "outside_lungs", which blackens the lungs\' mask; set lungs="masks" and masked=False'
            )
        if self.unfreeze_every and not self.frozen_backbone:
            raise SettingsError(
                f"unfreeze_every is {self.unfreeze_every}, but nothing is frozen; set frozen_backbone=True, or "
                "unfreeze_every=0"
            )
        if not self.thawed_statistics and not (self.frozen_backbone and self.frozen_statistics):
            raise SettingsError(
                "thawed_statistics is False, but no statistics are frozen; set frozen_backbone=True and "
                "frozen_statistics=True, or thawed_statistics=True"
            )


@dataclass(frozen=True)
class StudyRecipe(ClassifierRecipe):
    """Recipe of a study-level classifier with an image-level `none`. Defaults: Heidelberg report, section 3.4."""

    outputs: Literal["study", "none", "both"] = "both"  # outputs of the model; 15th place has one model for each
    none_weight: NotNegative = 0.5  # weight of the image-level `none` loss, relative to the study's cross entropy
    segmentation: NotNegative = 0.0  # weight of a loss on the boxes' mask (0.6 BCE + 0.4 Dice, 1st place); 0: none
    epochs: AtLeastOne = 58
    batch_size: AtLeastOne = 15
    learning_rate: Positive = 5e-4
    rotate_degrees: Degrees = 10.0


@dataclass(frozen=True)
class FindingsRecipe(ClassifierRecipe):
    """Recipe of a classifier of single images over the classes of the table labels.

    Defaults: Heidelberg report, section 3.1, the NIH backbone.
    """

    multi_label: bool = True  # independent classes (BCE), or exactly one is true (cross entropy)
    one_logit: bool = False  # for two exclusive classes: one output, a sigmoid for the first
    class_weights: bool = False  # weight N / (C n) of a class in the loss: N images, C classes, n images of the class
    judged_by: Literal["auc", "macro_f1", "accuracy"] = "auc"  # the score that selects the epoch; "auc" is the mean ROC AUC
    auxiliary: NotNegative = 0.0  # weight of the loss of inception_v3's auxiliary head; 0: no such head
    channels: Literal[1, 3] = 3
    image_size: Side = 224
    placement: Placing = "centre_crop"  # shorter side resized to 256, middle 224 cropped
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
            named = " and ".join(f"{name}={getattr(self, name)!r}" for name in exclusive_fields)
            raise SettingsError(f"{named}: only for classes of which exactly one is true; set multi_label=False")
        if self.auxiliary and (self.backbone.partition(".")[0] != "inception_v3" or self.frozen_backbone):
            raise SettingsError(
                f"auxiliary is {self.auxiliary}, the weight of a head that only a trainable inception_v3 has, not "
                f"{'a frozen ' * self.frozen_backbone}{self.backbone}; set auxiliary=0.0"
            )


@dataclass(frozen=True)
class PatchRecipe(FindingsRecipe):
    """Recipe of a classifier of lung patches, whose outputs are pooled per image. Defaults: Patched FLANNEL, section 2.2.

    Image and mask are stretched to `canvas`, everything outside the lungs is blackened, and patches of `image_size` are cut
    around pixels of the lungs, without scaling.
    """

    patches: AtLeastOne = 100  # per image, at prediction
    patch_score: Literal["votes", "mean_softmax"] = "votes"  # share of patches that predict the class, or the mean softmax
    validation_patches: AtLeastOne = 8  # per image, at validation
    least_lungs: Share = 0.01  # share of the canvas; with less, or without lungs, the whole image is one patch
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
    """Recipe of an opacity detector of either family. Defaults: Heidelberg report, section 3.1, Faster R-CNN."""

    family: Literal["faster_rcnn", "yolo"] = "faster_rcnn"  # a YOLO's backbone is an ultralytics name such as "yolov5lu"
    inference_size: Count = 0  # side of the canvas at prediction, a multiple of 32; 0: as in training
    negatives: NotNegative = 1.0  # largest ratio of training images without a box to those with one; Heidelberg: 0
    box_loss: Literal["", "smooth_l1", "ciou", "giou"] = ""  # one of the family's BOX_LOSSES; empty: the first of them
    box_gain: NotNegative = 7.5  # yolo: weight of the box loss; these three are ultralytics' defaults
    class_gain: NotNegative = 0.5  # yolo: weight of the class loss
    dfl_gain: NotNegative = 1.5  # yolo: weight of the distribution focal loss
    mosaic: Probability = 0.0  # yolo: probability that four images are combined
    mixup: Probability = 0.0  # yolo: probability that two images are blended
    zoom: Share = 0.5  # yolo: scale factors between 1 - zoom and 1 + zoom
    width: Positive = 1.0  # yolo: number of channels, relative to the named model
    norm_momentum: Probability = 0.03  # yolo: batch norm momentum; a short training needs more
    fpn_channels: AtLeastOne = 256  # faster_rcnn: width of the feature pyramid
    box_hidden: AtLeastOne = 1024  # faster_rcnn: units of the two hidden layers of the box head
    box_samples: AtLeastOne = 512  # faster_rcnn: regions per image in the box head's loss
    proposals: AtLeastOne = 1000  # faster_rcnn: regions per image that reach the second stage
    nms_iou: Probability = 0.5  # of two boxes with a larger IoU, the one with the lower score is dropped
    max_detections: AtLeastOne = 100  # boxes kept per image at prediction
    min_score: Share = 0.001  # low, because boxes of low confidence still add to average precision (VOC 2010)
    horizontal_flip: Probability = 0.3
    brightness_contrast: Probability = 0.3
    schedule_every: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        default = type(self).__dataclass_fields__
        for family, names in OF_ONE_FAMILY.items():
            changed = [name for name in names if getattr(self, name) != default[name].default]
            if family != self.family and changed:
                listed = ", ".join(f"{name} (leave it at {default[name].default!r})" for name in changed)
                raise SettingsError(
                    f"{self.backbone} is a {self.family}, which has no {listed}; only {family} has these fields"
                )
        if self.box_loss not in ("", *BOX_LOSSES[self.family]):
            raise SettingsError(f"box_loss is {self.box_loss!r}; a {self.family} has {', '.join(BOX_LOSSES[self.family])}")
        if self.family == "yolo" and self.optimizer == "sgd" and not self.momentum:
            raise SettingsError("momentum is 0.0, but ultralytics' SGD requires a positive one, such as its default 0.937")


@dataclass(frozen=True)
class SegmenterRecipe(WithDistortions):
    """Recipe of a lung segmenter and of the clean-up of its masks. Defaults: UNet + HRNet paper, sections 3.2, 3.3 and 4.

    The paper states neither the schedule nor the patience; these are the kit's.
    """

    network: Literal["unet", "resunet", "fc_densenet103"] = "unet"
    width: Positive = 1.0  # number of channels, relative to the published network
    structures: Annotated[tuple[Structure, ...], Distinct()] = ("lungs",)  # a sigmoid for one, a softmax for several
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
    shear_degrees: Annotated[float, Range(at_least=0, below=90)] = 11.3  # the paper's 0.2 is its tangent
    shear_p: Probability = 0.7
    gamma_drawn: Annotated[tuple[Exponent, Exponent], Ordered()] = (0.5, 3.0)
    salt_pepper: Probability = 0.01
    salt_pepper_p: Probability = 0.3
    blur_p: Probability = 0.5
    blur_pixels: Annotated[int, ZeroOrOdd()] = 11
    noise: Probability = 0.05  # the paper states 0.5, without a unit
    noise_p: Probability = 0.3
    # Clean-up of a mask before images are cropped to it: published for 512 pixels a side, and applied at that size.
    least_island: Share = 0.01  # share of the canvas; smaller components are removed first (not in the paper)
    dilations: Count = 8  # number of dilations by 3 x 3 pixels
    closings: Count = 2  # number of closings by 3 x 3 pixels, after the dilations
    least_area: Share = 50_000 / 512**2  # share of the canvas, after closing; smaller masks are rejected
    least_width: NotNegative = 0.65  # of the lungs' frame, relative to its height; narrower ones hold one lung
    margin: NotNegative = 0.05  # added around the frame, as a share of its sides

    def __post_init__(self) -> None:
        super().__post_init__()
        if "lungs" in self.structures and {"left_lung", "right_lung"} & set(self.structures):
            raise SettingsError(
                f"structures are {list(self.structures)}: lungs are both sides; use lungs, or left_lung and right_lung"
            )
        if "lungs" not in self.structures and not {"left_lung", "right_lung"} <= set(self.structures):
            raise SettingsError(
                f"structures are {list(self.structures)}; expected them to include lungs, or left_lung and right_lung"
            )
        if self.horizontal_flip and {"left_lung", "right_lung"} & set(self.structures):
            raise SettingsError(
                f"horizontal_flip is {self.horizontal_flip}, but structures are {list(self.structures)}: a mirrored left "
                "lung looks like a right one; set horizontal_flip=0.0, or structures to lungs"
            )
