"""RetinaNet (Lin et al. 2017) with a feature pyramid on any timm backbone with features at strides 4, 8 and 16."""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import AnchorGenerator

from kitlib.models.pyramid import HalfPrecision, Pyramid, PyramidDetector
from kitlib.recipes.fields import DetectorRecipe

SMALL_SIDE = 512  # pixels


class RetinaNetDetector(PyramidDetector):
    """RetinaNet for grey uint8 canvases of the recipe's size; each class has a score of its own (a sigmoid).

    The pyramid has maps of strides 8 to 64; torchvision's RetinaNet computes maps after stride 32 by strided convolutions.
    Canvases smaller than 512 pixels also get a map of stride 4, because the anchors at stride 8 are too large for them.
    """

    family = "retinanet"
    anchor_sides = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))  # section 4 of the paper
    first_label = 0  # there is no class for the background
    heads = "classification_head."
    class_layers = ("model.head.classification_head.cls_logits.",)

    def finest(self, recipe: DetectorRecipe) -> int:
        return 4 if recipe.image_size < SMALL_SIDE else 8

    def build(self, recipe: DetectorRecipe, pyramid: Pyramid, anchors: AnchorGenerator) -> Any:
        head = RetinaNetHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes=len(self.classes))
        for branch in (head.classification_head, head.regression_head):
            branch.conv = _HiddenLayers(*branch.conv)
        if recipe.box_loss:
            head.regression_head._loss_type = recipe.box_loss
        return RetinaNet(
            pyramid,
            num_classes=len(self.classes),
            anchor_generator=anchors,
            head=head,
            score_thresh=recipe.min_score,
            nms_thresh=recipe.nms_iou,
            detections_per_img=recipe.max_detections,
            topk_candidates=recipe.proposals,
        )


class _HiddenLayers(HalfPrecision, nn.Sequential):
    """Hidden convolutions of RetinaNet's class head or box head, in half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_half_precision(lambda: [super(_HiddenLayers, self).forward(x)], x.device)[0]
