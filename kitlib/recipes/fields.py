"""What a recipe may set: each kind of training as a frozen dataclass, its fields with their defaults and what they rule out.

The published systems, by name, are in kitlib.recipes.named.
"""

from dataclasses import dataclass

from kitlib.classes import MASK_CODES
from kitlib.settings import RecipeError

# The canvases a model can look at, each as it is or mirrored.
VIEWS = {"full": ("full", False), "flip": ("full", True), "lungs": ("lungs", False), "lungs_flip": ("lungs", True)}
# Fields that take one of a few words.
CHOICES = {
    "lungs": ("darkness", "masks"),
    "trained_on": ("full", "lungs", "either"),
    "schedule": ("cosine", "plateau", "step"),
    "probe": ("", "border", "outside_lungs"),
    "normalisation": ("backbone", "half"),
    "judged_by": ("auc", "macro_f1", "accuracy"),
    "patch_score": ("votes", "mean_softmax"),
    "network": ("unet", "resunet", "fc_densenet103"),
    "loss": ("dice", "cross_entropy"),
}
# Fields of every training that a segmenter would not heed.
NOT_OF_SEGMENTERS = (
    *("backbone", "channels", "ema_decay", "views", "lungs", "trained_on", "masked"),
    *("sharpen_p", "cutouts", "erase_p", "canvas", "probe", "l1"),
)
# Those that a detector would not heed.
NOT_OF_DETECTORS = (
    *("canvas", "probe", "l1", "equalise", "gamma", "scale_x", "scale_y", "shear_degrees", "shear_p"),
    *("gamma_drawn", "salt_pepper", "salt_pepper_p", "blur_pixels", "noise", "noise_p"),
)


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
    canvas: int = (
        0  # side of a larger canvas: training sees a random square of image_size of it, prediction its middle; 0: none
    )
    placement: str = "letterbox"  # or "stretch", as most public solutions do, or "centre_crop"
    equalise: bool = False  # the histogram, as Patched FLANNEL does
    gamma: float = 1.0  # grey 0..1 to this power, after that
    epochs: int = 50
    batch_size: int = 10
    nominal_batch: int = 0  # images a step of the optimiser, gathered over whole batches; 0: one batch
    optimizer: str = "sgd"  # "adam" or "adamw"
    momentum: float = 0.9  # of SGD, Nesterov's
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    l1: float = 0.0  # times the sum of the absolute weights, added to the loss, as Oh et al. do
    warmup_epochs: float = 0.0
    schedule: str = "cosine"  # "step"; or "plateau": a tenth of the rate where the validation score has stopped to rise
    milestones: tuple[int, ...] = ()  # of the steps: after so many epochs the rate is multiplied
    step_factor: float = 0.1  # by this
    plateau_epochs: int = 5  # without a better score until the rate falls
    schedule_every: int = 0  # of the cosine: epochs a step; 0: every batch; Heidelberg's 2 never reaches the floor
    keep: str = "best"  # the epoch that validates best; or "last", where nothing may be chosen on the fold that is predicted
    patience: int = 10  # epochs without a better validation score before training stops; not if the last one is kept
    ema_decay: float = 0.0  # of the moving average of the weights that is judged and kept; 0: the weights themselves
    views: tuple[str, ...] = ("full",)  # of "full", "flip", "lungs", "lungs_flip": what a prediction averages
    lungs: str = "darkness"  # who finds them: "darkness" (kitlib.lungs.darkness), or "masks" of a trained segmenter
    trained_on: str = "full"  # what training sees: "full" images, crops of the "lungs", or "either", drawn image by image
    masked: bool = False  # outside of the lungs' mask all is black, in training and prediction; wants lungs "masks"
    probe: str = ""  # what a shortcut would read: the "border" alone, or "outside_lungs", whose mask is black; wants "masks"
    horizontal_flip: float = 0.5  # probability
    vertical_flip: float = 0.0  # probability; of Heidelberg's YOLO
    rotate_degrees: float = 0.0  # to either side; inflates boxes
    shift: float = 0.0  # to either side, share of the canvas
    scale_x: tuple[float, float] = (1.0, 1.0)  # of widths, drawn evenly between the two
    scale_y: tuple[float, float] = (1.0, 1.0)
    turn_p: float = 0.5  # of rotation, shift and scale, together
    shear_degrees: float = 0.0  # along x, to either side
    shear_p: float = 0.0
    brightness_contrast: float = 0.2  # strength of each
    brightness_contrast_p: float = 0.5
    gamma_drawn: tuple[float, float] = (1.0, 1.0)  # of the grey of training images, drawn evenly between the two
    salt_pepper: float = 0.0  # share of pixels that turn black or white
    salt_pepper_p: float = 0.0
    sharpen_p: float = 0.0  # sharpened or blurred, never both
    blur_p: float = 0.0
    blur_pixels: int = 0  # side of a Gaussian blur, sigma 0.5; 0: plain means of 3 to 7 pixels
    noise: float = 0.0  # standard deviation, of grey 0..1
    noise_p: float = 0.0
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
        if self.schedule != "cosine" and self.warmup_epochs:
            raise RecipeError(
                f"schedule is {self.schedule!r}, which has no warm-up; set warmup_epochs=0, not {self.warmup_epochs}"
            )
        if self.milestones and self.schedule != "step":
            raise RecipeError(
                f'milestones are {list(self.milestones)} and schedule is {self.schedule!r}; set schedule="step"'
            )
        if self.canvas and self.canvas < self.image_size:
            raise RecipeError(
                f"canvas is {self.canvas}, of which {self.image_size} pixels a side are to be seen; set it larger, or 0"
            )
        if self.probe == "border" and self.canvas > self.image_size:
            raise RecipeError(
                f'probe is "border", of which the middle {self.image_size} of a canvas of {self.canvas} show nothing: set '
                "canvas=0"
            )
        if self.probe == "border" and self.masked:
            raise RecipeError('probe is "border", and masked blackens what lies outside of the lungs: set masked=False')
        if self.probe == "outside_lungs" and (self.lungs != "masks" or self.masked):
            raise RecipeError(
                'probe is "outside_lungs", where the mask of the lungs is black: set lungs="masks", masked=False'
            )
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

    hidden: int = 1024  # units of the head's hidden layer; 0: dropout and one linear layer
    dropout: float = 0.5
    normalisation: str = "backbone"  # mean and spread of the backbone's own training; or "half": both one half
    frozen_backbone: bool = False
    frozen_statistics: bool = True  # of a frozen backbone's batch norm; Heidelberg's code lets them run on
    thawed_statistics: bool = True  # those of stages that learn again run on; ResUNet + ensembles keeps them
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
    one_logit: bool = False  # of two exclusive classes: one output, a sigmoid for the first
    class_weights: bool = False  # images of a class weigh N / (C n) in the loss, of N images, C classes, n of the class
    judged_by: str = "auc"  # the score that keeps the epoch: mean ROC AUC, or of exclusive classes "macro_f1", "accuracy"
    auxiliary: float = 0.0  # weight of the loss of inception_v3's auxiliary head; 0: without that head
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
class PatchRecipe(FindingsRecipe):
    """Classifier of patches of the lungs, whose answers become the image's. Defaults: Patched FLANNEL, section 2.2.

    Image and mask are stretched to `canvas`, what lies outside of the lungs is black, and patches of `image_size`, unscaled,
    are centred on pixels of the lungs.
    """

    patches: int = 100  # an image, at prediction
    patch_score: str = "votes"  # an image's class is the share of patches that name it; or "mean_softmax"
    validation_patches: int = 8  # an image, after each epoch
    least_lungs: float = 0.01  # share of the canvas; with less, and with none, the whole image is one patch, and counted
    multi_label: bool = False
    judged_by: str = "macro_f1"
    canvas: int = 1024
    placement: str = "stretch"
    lungs: str = "masks"
    masked: bool = True
    equalise: bool = True
    gamma: float = 0.5
    hidden: int = 0
    dropout: float = 0.0
    epochs: int = 200
    batch_size: int = 16
    optimizer: str = "adam"
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    l1: float = 1e-5
    schedule: str = "step"
    horizontal_flip: float = 0.0
    rotate_degrees: float = 0.0
    blur_p: float = 0.0
    erase_p: float = 0.0


@dataclass(frozen=True)
class DetectorRecipe(TrainingRecipe):
    """Opacity detector of either family. Defaults: report section 3.1, Faster R-CNN."""

    family: str = "faster_rcnn"  # or "yolo", whose backbone is an ultralytics name such as "yolov5lu"
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

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, NOT_OF_DETECTORS, "a detector")


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
    scale_x: tuple[float, float] = (0.8, 1.1)
    shear_degrees: float = 11.3  # tan of it is the paper's 0.2
    shear_p: float = 0.7
    gamma_drawn: tuple[float, float] = (0.5, 3.0)
    salt_pepper: float = 0.01
    salt_pepper_p: float = 0.3
    blur_p: float = 0.5
    blur_pixels: int = 11
    noise: float = 0.05  # the paper's 0.5 has no unit
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
        refuse(self, NOT_OF_SEGMENTERS, "a segmenter")


def refuse(recipe: TrainingRecipe, names: tuple[str, ...], who: str) -> None:
    """Raise RecipeError where one of these fields, which `who` does not heed, is not left at its default."""
    usual = type(recipe).__dataclass_fields__
    told = [name for name in names if getattr(recipe, name) != usual[name].default]
    if told:
        leave = ", ".join(f"{name} (leave it at {usual[name].default!r})" for name in told)
        raise RecipeError(f"{who} takes no {leave}")
