"""Recipes: overrides, contradictions that are refused, small recipes, and choices that match the library."""

from typing import get_args

import pytest

from kitlib.classes import MASK_CODES, SPARSE_STRUCTURES
from kitlib.errors import SettingsError
from kitlib.letterbox import PLACEMENTS
from kitlib.models.classifier import TRAINED_OUTPUTS
from kitlib.models.patches import SCORES
from kitlib.models.segmenter import NETWORKS
from kitlib.recipes.fields import (
    BOX_LOSSES,
    VIEWS,
    DetectorRecipe,
    FindingsRecipe,
    Optimizer,
    PatchRecipe,
    Placing,
    SegmenterRecipe,
    SparseSegmenterRecipe,
    SparseStructure,
    Structure,
    StudyRecipe,
    View,
)
from kitlib.recipes.named import RECIPES, recipe
from kitlib.settings import field_kinds, from_dict, override
from kitlib.training.xray_dataset import CANVAS_KINDS
from kitlib.training.yolo import OPTIMIZERS


def test_overrides_replace_fields_and_leave_the_published_recipe_alone():
    shorter = recipe("heidelberg_study", StudyRecipe, epochs=2, dropout=0)
    assert (shorter.epochs, shorter.dropout, shorter.backbone) == (2, 0.0, "resnext101_32x8d")
    assert recipe("heidelberg_study", StudyRecipe).epochs == 58


def test_heidelbergs_frozen_backbone_gets_the_input_that_it_was_trained_on():
    # Report, section 3.4: "the same data augmentation as described in 3.1 is required".
    study, backbone = recipe("heidelberg_study", StudyRecipe), RECIPES["heidelberg_backbone"]
    names = ["image_size", "canvas", "placement", "channels", "normalisation", "horizontal_flip", "rotate_degrees", "turn_p"]
    names += ["brightness_contrast", "blur_p", "erase_p", "shift", "keep", "schedule_every"]
    assert {name: getattr(study, name) for name in names} == {name: getattr(backbone, name) for name in names}
    assert (study.image_size, study.placement, study.channels) == (224, "centre_crop", 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: recipe("heidelberg", StudyRecipe),
            "recipes of class StudyRecipe, most similar first: heidelberg_study, ",
        ),
        (lambda: recipe("heidelberg_yolo", StudyRecipe), "is a DetectorRecipe; expected a StudyRecipe, such as heidelberg"),
        (lambda: override(StudyRecipe(), epoch=3), "no field 'epoch'; it has: starting_weights, image_size"),
        (lambda: from_dict(DetectorRecipe, ["a"]), "must be a mapping"),
    ],
)
def test_unknown_names_and_types_are_errors_that_list_what_is_valid(call, message):
    with pytest.raises(SettingsError, match=message):
        call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"schedule": "plateau", "warmup_epochs": 1.0},
            r"plateau', which has no warm-up, but warmup_epochs is 1\.0; set warmup_epochs=0",
        ),
        ({"masked": True}, "masked is True, but lungs is 'darkness'"),
        ({"trained_on": "lungs", "views": ["lungs", "flip"]}, "a model trained on crops cannot predict whole images"),
        ({"milestones": [3]}, r"milestones are \[3\], but schedule is 'cosine'"),
        ({"random_parts": ["backbone.x"]}, "but starting_weights is empty, so all parts are random"),
        ({"sharpen_p": 0.6, "blur_p": 0.5}, "add up to more than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_a_training(fields, message):
    for kind in (StudyRecipe, DetectorRecipe):
        with pytest.raises(SettingsError, match=message):
            override(kind(), **fields)


FROZEN = {"frozen_backbone": True}
MASKED = {"lungs": "masks", "masked": True}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (FindingsRecipe, {"layer_decay": 0.9, **FROZEN}, "but the backbone stays frozen"),
        (FindingsRecipe, {"canvas": 223}, "smaller than the crop, whose image_size is 224"),
        (FindingsRecipe, {"probe": "border", "canvas": 225}, "prediction crops away the border"),
        (FindingsRecipe, {"probe": "border", **MASKED}, "blackens everything outside the lungs"),
        (FindingsRecipe, {"probe": "outside_lungs"}, "lungs is 'darkness' and masked is False"),
        (FindingsRecipe, {"probe": "outside_lungs", **MASKED}, "lungs is 'masks' and masked is True"),
        (FindingsRecipe, {"unfreeze_every": 1}, "the backbone is not frozen"),
        (FindingsRecipe, {"thawed_statistics": False}, "no batch norm statistics are frozen"),
        (FindingsRecipe, {"thawed_statistics": False, "frozen_statistics": False, **FROZEN}, "no batch norm statistics are"),
        (FindingsRecipe, {"judged_by": "macro_f1"}, "judged_by='macro_f1' can be used only if exactly one class is true"),
        (FindingsRecipe, {"one_logit": True}, "one_logit=True can be used only if exactly one class is true"),
        (FindingsRecipe, {"class_weights": True}, "class_weights=True can be used only if exactly one class is true"),
        (FindingsRecipe, {"auxiliary": 0.4}, "resnext101_32x8d has no auxiliary head"),
        (FindingsRecipe, {"auxiliary": 0.4, "backbone": "inception_v3", **FROZEN}, "a frozen inception_v3 has no auxiliary"),
        (DetectorRecipe, {"width": 0.5}, r"is a faster_rcnn, which does not use width \(leave it at 1\.0\)"),
        (DetectorRecipe, {"box_loss": "giou"}, "valid for a faster_rcnn: smooth_l1, ciou"),
        (DetectorRecipe, {"family": "yolo", "momentum": 0.0}, "SGD requires a positive value"),
        (StudyRecipe, {"image_size": 7}, "expected a whole number of at least 8"),
        (StudyRecipe, {"rotate_degrees": 180.5}, "expected a finite number of at least 0 and at most 180"),
        (StudyRecipe, {"gamma_drawn": [0.0, 1.0]}, "expected a list of 2 items: a finite number of at least 0.01"),
        (SparseSegmenterRecipe, {"margin": -0.1}, "margin is -0.1; expected"),
        (SparseSegmenterRecipe, {"margin": 0.1}, "margin is 0.1; expected"),
    ],
)
def test_settings_that_a_kind_of_model_cannot_use_are_refused(kind, fields, message):
    with pytest.raises(SettingsError, match=message):
        override(kind(), **fields)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FindingsRecipe, {"layer_decay": 0.9}),
        (FindingsRecipe, {"layer_decay": 0.9, "unfreeze_every": 1, **FROZEN}),
        (FindingsRecipe, {"canvas": 224, "probe": "border"}),
        (FindingsRecipe, {"probe": "outside_lungs", "lungs": "masks"}),
        (FindingsRecipe, {"thawed_statistics": False, **FROZEN}),
        (FindingsRecipe, {"judged_by": "macro_f1", "one_logit": True, "class_weights": True, "multi_label": False}),
        (FindingsRecipe, {"auxiliary": 0.4, "backbone": "inception_v3.tv_in1k"}),
        (StudyRecipe, {"random_parts": ("backbone.x",), "starting_weights": "run"}),
        (StudyRecipe, {"sharpen_p": 0.5, "blur_p": 0.5}),
        (StudyRecipe, {"schedule": "step", "milestones": (3,)}),
        (StudyRecipe, {"schedule": "plateau"}),
        (StudyRecipe, MASKED),
        (StudyRecipe, {"trained_on": "lungs", "views": ("lungs", "lungs_flip")}),
        (StudyRecipe, {"trained_on": "either", "views": ("full", "lungs")}),
        (StudyRecipe, {"image_size": 8, "rotate_degrees": 180.0, "gamma_drawn": (0.01, 1.0)}),
        (DetectorRecipe, {"momentum": 0.0}),
        (DetectorRecipe, {"family": "yolo", "momentum": 0.0, "optimizer": "adamw", "width": 0.5, "box_loss": "giou"}),
        (SegmenterRecipe, {"structures": ("left_lung", "right_lung")}),
        (SegmenterRecipe, {"structures": ("lungs", "heart"), "horizontal_flip": 0.5}),
        (SparseSegmenterRecipe, {"positives": (), "bottom": 0.75}),
    ],
)
def test_settings_at_the_limits_and_settings_that_fit_together_are_accepted(kind, fields):
    taken = override(kind(), **fields)
    assert {name: getattr(taken, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "hrnet"}, "network is 'hrnet'; expected one of 'unet', 'resunet', 'fc_densenet103'"),
        (
            {"structures": []},
            r"structures is \[\]; expected a list, each item one of 'lungs', .*, at least one, none repeated",
        ),
        ({"structures": ["lung"]}, r"structures is \['lung'\]; expected a list, each item one of 'lungs'"),
        ({"structures": ["heart", "heart"]}, r"structures is \['heart', 'heart'\]; .*, at least one, none repeated"),
        ({"structures": ["lungs", "left_lung"]}, '"lungs" includes "left_lung" and "right_lung"; use either'),
        ({"cutouts": 2}, "SegmenterRecipe has no field 'cutouts'; it has: starting_weights"),
        ({"backbone": "resnet50"}, "SegmenterRecipe has no field 'backbone'"),
        ({"structures": ("heart",)}, 'add "lungs", or both "left_lung" and "right_lung"'),
        ({"horizontal_flip": 0.5, "structures": ("heart", "left_lung", "right_lung")}, "a mirrored left lung"),
    ],
)
def test_a_segmenter_refuses_invalid_and_unknown_fields(fields, message):
    with pytest.raises(SettingsError, match=message):
        override(SegmenterRecipe(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structures": ["lungs"]}, r"structures is \['lungs'\]; expected a list of 1 items: 'pneumothorax'"),
        ({"placement": "centre_crop"}, "placement is 'centre_crop'; expected one of 'letterbox', 'stretch'"),
        ({"views": ["lungs"]}, "views is .*; expected a list, each item one of 'full', 'flip'"),
        ({"dilations": 1}, "dilations is 1; expected 0"),
        ({"positives": [0.5]}, r"positives is \[0.5\]; expected the shares of images .*, such as \[0.8, 0.4\], or \[\]"),
        ({"positives": [0.5, 0.0]}, "positives is .*; expected a list, each item a finite number above 0 and at most 1"),
        ({"loss_weights": [0, 0, 0]}, "loss_weights are all 0"),
        ({"bottom": 0.8}, "bottom is 0.8, but top is only 0.75"),
    ],
)
def test_a_segmenter_of_a_sparse_structure_refuses_what_it_does_not_use(fields, message):
    with pytest.raises(SettingsError, match=message):
        override(SparseSegmenterRecipe(), **fields)


def test_a_small_recipe_trains_a_small_network_for_a_few_epochs():
    """docs/training.md says that two cores train each in about a minute."""
    for name, small in RECIPES.items():
        if name.startswith("small_"):
            assert small.image_size <= 128 and small.epochs <= 12 and small.batch_size <= 8, name
            # timm's test networks are tiny; the others are narrowed.
            assert getattr(small, "backbone", "").startswith("test_") or small.width <= 0.25, name


def test_the_choices_of_fields_are_those_of_the_library():
    assert get_args(View) == tuple(VIEWS) and get_args(Structure) + get_args(SparseStructure) == tuple(MASK_CODES)
    assert get_args(SparseStructure) == SPARSE_STRUCTURES
    assert get_args(Placing) == tuple(PLACEMENTS) and get_args(Optimizer) == tuple(OPTIMIZERS)
    assert get_args(field_kinds(SegmenterRecipe)["network"]) == tuple(NETWORKS)
    assert get_args(field_kinds(PatchRecipe)["patch_score"]) == tuple(SCORES)
    assert get_args(field_kinds(StudyRecipe)["outputs"]) == tuple(TRAINED_OUTPUTS)
    assert get_args(field_kinds(StudyRecipe)["trained_on"]) == tuple(CANVAS_KINDS)
    losses = {loss for each in BOX_LOSSES.values() for loss in each}
    assert set(get_args(field_kinds(DetectorRecipe)["box_loss"])) == {"", *losses}
