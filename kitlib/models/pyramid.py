"""Base of torchvision's detectors with a feature pyramid on a timm backbone: input, losses, predictions and weights."""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from torch import nn
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kitlib.classes import ONE_FINDING
from kitlib.device import RECORDED, autocast
from kitlib.errors import BundleError
from kitlib.models.backbones import check_backbone
from kitlib.models.starting_weights import (
    check_random,
    differ_in_classes,
    load_starting_weights,
    read_starting_weights,
)
from kitlib.recipes.fields import DetectorRecipe

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32, 64)  # strides of the pyramid's maps; the last map may be pooled from the one before
BACKBONE_STRIDES = (4, 8, 16, 32)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width


class HalfPrecision:
    """Base class of a detector's half-precision parts, which take nearly all of its computing time.

    The other layers, which predict offsets and scores, compute in float32: bfloat16 coordinates would be off by four pixels.
    """

    training: bool
    overflows = 0  # number of calls that overflowed in half precision and were computed again in float32

    def in_half_precision(self, compute: Callable[[], list[torch.Tensor]], device: torch.device) -> list[torch.Tensor]:
        """Call `compute` under autocast, and return its results as float32.

        Prediction uses float16, because bfloat16 has an eighth of its precision. If a result is not finite, all results are
        computed again in float32, because float16 ends at 65,504. In training, the gradient scaler skips batches that
        overflow.
        """
        with autocast(device, "" if self.training else RECORDED["16-mixed"]):
            results = compute()
        if not self.training and not torch.stack([result.isfinite().all() for result in results]).all():
            self.overflows += 1
            results = compute()
        return [result.float() for result in results]


class Pyramid(HalfPrecision, nn.Module):
    """A timm backbone and a feature pyramid over its features; each map of the pyramid has `out_channels` channels.

    `strides` lists the strides of the returned maps: `finest` (4 or 8) and further strides up to 64. A map's largest anchor
    is `largest_anchor` strides wide. A further map is returned only if its largest anchor is at most half as wide as the
    canvas. Even if fewer maps are returned, the pyramid uses the backbone's features at all strides from `finest` to 32.
    """

    body: Any  # timm's networks have no common type that declares their common attributes

    def __init__(self, recipe: DetectorRecipe, finest: int, largest_anchor: float):
        super().__init__()
        self.body = _backbone(recipe)
        self.levels = _feature_indices(recipe.backbone, self.body.feature_info.reduction(), finest)
        strides = [stride for stride in STRIDES if stride >= finest][: len(self.levels) + 1]
        half = recipe.image_size / 2
        self.strides = [stride for stride in strides if stride == finest or largest_anchor * stride <= half]
        self.out_channels = recipe.fpn_channels
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork([channels[level] for level in self.levels], self.out_channels, LastLevelMaxPool())
        # Unused maps are frozen, because training in several processes would wait for their gradients.
        self.fpn.layer_blocks[len(self.strides) :].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the pyramid's maps for images (n, channels, height, width): a dictionary keyed by level, finest first.

        Each map is float32 (n, out_channels, rows, columns).
        """
        names = [str(level) for level in range(len(self.strides))]
        return OrderedDict(zip(names, self.in_half_precision(lambda: self._maps(images), images.device), strict=True))

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(images)
        maps = self.fpn(OrderedDict((str(index), features[level]) for index, level in enumerate(self.levels)))
        return list(maps.values())[: len(self.strides)]


class PyramidDetector(nn.Module, ABC):
    """Base class of torchvision's detectors with a Pyramid, for grey uint8 canvases of the recipe's size.

    The detector normalises the canvases itself. `classes` are the findings that it detects. Subclasses say how the detector
    is built from a pyramid and its anchors.
    """

    family: ClassVar[str]
    anchor_sides: ClassVar[tuple[float, ...]]  # in strides of their map
    first_label: ClassVar[int]  # of the first class in torchvision's targets
    heads: ClassVar[str]  # part of the names of a detector's head tensors, which a classifier's weights lack
    class_layers: ClassVar[tuple[str, ...]]  # layers that stay random if the starting weights are for other classes
    anchor_layers: ClassVar[tuple[str, ...]] = ()  # layers that stay random if the number of anchors differs

    def __init__(self, recipe: DetectorRecipe, classes: Sequence[str] = (ONE_FINDING,)):
        super().__init__()
        self.recipe, self.classes = recipe, tuple(classes)
        pyramid = Pyramid(recipe, self.finest(recipe), self.anchor_sides[-1])
        self.mean, self.std = _normalisation(pyramid.body, recipe.channels)
        sizes = tuple(tuple(side * stride for side in self.anchor_sides) for stride in pyramid.strides)
        self.model = self.build(recipe, pyramid, AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)))
        self.model.transform = _NormaliseOnly(recipe.image_size, self.mean, self.std)
        self.starting_weights = _load_weights(self, recipe)

    @abstractmethod
    def finest(self, recipe: DetectorRecipe) -> int:
        """Return the stride of the pyramid's first map, 4 or 8."""

    @abstractmethod
    def build(self, recipe: DetectorRecipe, pyramid: Pyramid, anchors: AnchorGenerator) -> Any:
        """Return torchvision's detector with the given pyramid and anchors."""

    @property
    def overflows(self) -> int:
        """Number of times that a part of the network overflowed in half precision and was computed again in float32."""
        return sum(part.overflows for part in self.modules() if isinstance(part, HalfPrecision))

    def losses(
        self, pixels: torch.Tensor, boxes: Sequence[torch.Tensor], findings: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return torchvision's losses, keyed by name, for canvases `pixels` uint8 (n, side, side) and their boxes.

        `boxes` contains one float tensor (k, 4) per canvas: xmin, ymin, xmax and ymax in canvas pixels; its shape is (0, 4)
        if the image has no box. `findings` contains one int64 tensor (k,) per canvas: the boxes' classes, as indices of
        `classes`. Requires training mode. Raises ValueError unless the side is the recipe's `image_size`.
        """
        targets = [
            {"boxes": image_boxes.to(pixels.device, torch.float32), "labels": codes.to(pixels.device) + self.first_label}
            for image_boxes, codes in zip(boxes, findings, strict=True)
        ]
        with torch.autocast(pixels.device.type, enabled=False):
            return self.model(self._images(pixels, self.recipe.image_size), targets)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """Detect boxes on canvases uint8 (n, side, side); return one float array (k, 6) per canvas, highest score first.

        Columns are xmin, ymin, xmax, ymax in canvas pixels, the score 0..1 and the index of the box's class in `classes`; k
        is at most `max_detections`. `side` must be the recipe's `inference_size` or, if `inference_size` is 0, `image_size`.
        Raises ValueError for other sizes or types.
        """
        self.model.eval()
        with torch.autocast(pixels.device.type, enabled=False):
            outputs = self.model(self._images(pixels, self.recipe.inference_size or self.recipe.image_size))
        return [
            torch.column_stack([output["boxes"], output["scores"], output["labels"] - self.first_label]).cpu().numpy()
            for output in outputs
        ]

    def _images(self, pixels: torch.Tensor, side: int) -> list[torch.Tensor]:
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"expected uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        images = pixels.to(next(self.parameters()).device)[:, None].expand(-1, self.recipe.channels, -1, -1)
        return list(images.float() / 255)


class _NormaliseOnly(GeneralizedRCNNTransform):
    """torchvision's input transform without its resizing: canvases are normalised and keep their size."""

    def __init__(self, side: int, mean: list[float], std: list[float]) -> None:
        super().__init__(side, side, mean, std)
        # Buffers, because torchvision copies the lists to the GPU for every image. Not in weights files, which lack them.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        return image, target


def _backbone(recipe: DetectorRecipe) -> Any:
    check_backbone(recipe.backbone)
    return timm.create_model(recipe.backbone, pretrained=False, features_only=True, in_chans=recipe.channels)


def _feature_indices(backbone: str, strides: list[int], finest: int) -> list[int]:
    """Return the positions in `strides` of the pyramid's input features: from `finest` to 16, and 32 if available.

    `strides` lists the strides of all features of `backbone`. Raises ValueError if 4, 8 or 16 is missing.
    """
    if not set(BACKBONE_STRIDES[:3]) <= set(strides):
        raise ValueError(f"backbone {backbone!r} has features at strides {strides}, but a feature pyramid needs 4, 8 and 16")
    return [strides.index(stride) for stride in BACKBONE_STRIDES if finest <= stride and stride in strides]


def _normalisation(body: Any, channels: int) -> tuple[list[float], list[float]]:
    """Return each channel's mean and standard deviation for normalising pixels 0..1.

    timm records these values for the backbone `body`; for grey input, they are averaged over the colours.
    """
    mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
    if channels == len(mean):
        return list(mean), list(std)
    return [float(np.mean(mean))] * channels, [float(np.mean(std))] * channels


def _load_weights(detector: PyramidDetector, recipe: DetectorRecipe) -> str:
    """Load the recipe's starting weights into `detector` and return a summary, "from scratch" if there are none.

    The weights are those of a whole detector of the same family, such as torchvision's for COCO, or of a classifier with the
    same backbone. Raises BundleError if a classifier's weights lack tensors of the backbone, or if a detector's weights lack
    tensors outside `class_layers` and `anchor_layers`.
    """
    if not recipe.starting_weights:
        return "from scratch"
    weights = read_starting_weights(recipe.starting_weights)
    if any(detector.heads in name for name in weights):
        source, layers = recipe.starting_weights, detector.class_layers
        report = load_starting_weights(
            detector, source, "model.", layers if differ_in_classes(source, detector.classes) else ()
        )
        layers += detector.anchor_layers
        check_random([name for name in report["random"] if not name.startswith(layers)], detector, recipe)
        return f"{recipe.starting_weights}: {len(report['loaded'])} tensors, {len(report['random'])} left random"
    body = detector.model.backbone.body
    backbone_weights = {name: tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    weights = {name.removeprefix("backbone."): tensor for name, tensor in (backbone_weights or weights).items()}
    with torch.device("meta"):
        expected = timm.create_model(recipe.backbone, num_classes=0).state_dict()
    missing = [name for name in expected if name not in weights]
    if missing:
        raise BundleError(
            f"{recipe.starting_weights} lacks {len(missing)} of the {len(expected)} tensors of {recipe.backbone!r}, such as "
            f"{missing[0]}; choose weights of exactly that backbone"
        )
    first_convolution = body.pretrained_cfg["first_conv"]
    first_convolution = f"{first_convolution[0] if isinstance(first_convolution, tuple) else first_convolution}.weight"
    if weights[first_convolution].shape[1] == 1 and recipe.channels == 3:
        # The reverse of timm's rule, which sums the colours' weights for grey input: each colour gets a third of the sum.
        weights[first_convolution] = weights[first_convolution].expand(-1, 3, -1, -1) / 3
    # timm renames the tensors for features_only while it loads them.
    loaded = timm.create_model(
        recipe.backbone,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": weights},
        features_only=True,
        in_chans=recipe.channels,
    )
    body.load_state_dict(loaded.state_dict())
    summary = f"{recipe.starting_weights}: {len(expected)} tensors of the backbone; pyramid and heads left random"
    logger.info("starting weights %s; unused tensors: %d", summary, len(set(weights) - set(expected)))
    return summary
