"""Recipes of published classifiers for labels with exactly one true class per image.

The publications are FLANNEL, Patched FLANNEL, UNet + HRNet, and ResUNet + ensembles.
"""

from kitlib.recipes.fields import FindingsRecipe, PatchRecipe
from kitlib.settings import override

# In the order in which FLANNEL's ensemble concatenates their predictions.
FLANNEL_NETWORKS = ("densenet161", "inception_v3", "resnet152", "resnext101_32x8d", "vgg19_bn")

# As in FLANNEL's code, the image is stretched to 336 pixels a side (bicubic); training crops a random square of 224,
# validation crops the middle. The best of all 200 epochs is kept, in FLANNEL's code by accuracy, here by macro F1, in which
# rare classes count as much as frequent classes.
_FLANNEL = FindingsRecipe(
    multi_label=False,
    judged_by="macro_f1",
    placement="stretch",
    resize="bicubic",
    canvas=336,
    image_size=224,
    normalisation="half",
    hidden=0,
    dropout=0.0,
    epochs=200,
    patience=200,
    batch_size=10,
    optimizer="adam",
    learning_rate=1e-3,
    weight_decay=1e-4,
    schedule="step",
    milestones=(150,),
    rotate_degrees=0.0,
    blur_p=0.0,
    erase_p=0.0,
)
# inception_v3's input size, and the weight of its auxiliary head's loss in torchvision's training. For FLANNEL the canvas
# grows in the same proportion.
_INCEPTION = {"image_size": 299, "auxiliary": 0.4}

# UNet + HRNet, section 4 and Table 5, on images that are black outside the lungs, with the augmentation of Table 3 as in
# `unet_lungs`. No milestone is within the 25 epochs, so the rate is constant.
_HRNET = FindingsRecipe(
    multi_label=False,
    one_logit=True,
    judged_by="macro_f1",
    lungs="masks",
    masked=True,
    placement="letterbox",
    image_size=512,
    hidden=(1024, 256),  # "several fully connected layers"; their sizes are only in Figure 11 and are the kit's
    epochs=25,
    patience=25,
    batch_size=8,
    momentum=0.8,
    learning_rate=0.01,
    weight_decay=1e-4,
    schedule="step",
    milestones=(30, 60, 90),
    horizontal_flip=0.0,
    rotate_degrees=45.0,
    scale_x=(0.8, 1.1),
    shear_degrees=11.3,  # tan(11.3 degrees) is the paper's 0.2
    shear_p=0.7,
    gamma_drawn=(0.5, 3.0),
    salt_pepper=0.01,
    salt_pepper_p=0.3,
    blur_p=0.5,
    blur_pixels=11,
    noise=0.05,  # the paper states 0.5, without a unit
    noise_p=0.3,
    erase_p=0.0,
)

# ResUNet + ensembles, section 4.3: trains only the head for five epochs, then also backbone stages, the last first, at a
# rate of 1e-5; batch norm statistics stay those of the starting weights. The paper does not state the image size or the
# epochs per stage.
_ENSEMBLE = FindingsRecipe(
    multi_label=False,
    class_weights=True,
    judged_by="accuracy",
    lungs="masks",
    masked=True,
    placement="letterbox",
    image_size=224,
    dropout=0.1,
    frozen_backbone=True,
    thawed_statistics=False,
    unfreeze_every=5,
    unfrozen_rate=1.0,
    epochs=60,
    patience=20,
    batch_size=32,
    optimizer="adam",
    learning_rate=1e-3,
    schedule="step",
    milestones=(5,),
    step_factor=0.01,
    # The paper's "15 %" of rotation and shear are ranges of Keras' ImageDataGenerator, which takes both in degrees; its
    # shift and zoom are shares.
    rotate_degrees=15.0,
    shift=0.15,
    scale_x=(0.85, 1.15),
    scale_y=(0.85, 1.15),
    shear_degrees=15.0,
    shear_p=1.0,
    blur_p=0.0,
    erase_p=0.0,
)


LEARNERS: dict[str, FindingsRecipe] = {
    **{
        f"flannel_{name}": override(
            _FLANNEL, backbone=name, **(_INCEPTION | {"canvas": 448} if name == "inception_v3" else {})
        )
        for name in FLANNEL_NETWORKS
    },
    **{
        f"patched_{name}": override(PatchRecipe(), backbone=name, **(_INCEPTION if name == "inception_v3" else {}))
        for name in FLANNEL_NETWORKS
    },
    **{f"hrnet_{width}": override(_HRNET, backbone=f"hrnet_{width}") for width in ("w18", "w32", "w48")},
    **{
        f"hrnet_baseline_{name}": override(_HRNET, backbone=name) for name in ("resnet152", "densenet121", "efficientnet_b4")
    },
    "ensemble_densenet201": override(_ENSEMBLE, backbone="densenet201", hidden=128),
    "ensemble_resnet152": override(_ENSEMBLE, backbone="resnet152", hidden=1024),
    "ensemble_vgg19": override(_ENSEMBLE, backbone="vgg19", hidden=4096),
}
