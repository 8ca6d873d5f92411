"""YOLO of any generation that ultralytics builds from a model YAML, without ultralytics' pickles, downloads or telemetry."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_convert, nms

from kitlib.bundle import BundleError, load_starting_weights
from kitlib.recipes import DetectorRecipe, from_dict, override

# Read by ultralytics when it is imported: without them it asks the network, for up to 20 seconds where there is none.
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "False")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / f"ultralytics_{os.getuid()}"))
os.environ.setdefault("YOLO_VERBOSE", "False")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)

from ultralytics.nn.tasks import DetectionModel, yaml_model_load  # noqa: E402
from ultralytics.utils import SETTINGS  # noqa: E402

SETTINGS["sync"] = False  # telemetry

CANDIDATES = 3000  # boxes an image, best first, that reach non-maximum suppression


class YoloDetector(nn.Module):
    """Takes canvases as they are: grey uint8 of the recipe's size, tripled and scaled to 0..1 here and nowhere else."""

    family = "yolo"
    mean, std = [0.0] * 3, [1.0] * 3

    def __init__(self, recipe: DetectorRecipe, model: DetectionModel | None = None):
        """`model`: a network that is already built, such as training's moving average; otherwise the recipe's."""
        super().__init__()
        self.recipe = recipe
        if model is not None:
            self.model = model
            return
        self.model = DetectionModel(_architecture(recipe), ch=3, nc=1, verbose=False)
        stride = int(self.model.stride.max())
        if recipe.image_size % stride:
            raise ValueError(
                f"recipe.image_size {recipe.image_size} is no multiple of {stride}, the grid of {recipe.backbone!r}; "
                f"take {max(1, round(recipe.image_size / stride)) * stride}"
            )
        if recipe.starting_weights:
            report = load_starting_weights(self, recipe.starting_weights, prefix="model.")
            # Another count of classes costs the head's last layers alone.
            if len(report["random"]) > 0.1 * len(self.state_dict()):
                raise BundleError(
                    f"{recipe.starting_weights} lacks {len(report['random'])} tensors of {recipe.backbone!r}, such as "
                    f"{report['random'][0]}; name weights of that very model"
                )

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """For canvases uint8 (n, side, side), n float arrays (k, 5): xmin, ymin, xmax, ymax in canvas pixels and score 0..1,
        best first, k at most `max_detections`."""
        side = self.recipe.image_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"wants uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        self.model.eval()
        device = next(self.parameters()).device
        images = pixels.to(device)[:, None].expand(-1, 3, -1, -1).float() / 255
        # float16 places a box within a quarter of a pixel; bfloat16 would be off by two.
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            output = self.model(images)
        return [self._best(each).cpu().numpy() for each in self._candidates(output)]

    def _candidates(self, output: tuple | torch.Tensor) -> list[torch.Tensor]:
        """Boxes (n, any, 5) of the head's raw output: corners in canvas pixels, score."""
        output = output[0] if isinstance(output, tuple) else output
        if self.model.end2end:  # (n, boxes, 6): corners, score, class
            return list(output[..., :5])
        output = output.transpose(1, 2)  # (n, boxes, 5): centre, size, score of the one class
        return list(torch.cat([box_convert(output[..., :4], "cxcywh", "xyxy"), output[..., 4:5]], dim=-1))

    def _best(self, boxes: torch.Tensor) -> torch.Tensor:
        # Not ultralytics' own suppression: it stops at a time limit, so that a slow machine silently loses boxes.
        boxes = boxes.float()
        boxes = boxes[boxes[:, 4] >= self.recipe.min_score]
        boxes = boxes[boxes[:, 4].argsort(descending=True, stable=True)[:CANDIDATES]]
        boxes[:, :4] = boxes[:, :4].clamp(0, self.recipe.image_size)
        boxes = boxes[(boxes[:, 2:4] > boxes[:, :2]).all(dim=1)]
        return boxes[nms(boxes[:, :4], boxes[:, 4], self.recipe.nms_iou)[: self.recipe.max_detections]]


def load(record: dict, state_dict: dict[str, torch.Tensor], device: torch.device) -> YoloDetector:
    """A detector from a bundle's record and weights, ready to predict on `device`. Raises where the weights do not fit."""
    detector = YoloDetector(override(from_dict(DetectorRecipe, record["recipe"]), starting_weights=""))
    detector.load_state_dict(state_dict, strict=True)
    return detector.eval().to(device)


def _architecture(recipe: DetectorRecipe) -> dict:
    """ultralytics' description of the named model, its channels multiplied by the recipe's width."""
    try:
        architecture = yaml_model_load(f"{recipe.backbone}.yaml")
    except FileNotFoundError as error:
        raise ValueError(f"ultralytics has no model {recipe.backbone!r}; try yolov5lu or yolo11n") from error
    if recipe.width == 1:
        return architecture
    if "scales" not in architecture:
        raise ValueError(f"{recipe.backbone!r} has one width only; recipe.width {recipe.width} needs one such as yolo11n")
    depth, width, most = architecture["scales"][architecture["scale"]]
    return {**architecture, "scales": {architecture["scale"]: [depth, width * recipe.width, most]}}
