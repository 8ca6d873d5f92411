"""YOLOs of any generation, built from ultralytics' model YAMLs, without its pickles, downloads and telemetry."""

import os
import re
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou_loss, nms

from kitlib.classes import ONE_FINDING
from kitlib.device import precision
from kitlib.models.backbones import import_own_backbones
from kitlib.models.starting_weights import check_random, differ_in_classes, load_starting_weights
from kitlib.recipes.fields import BOX_LOSSES, DetectorRecipe

# ultralytics reads these variables when it is imported. Without them it tries to connect, for up to 20 seconds if offline.
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "False")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / f"ultralytics_{os.getuid()}"))
os.environ.setdefault("YOLO_VERBOSE", "False")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)

from ultralytics.nn.tasks import DetectionModel, guess_model_scale  # noqa: E402
from ultralytics.utils import ROOT, SETTINGS, YAML  # noqa: E402
from ultralytics.utils.loss import BboxLoss, E2ELoss  # noqa: E402

SETTINGS["sync"] = False  # telemetry

HEADS = ("Detect", "v10Detect")  # the last layers that predict boxes in pixels, and nothing else
CANDIDATES = 3000  # number of the best pairs of box and class per image that enter non-maximum suppression

# Custom networks, keyed by name; values are dictionaries in the format of ultralytics' YAML files. The modules that
# `import_own_backbones` imports add entries.
ARCHITECTURES: dict[str, dict[str, Any]] = {}


class GeneralisedIoU(BboxLoss):
    """ultralytics' box loss with GIoU (Rezatofighi et al. 2019) instead of CIoU (Heidelberg report, section 3.2)."""

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the box loss and the distribution loss; the arguments are those of ultralytics' BboxLoss.forward."""
        _, distribution = super().forward(*arguments)
        _, predicted, _, true, scores, scores_sum, is_box, *_ = arguments
        loss = generalized_box_iou_loss(predicted[is_box].float(), true[is_box].float()) * scores[is_box].sum(-1)
        return loss.sum() / scores_sum, distribution


class Network(DetectionModel):
    """ultralytics' network with the recipe's box loss."""

    box_loss = BOX_LOSSES["yolo"][0]

    def init_criterion(self) -> Any:
        """Return ultralytics' criterion; if `box_loss` is "giou", GeneralisedIoU replaces the criterion's box loss."""
        criterion = super().init_criterion()
        if self.box_loss == "giou":
            parts = [criterion.one2many, criterion.one2one] if isinstance(criterion, E2ELoss) else [criterion]
            for part in parts:
                part.bbox_loss = GeneralisedIoU(part.reg_max).to(part.device)
        return criterion


class YoloDetector(nn.Module):
    """YOLO for grey uint8 canvases of the recipe's size. Pixels are scaled to 0..1 and repeated over three channels.

    `classes` are the findings to detect.
    """

    family = "yolo"
    mean, std = [0.0] * 3, [1.0] * 3

    def __init__(self, recipe: DetectorRecipe, classes: Sequence[str] = (ONE_FINDING,), model: DetectionModel | None = None):
        """Build the recipe's network, or wrap `model`, an existing network such as a moving average of weights.

        Raises ValueError if the recipe's `image_size` or `inference_size` is not a multiple of the built network's stride,
        and BundleError if its starting weights lack tensors of the backbone.
        """
        super().__init__()
        self.recipe, self.classes = recipe, tuple(classes)
        self.overflows = 0  # number of batches that overflowed in half precision and were predicted again in float32
        if model is not None:
            self.model = model
            return
        self.model = Network(_architecture(recipe), ch=3, nc=len(self.classes), verbose=False)
        self.model.box_loss = recipe.box_loss or BOX_LOSSES["yolo"][0]
        stride = int(self.model.stride.max())
        for name in ("image_size", "inference_size"):
            side = getattr(recipe, name)
            if side % stride:
                raise ValueError(
                    f"recipe.{name} is {side}, which is not a multiple of {stride}, the stride of {recipe.backbone!r}; "
                    f"choose {max(1, round(side / stride)) * stride}"
                )
        self.starting_weights = self._load_weights()

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """Detect boxes; return one float array (k, 6) per canvas of `pixels`, uint8 (n, side, side), highest score first.

        Columns are xmin, ymin, xmax, ymax in canvas pixels, the score 0..1 and the index of the box's class in `classes`. A
        box with several likely classes has a row for each class. k is at most `max_detections`. `side` must be the recipe's
        `inference_size`; if that is 0, the recipe's `image_size`. Raises ValueError for other sizes or types.
        """
        side = self.recipe.inference_size or self.recipe.image_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"expected uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        self.model.eval()
        device = next(self.parameters()).device
        images = pixels.to(device)[:, None].expand(-1, 3, -1, -1).float() / 255
        # float16 coordinates are precise to a quarter of a pixel; bfloat16 would be off by two pixels.
        with torch.autocast(device.type, torch.float16, enabled=precision(device) != "32-true"):
            output = self.model(images)[0]
        if not output.isfinite().all():  # float16 ends at 65,504
            self.overflows += 1
            output = self.model(images)[0]
        return [self._suppress(boxes).cpu().numpy() for boxes in self._candidates(output)]

    def _load_weights(self) -> str:
        """Load the recipe's starting weights and return a summary, "from scratch" if there are none.

        Raises BundleError if the weights lack tensors of the backbone.
        """
        source = self.recipe.starting_weights
        if not source:
            return "from scratch"
        left_out = self._class_layers() if differ_in_classes(source, self.classes) else ()
        report = load_starting_weights(self, source, "model.", left_out)
        backbone = tuple(f"model.model.{layer}." for layer in range(len(self.model.yaml["backbone"])))
        check_random([name for name in report["random"] if name.startswith(backbone)], self, self.recipe)
        return f"{source}: {len(report['loaded'])} tensors, {len(report['random'])} left random"

    def _class_layers(self) -> tuple[str, ...]:
        """Return the prefixes of the tensor names of the last layers, which have one output per class."""
        last = len(self.model.model) - 1
        branches = {name: getattr(self.model.model[-1], name, ()) for name in ("cv3", "one2one_cv3")}
        return tuple(
            f"model.model.{last}.{name}.{number}.{len(layers) - 1}."
            for name, maps in branches.items()
            for number, layers in enumerate(maps)
        )

    def _candidates(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Convert the head's output; return one tensor (candidates, 6) per image: xmin, ymin, xmax, ymax, score, class.

        Each pair of box and class whose score is at least the recipe's `min_score` is a candidate.
        """
        output, least = output.float(), self.recipe.min_score
        if self.model.end2end:  # (n, candidates, 6)
            return [rows[rows[:, 4] >= least] for rows in output]
        boxes, scores = output.transpose(1, 2).split([4, len(self.classes)], dim=-1)  # (n, boxes, 4): centre, size
        boxes, candidates = box_convert(boxes, "cxcywh", "xyxy"), []
        for image_boxes, image_scores in zip(boxes, scores, strict=True):
            row, code = (image_scores >= least).nonzero(as_tuple=True)
            candidates.append(torch.column_stack([image_boxes[row], image_scores[row, code], code]))
        return candidates

    def _suppress(self, boxes: torch.Tensor) -> torch.Tensor:
        """Reduce one image's candidates (boxes, 6) to its detections (k, 6), highest score first.

        The columns are those of `_candidates`. Boxes are clipped to the canvas. Non-maximum suppression with the recipe's
        `nms_iou` is applied to the boxes of each class; of what remains, the best `max_detections` are kept.
        """
        # ultralytics' own suppression is not used: it stops at a time limit and silently loses boxes on slow machines.
        boxes = boxes[boxes[:, 4].argsort(descending=True, stable=True)[:CANDIDATES]]
        side = self.recipe.inference_size or self.recipe.image_size
        boxes[:, :4] = boxes[:, :4].clamp(0, side)
        boxes = boxes[(boxes[:, 2:4] > boxes[:, :2]).all(dim=1)]
        apart = boxes[:, :4] + boxes[:, 5:] * (side + 1)  # so that boxes of different classes do not overlap
        return boxes[nms(apart, boxes[:, 4], self.recipe.nms_iou)[: self.recipe.max_detections]]


def _architecture(recipe: DetectorRecipe) -> dict[str, Any]:
    """Return ultralytics' description (YAML content) of the recipe's model, with channels multiplied by `recipe.width`.

    Raises ValueError for an unknown model, for a model whose last layer is not one of HEADS, and for a width other than 1 if
    the model has a fixed width.
    """
    import_own_backbones()
    name = recipe.backbone
    architecture = deepcopy(ARCHITECTURES[name]) if name in ARCHITECTURES else read_architecture(name)
    head = architecture["head"][-1][2]
    if head not in HEADS:
        raise ValueError(
            f"the last layer of {name!r} is {head}, but the kit supports only {' and '.join(HEADS)} (RT-DETR, for example, "
            "is trained differently); choose a model such as yolov5lu, yolov8x or yolo11n"
        )
    if recipe.width == 1:
        return architecture
    if "scales" not in architecture:
        raise ValueError(f"{name!r} has a fixed width, but recipe.width is {recipe.width}; choose a model such as yolo11n")
    depth, width, max_channels = architecture["scales"][architecture["scale"]]
    return {**architecture, "scales": {architecture["scale"]: [depth, width * recipe.width, max_channels]}}


def read_architecture(name: str) -> dict[str, Any]:
    """Return the configuration of the model `name`, read from a YAML file inside ultralytics' package.

    `name` may come from an untrusted bundle. So ultralytics' own `yaml_model_load` is not used: it prefers files in the
    current folder, and evaluates parts of them as code. Raises ValueError if the package has no such file.
    """
    configurations = {path.stem: path for path in (ROOT / "cfg" / "models").rglob("*.yaml")}
    stem = re.sub(r"(yolov[58][nsmlx])6", r"\1-p6", name)
    without_scale = re.sub(r"(\d+)([nslmx])(.+)?$", r"\1\3", stem)
    # The "u" in names of v3 and v5 models means a newer head; it is not part of the file names.
    for candidate in (stem, stem.removesuffix("u"), without_scale, without_scale.removesuffix("u")):
        if candidate in configurations:
            architecture = YAML.load(configurations[candidate])
            return {**architecture, "scale": guess_model_scale(f"{stem}.yaml"), "yaml_file": f"{stem}.yaml"}
    raise ValueError(f"ultralytics has no model {name!r}; choose one such as yolov5lu or yolo11n")
