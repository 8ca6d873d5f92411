"""Faster R-CNN with a feature pyramid on any timm backbone whose features come at strides 4, 8, 16 and 32."""

from collections import OrderedDict
from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import timm
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kitlib.bundle import BundleError, read_weights
from kitlib.device import autocast
from kitlib.recipes import DetectorRecipe, from_dict, override

STRIDES = (4, 8, 16, 32)  # of the backbone's features; max pooling of the last adds 64
# An anchor's side in strides of its map: torchvision's, and two smaller ones for canvases that use the finest maps only.
ANCHOR_SIDES = (8 / 2, 8 / 2**0.5, 8)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width


class Pyramid(nn.Module):
    """A timm backbone's features, brought to `out_channels` by a feature pyramid.

    `strides` are those of its maps: 4 upwards, as long as the largest anchor is at most half of the canvas (one map at
    least). All four of the backbone's features flow into each.
    """

    def __init__(self, recipe: DetectorRecipe):
        super().__init__()
        self.body = _backbone(recipe)
        self.levels = _levels(recipe.backbone, self.body.feature_info.reduction())
        self.strides = [each for each in (*STRIDES, 64) if each == 4 or 2 * ANCHOR_SIDES[-1] * each <= recipe.image_size]
        self.out_channels = recipe.fpn_channels
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork([channels[level] for level in self.levels], self.out_channels, LastLevelMaxPool())

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
            # Equal to the canvas: torchvision's own resizing is by a factor of one, at training and at prediction.
            min_size=recipe.image_size,
            max_size=recipe.image_size,
            image_mean=self.mean,
            image_std=self.std,
            rpn_anchor_generator=AnchorGenerator(
                tuple(tuple(side * stride for side in ANCHOR_SIDES) for stride in pyramid.strides),
                (ASPECT_RATIOS,) * len(pyramid.strides),
            ),
            rpn_pre_nms_top_n_train=2 * recipe.proposals,
            rpn_pre_nms_top_n_test=recipe.proposals,
            rpn_post_nms_top_n_train=recipe.proposals,
            rpn_post_nms_top_n_test=recipe.proposals,
            # Not from the pooled map, as in torchvision.
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"][: len(pyramid.strides)], output_size=7, sampling_ratio=2),
            box_head=TwoMLPHead(recipe.fpn_channels * 7 * 7, recipe.box_hidden),
            box_predictor=FastRCNNPredictor(recipe.box_hidden, 2),  # background, opacity
            box_batch_size_per_image=recipe.box_samples,
            box_score_thresh=recipe.min_score,
            box_nms_thresh=recipe.nms_iou,
            box_detections_per_img=recipe.max_detections,
        )

    def losses(self, pixels: torch.Tensor, boxes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The four losses of a batch: `pixels` uint8 (n, side, side), `boxes` n float tensors (k, 4) in canvas pixels.

        An image without boxes is (0, 4): all of it is background. Only in training mode.
        """
        targets = [
            {"boxes": each, "labels": torch.ones(len(each), dtype=torch.int64, device=each.device)}
            for each in (each.reshape(-1, 4).to(pixels.device, torch.float32) for each in boxes)
        ]
        with torch.autocast(pixels.device.type, enabled=False):
            return self.model(self._images(pixels), targets)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """For canvases uint8 (n, side, side), n float arrays (k, 5): xmin, ymin, xmax, ymax in canvas pixels and score 0..1,
        best first, k at most `max_detections`."""
        self.model.eval()
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.model(self._images(pixels))
        return [torch.cat([each["boxes"], each["scores"][:, None]], dim=1).cpu().numpy() for each in found]

    def _images(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        side = self.recipe.image_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"wants uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        images = pixels.to(next(self.parameters()).device)[:, None].expand(-1, self.recipe.channels, -1, -1)
        return list(images.float() / 255)


def load(record: dict, state_dict: dict[str, torch.Tensor], device: torch.device) -> FasterRCNNDetector:
    """A detector from a bundle's record and weights, ready to predict on `device`. Raises where the weights do not fit."""
    recipe = from_dict(DetectorRecipe, record["recipe"])
    detector = FasterRCNNDetector(override(recipe, starting_weights=""))
    detector.load_state_dict(state_dict, strict=True)
    return detector.eval().to(device, memory_format=torch.channels_last)


def _backbone(recipe: DetectorRecipe) -> nn.Module:
    if not timm.is_model(recipe.backbone):
        near = get_close_matches(recipe.backbone.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(f"timm has no backbone {recipe.backbone!r}; near: {', '.join(near) or 'nothing'}")
    if not recipe.starting_weights:
        return timm.create_model(recipe.backbone, pretrained=False, features_only=True, in_chans=recipe.channels)
    weights = read_weights(recipe.starting_weights)
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
    # timm itself renames them for features_only and sums the first convolution for a grey input.
    overlay = {"state_dict": weights}
    return timm.create_model(
        recipe.backbone, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, in_chans=recipe.channels
    )


def _levels(backbone: str, strides: list[int]) -> list[int]:
    """Which of the backbone's features are the pyramid's, one a stride."""
    if not set(STRIDES) <= set(strides):
        raise ValueError(f"backbone {backbone!r} gives features at strides {strides}; Faster R-CNN needs {STRIDES}")
    return [strides.index(stride) for stride in STRIDES]


def _normalisation(body: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """The backbone's own mean and spread (for pixels 0..1), averaged over its channels where the input is grey."""
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    if channels == len(mean):
        return list(mean), list(std)
    return [float(np.mean(mean))] * channels, [float(np.mean(std))] * channels
