"""Named recipes: published systems, and small recipes that two CPU cores train in a minute.

A notebook chooses a recipe by name and may override its fields.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from kitlib.errors import SettingsError
from kitlib.recipes.fields import (
    PUBLISHED_CLEAN_UP,
    DetectorRecipe,
    FindingsRecipe,
    PatchRecipe,
    SegmenterRecipe,
    SparseSegmenterRecipe,
    StudyRecipe,
    TrainingRecipe,
)
from kitlib.recipes.learners import LEARNERS
from kitlib.settings import R, override

# The Heidelberg report trains for fixed numbers of epochs. It keeps the detectors' best epoch, and the last epoch of the NIH
# backbone and the study model. Early stopping is a deviation: override `patience`, and `keep` with "best".
_ALL_EPOCHS: dict[str, Any] = {"patience": 1000}

# Augmentation of Heidelberg's Faster R-CNN, report section 3.1.
_HEIDELBERG_BOXES: dict[str, Any] = {
    "rotate_degrees": 20.0,
    "shift": 0.0625,  # albumentations' default, which the report does not change
    "turn_p": 0.3,
    "brightness_contrast": 0.2,
    "brightness_contrast_p": 0.3,
    "sharpen_p": 0.5,
    "blur_p": 0.25,
    "cutouts": 6,
}
# RSNA Pneumonia, 3rd place (pmcheng/rsna-pneumonia on GitHub), which uses two RetinaNets and no classifier: images of 224
# pixels, 25 epochs of 2,500 batches, which is nearly all images. Without its scaling by 0.8 to 1.2, which the kit's
# RetinaNet lacks. The rate falls by cosine; Keras' `decay` of 1e-4 per batch lets it fall to an eighth.
_LEAN_RSNA = DetectorRecipe(
    family="retinanet",
    backbone="resnet50",
    channels=3,
    image_size=224,
    epochs=25,
    batch_size=8,
    learning_rate=0.01,
    gradient_clip=1.0,
    negatives=4.0,  # 20,672 images without and 6,012 with a box: all
    horizontal_flip=0.5,
    rotate_degrees=2.9,  # 0.05 radians
    shift=0.1,
    turn_p=1.0,
    brightness_contrast=0.0,
    **_ALL_EPOCHS,
)
_HEIDELBERG_YOLO = DetectorRecipe(
    family="yolo",
    backbone="yolov5lu",
    epochs=35,
    batch_size=16,
    nominal_batch=64,
    momentum=0.937,  # ultralytics' default
    learning_rate=0.01,
    weight_decay=5e-4,
    warmup_epochs=3.0,
    horizontal_flip=0.5,
    vertical_flip=0.1,
    mixup=0.5,
    box_loss="giou",
    **_ALL_EPOCHS,
)

# Published recipes first, then small recipes.
RECIPES: dict[str, TrainingRecipe] = {
    "heidelberg_backbone": FindingsRecipe(keep="last"),
    # The input and the augmentation of the backbone, report section 3.4, and the four study classes alone.
    "heidelberg_study": StudyRecipe(
        outputs="study",
        frozen_backbone=True,
        schedule_every=1,
        channels=3,
        image_size=224,
        placement="centre_crop",
        keep="last",
        rotate_degrees=20.0,
        turn_p=1.0,
        brightness_contrast=0.0,
        blur_p=0.3,
        erase_p=0.3,
    ),
    # Not published: larger images without cropped edges, other augmentation, and `none` as a further output.
    "heidelberg_study_letterbox": StudyRecipe(frozen_backbone=True, schedule_every=1),
    "heidelberg_faster_rcnn": DetectorRecipe(channels=3, inference_size=1024, **_HEIDELBERG_BOXES, **_ALL_EPOCHS),
    # YOLO's first stage, on RSNA's images with a box.
    "heidelberg_yolo_rsna": dataclasses.replace(_HEIDELBERG_YOLO, epochs=30, negatives=0.0),
    # Uses ultralytics' loss gains. The gains in the report's equation 2 are for YOLOv5's anchor-based losses, which have
    # another scale; here they would divide box gradients by 100, too small for SGD at the published learning rate.
    "heidelberg_yolo": _HEIDELBERG_YOLO,
    # Uses the report's gains. The class gain is the sum of the report's class and objectness gains, because this network has
    # no objectness output; the dfl gain, which the report's network lacks, keeps ultralytics' ratio to the box gain. Also
    # uses the report's thresholds, which drop boxes that would add to average precision.
    "heidelberg_yolo_published": dataclasses.replace(
        _HEIDELBERG_YOLO, box_gain=0.075, class_gain=0.05 + 0.75, dfl_gain=0.015, nms_iou=0.2, min_score=0.1
    ),
    # 6th place, the smallest of the strong solutions: one classifier and one Faster R-CNN, with predictions averaged over
    # the image and its mirror image.
    "lean_study": StudyRecipe(
        backbone="tf_efficientnet_b7",
        channels=3,
        image_size=600,
        epochs=20,
        batch_size=4,  # a T4 has no room for 8
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
    # VinBigData, 2nd place (ZFTurbo/2nd-place-solution-for-VinBigData-Chest-X-ray-Abnormalities-Detection on GitHub), both
    # on boxes that weighted box fusion merged from the readers'. Of part_zfturbo, net_v09_yolo5: YOLOv5x at 640 pixels, 80
    # epochs, ultralytics' defaults, boxes suppressed at an IoU of 0.25, the image and its mirror image. Its lowest score of
    # 0.01 is not used, because the metric never punishes an unlikely box.
    "lean_vinbigdata_yolo": dataclasses.replace(
        _HEIDELBERG_YOLO,
        backbone="yolov5xu",
        image_size=640,
        epochs=80,
        vertical_flip=0.0,
        mosaic=1.0,
        mixup=0.0,
        box_loss="",
        nms_iou=0.25,
        views=("full", "flip"),
    ),
    # Of part_ivan, its Cascade R-CNN with a recursive pyramid: backbone, canvas, epochs, images without a finding, schedule,
    # augmentation (without scaling and shear, which the kit's detectors lack) and thresholds; one stage of boxes instead of
    # three. The optimiser is that of mmdetection's schedule for 16 images per step.
    "lean_vinbigdata_faster_rcnn": DetectorRecipe(
        backbone="resnet50",
        channels=3,
        image_size=1024,
        epochs=30,
        batch_size=8,
        nominal_batch=16,
        learning_rate=0.02,
        weight_decay=1e-4,
        warmup_epochs=1.0,
        negatives=3.0,  # 10,606 images without and 4,394 with a box: all
        views=("full", "flip"),
        horizontal_flip=0.5,
        rotate_degrees=20.0,
        shift=0.1,
        turn_p=0.9,
        brightness_contrast=0.25,
        brightness_contrast_p=0.9,
        blur_p=0.2,
        **_ALL_EPOCHS,
    ),
    # VinBigData, 91st place (sunghyunjun/kaggle-vinbigdata-chest-xray-abnormalities-detection on GitHub), the first of its
    # classifiers of images with and without a finding (ROC AUC 0.993). Here it learns all 15 labels, of which only
    # `No finding` is used. Without its scaling by 0.1 to 2.
    "lean_vinbigdata_classifier": FindingsRecipe(
        backbone="tf_efficientnet_b5",
        image_size=600,
        placement="stretch",
        hidden=0,
        dropout=0.0,
        epochs=50,
        batch_size=6,  # 12 would need 14.3 GiB
        nominal_batch=12,
        optimizer="adamw",
        learning_rate=7.5e-5,
        weight_decay=1e-4,
        rotate_degrees=0.0,
        brightness_contrast=0.2,
        brightness_contrast_p=0.8,
        erase_p=0.0,
    ),
    "lean_rsna_retinanet50": _LEAN_RSNA,
    "lean_rsna_retinanet101": dataclasses.replace(_LEAN_RSNA, backbone="resnet101"),
    # RSNA Pneumonia, 1st place, the classifier of its simple variant (i-pan/kaggle-rsna18 on GitHub, TrainOneClassifier.py),
    # whose score is multiplied with the boxes' scores. Here it learns the three classes, as others of that ensemble do. Its
    # 15 epochs have 8,000 images each. Without inverted images and gamma; the original starts from weights trained on NIH's
    # classes.
    "lean_rsna_classifier": FindingsRecipe(
        backbone="inception_resnet_v2",
        image_size=256,
        placement="stretch",
        hidden=0,
        dropout=0.0,
        multi_label=False,
        class_weights=True,
        judged_by="macro_f1",
        epochs=6,
        batch_size=16,
        optimizer="adam",
        learning_rate=5e-5,
        schedule="step",
        milestones=(2, 3, 4),  # after 6, 9 and 12 of the 15
        step_factor=0.5,
        views=("full", "flip"),
        rotate_degrees=15.0,
        scale_x=(1.0, 1.18),
        scale_y=(1.0, 1.18),
        turn_p=0.25,
        blur_p=0.125,
        erase_p=0.0,
    ),
    # RANZCR CLiP, 71st place, silver (kozodoi/Kaggle_RANZCR_Challenge on GitHub, model_1), one of seven networks, which
    # together score 0.971; AdamW for AdamP, no optical or grid distortion, and scales of 0.9 to 1.1 for random crops.
    "lean_ranzcr": FindingsRecipe(
        backbone="tf_efficientnet_b7",
        image_size=600,
        placement="stretch",
        hidden=0,
        dropout=0.0,
        epochs=15,
        batch_size=4,  # 12 would need 25 GiB
        nominal_batch=36,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=1e-6,
        warmup_epochs=1.0,
        schedule_every=0,
        views=("full", "flip"),
        rotate_degrees=5.0,
        shift=0.05,
        scale_x=(0.9, 1.1),
        scale_y=(0.9, 1.1),
        turn_p=0.5,
        brightness_contrast=0.11,
        blur_p=0.5,
        cutouts=5,
        cutouts_p=0.5,
        erase_p=0.0,
    ),
    # Methods common to the strongest solutions: auxiliary segmentation, moving averages, lung crops.
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
        batch_size=8,  # a T4 has no room for 16
        epochs=40,
        vertical_flip=0.0,
        mosaic=1.0,
        box_loss="",
        patience=10,
        views=("full", "flip"),
    ),
    "unet_lungs": SegmenterRecipe(**PUBLISHED_CLEAN_UP),
    # ResUNet + ensembles, sections 4.1 and 4.2; the optimiser's settings are the kit's. As in `ensemble_*`, the paper's
    # shear of "20 %" is in the degrees of Keras' ImageDataGenerator.
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
        shear_degrees=20.0,
        shear_p=1.0,
        gamma_drawn=(1.0, 1.0),
        salt_pepper_p=0.0,
        blur_p=0.0,
        noise_p=0.0,
    ),
    # Patched FLANNEL, section 2.1, with the network and the code of Oh et al.
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
    # SIIM-ACR Pneumothorax, 1st place (sneddy/pneumothorax-segmentation on GitHub): first from a resnet34's weights at 512
    # pixels, then from that run at 1,024 pixels, with the overrides in submissions/plans/siim_acr_lean.yaml.
    "lean_pneumothorax": SparseSegmenterRecipe(gradient_clip=0.1),
    **LEARNERS,
    "small_lungs": SegmenterRecipe(
        width=0.25,
        image_size=96,
        epochs=12,
        batch_size=4,
        learning_rate=4e-3,
        rotate_degrees=10.0,
        gamma_drawn=(0.7, 1.5),
        noise_p=0.0,
    ),
    "small_pneumothorax": SparseSegmenterRecipe(
        network="resunet",
        width=0.125,
        image_size=96,
        epochs=10,
        batch_size=8,
        learning_rate=0.01,
        schedule="cosine",
        positives=(0.5, 0.25),
        rotate_degrees=10.0,
        top=0.5,
        least_area=0.001,
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
    "small_learner": FindingsRecipe(
        backbone="test_efficientnet",
        channels=1,
        image_size=96,
        placement="letterbox",
        hidden=0,
        dropout=0.2,
        multi_label=False,
        judged_by="macro_f1",
        epochs=8,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.02,
        warmup_epochs=1.0,
        schedule_every=0,
        rotate_degrees=5.0,
        blur_p=0.0,
        erase_p=0.0,
    ),
    "small_patches": PatchRecipe(
        backbone="test_efficientnet",
        channels=1,
        canvas=128,
        image_size=48,
        patches=8,
        validation_patches=4,
        epochs=8,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.02,
        l1=0.0,
        schedule="cosine",
        schedule_every=0,
        warmup_epochs=1.0,
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
    "small_retinanet": DetectorRecipe(
        family="retinanet",
        backbone="test_resnet",
        image_size=96,
        epochs=10,
        batch_size=4,
        optimizer="adamw",
        learning_rate=3e-3,
        warmup_epochs=1.0,
        gradient_clip=1.0,  # in some steps, the focal loss of a network from scratch is a thousand times the usual one
        schedule_every=0,
        fpn_channels=32,
        proposals=100,
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


def recipe(name: str, kind: type[R], /, **overrides: Any) -> R:
    """Return the recipe called `name`, with the fields in `overrides` replaced.

    Raises SettingsError if the recipe does not exist or is not an instance of `kind` (the message lists the valid names), or
    if `overrides` contains an invalid field or value.
    """
    if name not in RECIPES:
        fitting = [other for other, value in RECIPES.items() if isinstance(value, kind)]
        closest = difflib.get_close_matches(name, fitting, 1, cutoff=0.0)
        names = ", ".join([*closest, *(other for other in fitting if other not in closest)])
        raise SettingsError(f"no recipe is called {name!r}; recipes of class {kind.__name__}, most similar first: {names}")
    published = RECIPES[name]
    if not isinstance(published, kind):
        fitting = [other for other, value in RECIPES.items() if isinstance(value, kind)]
        raise SettingsError(
            f"recipe {name!r} is a {type(published).__name__}; expected a {kind.__name__}, such as {', '.join(fitting)}"
        )
    return override(published, **overrides)


def check_recipe(defaults: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raise SettingsError unless a training notebook's parameters `recipe`, `overrides` and `epochs` make a valid recipe.

    `defaults` has the notebook's parameters with their defaults, `parameters` has the values that replace defaults. The
    recipe must have the default recipe's class or a subclass of it. A notebook without a default recipe is not checked.
    """
    if defaults.get("recipe") not in RECIPES:
        return
    values = {**defaults, **parameters}
    changes = {**values.get("overrides", {}), **({"epochs": values["epochs"]} if values.get("epochs") else {})}
    recipe(values["recipe"], type(RECIPES[defaults["recipe"]]), **changes)
