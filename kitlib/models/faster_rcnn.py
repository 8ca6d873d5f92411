"""Faster R-CNN with a feature pyramid on any timm backbone whose features come at strides 4, 8 and 16 (and 32)."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, complete_box_iou_loss
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kitlib.device import autocast
from kitlib.errors import BundleError
from kitlib.models.backbones import check_backbone
from kitlib.models.starting_weights import load_starting_weights, read_starting_weights
from kitlib.recipes.fields import DetectorRecipe

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's maps; the last of them may be pooled from the one before
BACKBONE_STRIDES = (4, 8, 16, 32)
# An anchor's side in strides of its map: torchvision's, and two smaller ones for canvases that use the finest maps only.
ANCHOR_SIDES = (8 / 2, 8 / 2**0.5, 8)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width


class Pyramid(nn.Module):
    """A timm backbone's features, brought to `out_channels` by a feature pyramid.

    `strides` are those of its maps: 4 upwards, as long as the largest anchor is at most half of the canvas (one map at
    least). All of the backbone's features flow into each.
    """

    body: Any  # timm's, as in kitlib.models.classifier

    def __init__(self, recipe: DetectorRecipe):
        super().__init__()
        self.body = _backbone(recipe)
        self.levels = _levels(recipe.backbone, self.body.feature_info.reduction())
        strides = STRIDES[: len(self.levels) + 1]
        self.strides = [each for each in strides if each == 4 or 2 * ANCHOR_SIDES[-1] * each <= recipe.image_size]
        self.out_channels = recipe.fpn_channels
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork([channels[level] for level in self.levels], self.out_channels, LastLevelMaxPool())
        # No loss reaches the layers of the maps that are left out; several processes would wait for their gradients.
        self.fpn.layer_blocks[len(self.strides) :].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        with autocast(images.device):
            features = self.body(images)
            maps = self.fpn(OrderedDict((str(place), features[level]) for place, level in enumerate(self.levels)))
        # Half precision ends here: bfloat16 coordinates would be off by four pixels.
        return OrderedDict((name, maps[name].float()) for name in list(maps)[: len(self.strides)])


class FasterRCNNDetector(nn.Module):
    """Takes canvases as they are: grey uint8 of the recipe's size, scaled and normalised here and nowhere else."""

    family = "faster_rcnn"

    def __init__(self, recipe: DetectorRecipe):
        super().__init__()
        self.recipe = recipe
        pyramid = Pyramid(recipe)
        self.mean, self.std = _normalisation(pyramid.body, recipe.channels)
        self.model = FasterRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(
                tuple(tuple(side * stride for side in ANCHOR_SIDES) for stride in pyramid.strides),
                (ASPECT_RATIOS,) * len(pyramid.strides),
            ),
            rpn_pre_nms_top_n_train=2 * recipe.proposals,
            rpn_pre_nms_top_n_test=recipe.proposals,
            rpn_post_nms_top_n_train=recipe.proposals,
            rpn_post_nms_top_n_test=recipe.proposals,
            # Not from the pooled map, as in torchvision.
            box_roi_pool=MultiScaleRoIAlign(
                [str(place) for place in range(min(len(pyramid.levels), len(pyramid.strides)))],
                output_size=7,
                sampling_ratio=2,
            ),
            box_head=TwoMLPHead(recipe.fpn_channels * 7 * 7, recipe.box_hidden),
            box_predictor=FastRCNNPredictor(recipe.box_hidden, 2),  # background, opacity
            box_batch_size_per_image=recipe.box_samples,
            box_score_thresh=recipe.min_score,
            box_nms_thresh=recipe.nms_iou,
            box_detections_per_img=recipe.max_detections,
        )
        self.model.transform = _AsGiven(recipe.image_size, recipe.image_size, self.mean, self.std)
        if recipe.box_loss == "ciou":
            self.model.roi_heads = _CompleteIoU.like(self.model.roi_heads)
        self.starting_weights = _start(self, recipe)

    def losses(self, pixels: torch.Tensor, boxes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The four losses of a batch: `pixels` uint8 (n, side, side), `boxes` n float tensors (k, 4) in canvas pixels.

        An image without boxes is (0, 4): all of it is background. Only in training mode.
        """
        targets = [
            {"boxes": each, "labels": torch.ones(len(each), dtype=torch.int64, device=each.device)}
            for each in (each.reshape(-1, 4).to(pixels.device, torch.float32) for each in boxes)
        ]
        with torch.autocast(pixels.device.type, enabled=False):
            return self.model(self._images(pixels, self.recipe.image_size), targets)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """For canvases uint8 (n, side, side), n float arrays (k, 5): xmin, ymin, xmax, ymax in canvas pixels and score 0..1,
        best first, k at most `max_detections`. The side is the recipe's `inference_size`, if it has one."""
        self.model.eval()
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.model(self._images(pixels, self.recipe.inference_size or self.recipe.image_size))
        return [torch.cat([each["boxes"], each["scores"][:, None]], dim=1).cpu().numpy() for each in found]

    def _images(self, pixels: torch.Tensor, side: int) -> list[torch.Tensor]:
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"wants uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        images = pixels.to(next(self.parameters()).device)[:, None].expand(-1, self.recipe.channels, -1, -1)
        return list(images.float() / 255)


class _AsGiven(GeneralizedRCNNTransform):
    """Normalises, and leaves every canvas at its own size."""

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        return image, target


class _CompleteIoU(RoIHeads):
    """torchvision's second stage with the CIoU loss of decoded boxes (Zheng et al. 2020) for smooth L1 of their offsets."""

    @classmethod
    def like(cls, heads: RoIHeads) -> "_CompleteIoU":
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
        scores, found = self.box_predictor(self.box_head(self.box_roi_pool(features, chosen, image_shapes)))
        labels, offsets, regions = map(torch.cat, (labels_by_image, offsets_by_image, chosen))
        boxed = labels > 0
        # Offsets of the one class beside the background.
        found, true = (self.box_coder.decode_single(each[boxed], regions[boxed]) for each in (found[:, 4:8], offsets))
        loss = complete_box_iou_loss(found, true, reduction="sum") / labels.numel()
        return [], {"loss_classifier": functional.cross_entropy(scores, labels), "loss_box_reg": loss}


def _backbone(recipe: DetectorRecipe) -> Any:
    check_backbone(recipe.backbone)
    return timm.create_model(recipe.backbone, pretrained=False, features_only=True, in_chans=recipe.channels)


def _start(detector: FasterRCNNDetector, recipe: DetectorRecipe) -> str:
    """Load the recipe's starting weights, of a Faster R-CNN or of a classifier's backbone; what was loaded, in words."""
    if not recipe.starting_weights:
        return "from scratch"
    weights = read_starting_weights(recipe.starting_weights)
    if any(name.startswith("model.roi_heads.") for name in weights):
        report = load_starting_weights(detector, recipe.starting_weights, prefix="")
        return f"{recipe.starting_weights}: {len(report['loaded'])} tensors, {len(report['random'])} left random"
    body = detector.model.backbone.body
    of_classifier = {name: each for name, each in weights.items() if name.startswith("backbone.")}
    weights = {name.removeprefix("backbone."): each for name, each in (of_classifier or weights).items()}
    with torch.device("meta"):
        wanted = timm.create_model(recipe.backbone, num_classes=0).state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise BundleError(
            f"{recipe.starting_weights} lacks {len(missing)} of the {len(wanted)} tensors of {recipe.backbone!r}, such as "
            f"{missing[0]}; name weights of that very backbone"
        )
    first = body.pretrained_cfg["first_conv"]
    first = f"{first[0] if isinstance(first, tuple) else first}.weight"
    if weights[first].shape[1] == 1 and recipe.channels == 3:
        # timm sums colours for a grey network; the other way round each colour takes a third.
        weights[first] = weights[first].expand(-1, 3, -1, -1) / 3
    # timm itself renames them for features_only.
    loaded = timm.create_model(
        recipe.backbone,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": weights},
        features_only=True,
        in_chans=recipe.channels,
    )
    body.load_state_dict(loaded.state_dict())
    told = f"{recipe.starting_weights}: {len(wanted)} tensors of the backbone; pyramid and heads left random"
    logger.info("starting weights %s; unused: %d", told, len(set(weights) - set(wanted)))
    return told


def _levels(backbone: str, strides: list[int]) -> list[int]:
    """Which of the backbone's features are the pyramid's, one a stride."""
    if not set(BACKBONE_STRIDES[:3]) <= set(strides):
        raise ValueError(f"backbone {backbone!r} gives features at strides {strides}; Faster R-CNN needs 4, 8 and 16")
    return [strides.index(stride) for stride in BACKBONE_STRIDES if stride in strides]


def _normalisation(body: Any, channels: int) -> tuple[list[float], list[float]]:
    """The backbone's own mean and spread (for pixels 0..1), averaged over its channels where the input is grey."""
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    if channels == len(mean):
        return list(mean), list(std)
    return [float(np.mean(mean))] * channels, [float(np.mean(std))] * channels
