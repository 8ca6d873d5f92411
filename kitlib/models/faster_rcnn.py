"""Faster R-CNN with a feature pyramid on any timm backbone with features at strides 4, 8 and 16, and possibly 32."""

from typing import Any

import torch
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign, complete_box_iou_loss

from kitlib.models.pyramid import HalfPrecision, Pyramid, PyramidDetector
from kitlib.recipes.fields import DetectorRecipe


class _ProposalHead(HalfPrecision, RPNHead):
    """torchvision's head of the region proposal network, with its hidden convolution in half precision."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        hidden = self.in_half_precision(lambda: [self.conv(level) for level in x], x[0].device)
        return [self.cls_logits(level) for level in hidden], [self.bbox_pred(level) for level in hidden]


class _BoxHead(HalfPrecision, TwoMLPHead):
    """torchvision's hidden layers of Faster R-CNN's second stage, in half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_half_precision(lambda: [super(_BoxHead, self).forward(x)], x.device)[0]


class FasterRCNNDetector(PyramidDetector):
    """Faster R-CNN for grey uint8 canvases of the recipe's size."""

    family = "faster_rcnn"
    # torchvision's anchors (8 strides wide), and two smaller ones for small canvases, which use few maps.
    anchor_sides = (8 / 2, 8 / 2**0.5, 8)
    first_label = 1  # 0 is the background
    heads = "roi_heads."
    class_layers = ("model.roi_heads.box_predictor.",)
    anchor_layers = ("model.rpn.head.cls_logits.", "model.rpn.head.bbox_pred.")

    def finest(self, recipe: DetectorRecipe) -> int:
        return 4

    def build(self, recipe: DetectorRecipe, pyramid: Pyramid, anchors: AnchorGenerator) -> Any:
        model = FasterRCNN(
            pyramid,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=2 * recipe.proposals,
            rpn_pre_nms_top_n_test=recipe.proposals,
            rpn_post_nms_top_n_train=recipe.proposals,
            rpn_post_nms_top_n_test=recipe.proposals,
            # As in torchvision, boxes are not pooled from the last map, which is itself pooled.
            box_roi_pool=MultiScaleRoIAlign(
                [str(level) for level in range(min(len(pyramid.levels), len(pyramid.strides)))],
                output_size=7,
                sampling_ratio=2,
            ),
            box_head=_BoxHead(recipe.fpn_channels * 7 * 7, recipe.box_hidden),
            box_predictor=FastRCNNPredictor(recipe.box_hidden, 1 + len(self.classes)),  # the background and the classes
            # After the other heads, as torchvision does: the same seed gives the same weights.
            rpn_head=_ProposalHead(recipe.fpn_channels, anchors.num_anchors_per_location()[0]),
            box_batch_size_per_image=recipe.box_samples,
            box_score_thresh=recipe.min_score,
            box_nms_thresh=recipe.nms_iou,
            box_detections_per_img=recipe.max_detections,
        )
        if recipe.box_loss == "ciou":
            model.roi_heads = _CompleteIoU.like(model.roi_heads)
        return model


class _CompleteIoU(RoIHeads):
    """Faster R-CNN's second stage, trained with the CIoU loss of boxes (Zheng et al. 2020), not with smooth L1 loss."""

    @classmethod
    def like(cls, heads: RoIHeads) -> "_CompleteIoU":
        """Return an instance with the layers and settings of `heads`."""
        matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
        return cls(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            None,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
        )

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        chosen, _, labels_by_image, offsets_by_image = self.select_training_samples(proposals, targets)
        scores, predicted = self.box_predictor(self.box_head(self.box_roi_pool(features, chosen, image_shapes)))
        labels, offsets, regions = map(torch.cat, (labels_by_image, offsets_by_image, chosen))
        is_box = labels > 0
        # Each class has its own four offsets.
        of_class = predicted.unflatten(1, (-1, 4))[is_box, labels[is_box]]
        predicted, true = (self.box_coder.decode_single(encoded, regions[is_box]) for encoded in (of_class, offsets[is_box]))
        loss = complete_box_iou_loss(predicted, true, reduction="sum") / labels.numel()
        return [], {"loss_classifier": functional.cross_entropy(scores, labels), "loss_box_reg": loss}
