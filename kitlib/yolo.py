"""YOLO of any generation that ultralytics builds from a model YAML, without ultralytics' pickles, downloads or telemetry."""

import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_convert, nms

from kitlib.recipes import DetectorRecipe, from_dict, override

# Read by ultralytics when it is imported: without them it asks the network, for up to 20 seconds where there is none.
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "False")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / f"ultralytics_{os.getuid()}"))
os.environ.setdefault("YOLO_VERBOSE", "False")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)

from safetensors.torch import load_file  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402
from ultralytics.utils import SETTINGS  # noqa: E402

SETTINGS["sync"] = False  # telemetry
log = logging.getLogger(__name__)

STRIDE = 32  # the coarsest grid: a canvas must be a multiple of it
CANDIDATES = 3000  # boxes an image, best first, that reach non-maximum suppression


class YoloDetector(nn.Module):
    """Takes canvases as they are: grey uint8 of the recipe's size, tripled and scaled to 0..1 here and nowhere else."""

    family = "yolo"
    mean, std = [0.0] * 3, [1.0] * 3

    def __init__(self, recipe: DetectorRecipe):
        super().__init__()
        if recipe.image_size % STRIDE:
            raise ValueError(
                f"image_size {recipe.image_size} of {recipe.backbone!r} is no multiple of {STRIDE}; "
                f"take {recipe.image_size // STRIDE * STRIDE or STRIDE}"
            )
        self.recipe = recipe
        self.model = build_model(recipe)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> list[np.ndarray]:
        """For canvases uint8 (n, side, side), n float arrays (k, 5): xmin, ymin, xmax, ymax in canvas pixels and score 0..1,
        best first, k at most `max_detections`."""
        side = self.recipe.image_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (side, side):
            raise ValueError(f"wants uint8 canvases (n, {side}, {side}), got {pixels.dtype} {tuple(pixels.shape)}")
        self.model.eval()
        images = pixels.to(next(self.parameters()).device)[:, None].expand(-1, 3, -1, -1).float() / 255
        return [self._best(each).float().cpu().numpy() for each in self._candidates(self.model(images))]

    def _candidates(self, output: tuple | torch.Tensor) -> list[torch.Tensor]:
        """Boxes (n, any, 5) of the head's raw output: corners in canvas pixels, score."""
        output = output[0] if isinstance(output, tuple) else output
        if self.model.end2end:  # (n, boxes, 6): corners, score, class
            return list(output[..., :5])
        output = output.transpose(1, 2)  # (n, boxes, 5): centre, size, score of the one class
        return list(torch.cat([box_convert(output[..., :4], "cxcywh", "xyxy"), output[..., 4:5]], dim=-1))

    def _best(self, boxes: torch.Tensor) -> torch.Tensor:
        # Not ultralytics' own suppression: it stops at a time limit, so that a slow machine silently loses boxes.
        boxes = boxes[boxes[:, 4] >= self.recipe.min_score].float()
        boxes = boxes[boxes[:, 4].argsort(descending=True, stable=True)[:CANDIDATES]]
        boxes[:, :4] = boxes[:, :4].clamp(0, self.recipe.image_size)
        boxes = boxes[(boxes[:, 2:4] > boxes[:, :2]).all(dim=1)]
        return boxes[nms(boxes[:, :4], boxes[:, 4], self.recipe.nms_iou)[: self.recipe.max_detections]]


def build_model(recipe: DetectorRecipe) -> DetectionModel:
    """ultralytics' network of that name for one class, with random weights or those of `pretrained_file`."""
    try:
        model = DetectionModel(f"{recipe.backbone}.yaml", ch=3, nc=1, verbose=False)
    except FileNotFoundError as error:
        raise ValueError(f"ultralytics has no model {recipe.backbone!r}; it has yolov5lu, yolov8n, yolo11n ...") from error
    if recipe.pretrained_file:
        _start_from(model, Path(recipe.pretrained_file), recipe.backbone)
    return model


def load(record: dict, state_dict: dict[str, torch.Tensor], device: torch.device) -> YoloDetector:
    """A detector from a bundle's record and weights, ready to predict on `device`. Raises where the weights do not fit."""
    detector = YoloDetector(override(from_dict(DetectorRecipe, record["recipe"]), pretrained_file=""))
    detector.load_state_dict(state_dict, strict=True)
    return detector.eval().to(device)


def _start_from(model: DetectionModel, path: Path, name: str) -> None:
    """Weights of a safetensors file whose names and shapes fit; another count of classes costs the last layers alone."""
    weights = {key.removeprefix("model.model."): value for key, value in load_file(path).items()}
    own = model.model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    if len(fitting) < 0.9 * len(own):
        raise ValueError(f"{path} fits {len(fitting)} of the {len(own)} tensors of {name!r}: weights of another model?")
    model.model.load_state_dict(fitting, strict=False)
    log.info("%s: %d of %d tensors of %s start from it", path, len(fitting), len(own), name)
