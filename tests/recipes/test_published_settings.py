"""The published recipes and the defaults have their sources' settings; `named.py` and `learners.py` say where they differ.

A recipe is stated by its differences from the defaults of its class.
"""

import dataclasses
from typing import Any

import pytest

from kitlib.recipes.fields import (
    ClassifierRecipe,
    DetectorRecipe,
    FindingsRecipe,
    PatchRecipe,
    SegmenterRecipe,
    SparseSegmenterRecipe,
    StudyRecipe,
    TrainingRecipe,
    WithBackbone,
    WithDistortions,
    WithOcclusions,
)
from kitlib.recipes.named import RECIPES

# Heidelberg report, section 3.4: the input of the backbone, which is also that of the study model.
BACKBONE_INPUT = {
    **{"channels": 3, "image_size": 224, "placement": "centre_crop", "schedule_every": 1, "rotate_degrees": 20.0},
    **{"turn_p": 1.0, "brightness_contrast": 0.0, "blur_p": 0.3, "erase_p": 0.3},
}
# UNet + HRNet, Table 3: augmentation of its segmenter and of its classifiers.
TABLE_3 = {
    **{"horizontal_flip": 0.0, "rotate_degrees": 45.0, "scale_x": (0.8, 1.1), "shear_degrees": 11.3, "shear_p": 0.7},
    **{"gamma_drawn": (0.5, 3.0), "salt_pepper": 0.01, "salt_pepper_p": 0.3, "blur_p": 0.5, "blur_pixels": 11},
    **{"noise": 0.05, "noise_p": 0.3},
}
PUBLISHED: dict[type, dict[str, Any]] = {
    # Heidelberg report, sections 3.1 and 3.4.
    TrainingRecipe: {
        **{"image_size": 512, "placement": "letterbox", "epochs": 50, "batch_size": 10, "optimizer": "sgd", "momentum": 0.9},
        **{"learning_rate": 1e-3, "schedule": "cosine", "step_factor": 0.1, "keep": "best", "horizontal_flip": 0.5},
        **{"turn_p": 0.5, "brightness_contrast": 0.2, "brightness_contrast_p": 0.5},
    },
    WithBackbone: {"backbone": "resnext101_32x8d", "channels": 1},
    ClassifierRecipe: {"hidden": 1024, "dropout": 0.5, "unfrozen_rate": 0.1},
    StudyRecipe: {"epochs": 58, "batch_size": 15, "learning_rate": 5e-4, "rotate_degrees": 10.0},
    FindingsRecipe: BACKBONE_INPUT | {"epochs": 35, "batch_size": 32},
    DetectorRecipe: {
        **{"family": "faster_rcnn", "negatives": 1.0, "horizontal_flip": 0.3, "brightness_contrast": 0.3},
        "schedule_every": 1,
        # torchvision's defaults, except for the lowest score
        **{"fpn_channels": 256, "box_hidden": 1024, "box_samples": 512, "proposals": 1000},
        **{"nms_iou": 0.5, "max_detections": 100, "min_score": 0.001},
        # ultralytics' defaults
        **{"box_gain": 7.5, "class_gain": 0.5, "dfl_gain": 1.5, "zoom": 0.5, "norm_momentum": 0.03},
    },
    # Patched FLANNEL, section 2.2.
    PatchRecipe: {
        **{"patches": 100, "patch_score": "votes", "canvas": 1024, "placement": "stretch", "equalise": True, "gamma": 0.5},
        **{"epochs": 200, "batch_size": 16, "optimizer": "adam", "learning_rate": 1e-5, "weight_decay": 1e-4, "l1": 1e-5},
        **{"multi_label": False, "judged_by": "macro_f1", "hidden": 0, "dropout": 0.0, "schedule": "step"},
        **{"views": ("full",), "trained_on": "full", "lungs": "masks", "masked": True, "probe": ""},
        **{"horizontal_flip": 0.0, "rotate_degrees": 0.0, "blur_p": 0.0, "erase_p": 0.0},
    },
    # UNet + HRNet, sections 3.3 and 4.
    SegmenterRecipe: {
        **TABLE_3,
        **{"network": "unet", "loss": "dice", "background_weight": 1.0, "image_size": 512, "epochs": 25, "batch_size": 8},
        **{"optimizer": "adam", "learning_rate": 0.005, "schedule": "plateau", "turn_p": 1.0, "brightness_contrast": 0.0},
    },
    # sneddy/pneumothorax-segmentation on GitHub.
    SparseSegmenterRecipe: {
        **{"network": "albunet", "structures": ("pneumothorax",), "placement": "letterbox", "views": ("full", "flip")},
        **{"positives": (0.8, 0.4), "loss": "bce_dice_focal", "loss_weights": (3.0, 1.0, 4.0), "background_weight": 1.0},
        **{"top": 0.75, "least_area": 2000 / 1024**2, "bottom": 0.3, "dilations": 0, "closings": 0},
        **{"least_island": 0.0, "least_width": 0.0, "margin": 0.0},
        **{"epochs": 50, "batch_size": 4, "learning_rate": 1e-4, "weight_decay": 5e-6, "plateau_epochs": 2},
        **{"horizontal_flip": 0.5, "turn_p": 0.5, "shift": 0.0625, "brightness_contrast": 0.2, "brightness_contrast_p": 0.2},
        **{"scale_x": (0.9, 1.1), "scale_y": (0.9, 1.1), "gamma_drawn": (0.8, 1.2)},
        **dict.fromkeys(["shear_p", "salt_pepper_p", "blur_p", "noise_p"], 0.0),
    },
}
# Defaults that no source states; they may be tuned.
OF_THE_KIT = {"patience", "plateau_epochs", "cutouts_p", "none_weight", "validation_patches", "least_lungs"}
OF_THE_KIT |= {"least_island", "least_width", "margin"}
# What has no effect; of all other fields 0, False, "" and an empty value have none.
NEUTRAL = {
    **dict.fromkeys(["gamma", "layer_decay", "width"], 1.0),
    **dict.fromkeys(["scale_x", "scale_y", "gamma_drawn"], (1.0, 1.0)),
    **dict.fromkeys(["frozen_statistics", "thawed_statistics", "multi_label"], True),
    **{"views": ("full",), "trained_on": "full", "lungs": "darkness", "structures": ("lungs",), "resize": "area"},
    **{"pooling": "backbone", "normalisation": "backbone", "outputs": "both", "judged_by": "auc"},
}


@pytest.mark.parametrize("kind", [*PUBLISHED, WithOcclusions, WithDistortions])
def test_a_default_is_published_or_has_no_effect(kind):
    defaults = {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
        if field.name in kind.__annotations__
    }
    published = PUBLISHED.get(kind, {})
    assert {name: defaults.pop(name) for name in published} == published
    others = {name: value for name, value in defaults.items() if name not in OF_THE_KIT}
    assert others == {name: NEUTRAL.get(name, type(value)()) for name, value in others.items()}


MIRRORED = {"views": ("full", "flip")}
ALL_EPOCHS = {"patience": 1000}
# Heidelberg report, section 3.2, and ultralytics' momentum.
YOLO = {
    **{"family": "yolo", "backbone": "yolov5lu", "epochs": 35, "batch_size": 16, "nominal_batch": 64, "momentum": 0.937},
    **{"learning_rate": 0.01, "weight_decay": 5e-4, "warmup_epochs": 3.0, "horizontal_flip": 0.5, **ALL_EPOCHS},
}
HEIDELBERG_YOLO = YOLO | {"vertical_flip": 0.1, "mixup": 0.5, "box_loss": "giou"}
# pmcheng/rsna-pneumonia on GitHub.
RSNA = {
    **{"family": "retinanet", "channels": 3, "image_size": 224, "epochs": 25, "batch_size": 8, "learning_rate": 0.01},
    **{"gradient_clip": 1.0, "negatives": 4.0, "horizontal_flip": 0.5, "rotate_degrees": 2.9, "shift": 0.1, "turn_p": 1.0},
    **{"brightness_contrast": 0.0, **ALL_EPOCHS},
}
ONE_LAYER = {"hidden": 0, "dropout": 0.0, "erase_p": 0.0}
UNDISTORTED = {"gamma_drawn": (1.0, 1.0), "salt_pepper_p": 0.0, "blur_p": 0.0, "noise_p": 0.0}
# FLANNEL's code.
FLANNEL = {
    **{"multi_label": False, "judged_by": "macro_f1", "placement": "stretch", "resize": "bicubic", "canvas": 336},
    **{"normalisation": "half", "epochs": 200, "patience": 200, "batch_size": 10, "optimizer": "adam"},
    **{"weight_decay": 1e-4, "schedule": "step", "milestones": (150,), "rotate_degrees": 0.0, "blur_p": 0.0, **ONE_LAYER},
}
# UNet + HRNet, section 4 and Table 5.
HRNET = {
    **TABLE_3,
    **{"multi_label": False, "one_logit": True, "judged_by": "macro_f1", "lungs": "masks", "masked": True},
    **{"placement": "letterbox", "image_size": 512, "hidden": (1024, 256), "epochs": 25, "patience": 25, "batch_size": 8},
    **{"momentum": 0.8, "learning_rate": 0.01, "weight_decay": 1e-4, "schedule": "step", "milestones": (30, 60, 90)},
    "erase_p": 0.0,
}
# ResUNet + ensembles, section 4.3.
ENSEMBLE = {
    **{"multi_label": False, "class_weights": True, "judged_by": "accuracy", "lungs": "masks", "masked": True},
    **{"placement": "letterbox", "dropout": 0.1, "frozen_backbone": True, "thawed_statistics": False, "unfreeze_every": 5},
    **{"unfrozen_rate": 1.0, "epochs": 60, "patience": 20, "optimizer": "adam", "schedule": "step", "milestones": (5,)},
    **{"step_factor": 0.01, "rotate_degrees": 15.0, "shift": 0.15, "scale_x": (0.85, 1.15), "scale_y": (0.85, 1.15)},
    **{"shear_degrees": 15.0, "shear_p": 1.0, "blur_p": 0.0, "erase_p": 0.0},
}
NETWORKS = ("densenet161", "resnet152", "resnext101_32x8d", "vgg19_bn")
INCEPTION = {"image_size": 299, "auxiliary": 0.4, "backbone": "inception_v3"}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "heidelberg_backbone": {"keep": "last"},
    "heidelberg_study": BACKBONE_INPUT | {"outputs": "study", "frozen_backbone": True, "keep": "last"},
    "heidelberg_faster_rcnn": {
        **{"channels": 3, "inference_size": 1024, "rotate_degrees": 20.0, "shift": 0.0625, "turn_p": 0.3},
        **{"brightness_contrast": 0.2, "brightness_contrast_p": 0.3, "sharpen_p": 0.5, "blur_p": 0.25, "cutouts": 6},
        **ALL_EPOCHS,
    },
    "heidelberg_yolo_rsna": HEIDELBERG_YOLO | {"epochs": 30, "negatives": 0.0},
    "heidelberg_yolo": HEIDELBERG_YOLO,
    # The class gain is the sum of the report's gains of class and objectness, 0.05 and 0.75.
    "heidelberg_yolo_published": HEIDELBERG_YOLO
    | {"box_gain": 0.075, "class_gain": 0.8, "dfl_gain": 0.015, "nms_iou": 0.2, "min_score": 0.1},
    "lean_study": {
        **{"backbone": "tf_efficientnet_b7", "channels": 3, "image_size": 600, "epochs": 20, "batch_size": 4},
        **{"nominal_batch": 32, "optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 0.01, "warmup_epochs": 1.0},
        **MIRRORED,
    },
    "lean_faster_rcnn": {
        **{"backbone": "resnet101d", "channels": 3, "image_size": 1024, "epochs": 20, "batch_size": 4, "nominal_batch": 16},
        **{"learning_rate": 0.01, "weight_decay": 1e-4, "warmup_epochs": 1.0, "rotate_degrees": 10.0, **MIRRORED},
    },
    "lean_vinbigdata_yolo": YOLO
    | MIRRORED
    | {"backbone": "yolov5xu", "image_size": 640, "epochs": 80, "mosaic": 1.0, "nms_iou": 0.25},
    "lean_vinbigdata_faster_rcnn": {
        **{"backbone": "resnet50", "channels": 3, "image_size": 1024, "epochs": 30, "batch_size": 8, "nominal_batch": 16},
        **{"learning_rate": 0.02, "weight_decay": 1e-4, "warmup_epochs": 1.0, "negatives": 3.0, "horizontal_flip": 0.5},
        **{"rotate_degrees": 20.0, "shift": 0.1, "turn_p": 0.9, "brightness_contrast": 0.25, "brightness_contrast_p": 0.9},
        **{"blur_p": 0.2, **MIRRORED, **ALL_EPOCHS},
    },
    "lean_vinbigdata_classifier": {
        **{"backbone": "tf_efficientnet_b5", "image_size": 600, "placement": "stretch", "epochs": 50, "batch_size": 6},
        **{"nominal_batch": 12, "optimizer": "adamw", "learning_rate": 7.5e-5, "weight_decay": 1e-4},
        **{"rotate_degrees": 0.0, "brightness_contrast": 0.2, "brightness_contrast_p": 0.8, **ONE_LAYER},
    },
    "lean_rsna_retinanet50": RSNA | {"backbone": "resnet50"},
    "lean_rsna_retinanet101": RSNA | {"backbone": "resnet101"},
    "lean_rsna_classifier": {
        **{"backbone": "inception_resnet_v2", "image_size": 256, "placement": "stretch", "multi_label": False},
        **{"class_weights": True, "judged_by": "macro_f1", "epochs": 6, "batch_size": 16, "optimizer": "adam"},
        **{"learning_rate": 5e-5, "schedule": "step", "milestones": (2, 3, 4), "step_factor": 0.5, "rotate_degrees": 15.0},
        **{"scale_x": (1.0, 1.18), "scale_y": (1.0, 1.18), "turn_p": 0.25, "blur_p": 0.125, **MIRRORED, **ONE_LAYER},
    },
    "lean_ranzcr": {
        **{"backbone": "tf_efficientnet_b7", "image_size": 600, "placement": "stretch", "epochs": 15, "batch_size": 4},
        **{"nominal_batch": 36, "optimizer": "adamw", "weight_decay": 1e-6, "warmup_epochs": 1.0, "schedule_every": 0},
        **{"rotate_degrees": 5.0, "shift": 0.05, "scale_x": (0.9, 1.1), "scale_y": (0.9, 1.1), "turn_p": 0.5},
        **{"brightness_contrast": 0.11, "blur_p": 0.5, "cutouts": 5, "cutouts_p": 0.5, **MIRRORED, **ONE_LAYER},
    },
    "unet_lungs": {"dilations": 8, "closings": 2, "least_area": 50_000 / 512**2},
    "resunet_lungs": {
        **{"network": "resunet", "image_size": 256, "epochs": 45, "batch_size": 16, "learning_rate": 1e-3},
        **{"horizontal_flip": 0.5, "rotate_degrees": 180.0, "shift": 0.3, "scale_x": (0.8, 1.2), "scale_y": (0.8, 1.2)},
        **{"shear_degrees": 20.0, "shear_p": 1.0, **UNDISTORTED},
    },
    "fc_densenet103_lungs": {
        **{"network": "fc_densenet103", "structures": ("heart", "left_lung", "right_lung"), "loss": "cross_entropy"},
        **{"background_weight": 0.5, "equalise": True, "gamma": 0.5, "image_size": 256, "epochs": 100, "batch_size": 2},
        **{"learning_rate": 1e-4, "weight_decay": 1e-6, "rotate_degrees": 0.0, "scale_x": (1.0, 1.0), "shear_p": 0.0},
        **UNDISTORTED,
    },
    "lean_pneumothorax": {"gradient_clip": 0.1},
    **{f"flannel_{name}": FLANNEL | {"backbone": name} for name in NETWORKS},
    "flannel_inception_v3": FLANNEL | INCEPTION | {"canvas": 448},
    **{f"patched_{name}": {"backbone": name} for name in NETWORKS},
    "patched_inception_v3": INCEPTION,
    **{f"hrnet_{width}": HRNET | {"backbone": f"hrnet_{width}"} for width in ("w18", "w32", "w48")},
    **{f"hrnet_baseline_{name}": HRNET | {"backbone": name} for name in ("resnet152", "densenet121", "efficientnet_b4")},
    "ensemble_densenet201": ENSEMBLE | {"backbone": "densenet201", "hidden": 128},
    "ensemble_resnet152": ENSEMBLE | {"backbone": "resnet152"},
    "ensemble_vgg19": ENSEMBLE | {"backbone": "vgg19", "hidden": 4096},
}


def test_the_table_has_all_published_recipes():
    unpublished = ("small_", "strong_", "heidelberg_study_letterbox")
    assert set(DIFFERENCES) == {name for name in RECIPES if not name.startswith(unpublished)}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_published_recipe_differs_from_the_defaults_as_its_source(name):
    recipe = RECIPES[name]
    assert recipe == dataclasses.replace(type(recipe)(), **DIFFERENCES[name])
