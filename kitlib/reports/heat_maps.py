"""Where a classifier looks: Grad-CAM of its last convolutional stage, and how much of the heat lies inside the lungs.

Selvaraju et al. 2017, as the package grad-cam computes it. Heat is no proof of a reason: it says which places of the last
features raise a class's output, on cells that are a thirty-second of the canvas wide.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from kitlib.inference.predict import Predictor
from kitlib.lungs.finders import LungFinder
from kitlib.models.classifier import Classifier, FindingsClassifier
from kitlib.xrays.cache import CachedXray

try:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except ImportError as error:  # such as on Kaggle, for which it has no wheel
    raise ImportError(
        "heat maps want the package grad-cam: pip install grad-cam and ttach at the versions of requirements.txt, or leave "
        "heat_runs empty"
    ) from error

LONGEST_NAME = 28  # letters beside a row of pictures
COLUMNS = ["image_id", "class", "heat_inside", "area_inside", "concentration"]


@dataclass(frozen=True)
class Heat:
    """The heat of one image for one class, on the pixels of its decoded copy: 0..1 float32, all 0 where nothing is hot."""

    xray: CachedXray
    class_name: str
    heat: np.ndarray


def heat_maps(network: Classifier, pixels: torch.Tensor, outputs: Sequence[int]) -> np.ndarray:
    """Heat (n, side, side), 0..1, of grey canvases (n, side, side), 0..255, for one output (its place) of each.

    The greatest heat of a canvas is 1, unless nothing raises the output: then all is 0. Raises ValueError for a network
    without maps of features, such as a transformer.
    """
    views = _FromMaps(network).eval()
    device = next(network.parameters()).device
    with _KeptHeat(model=views, target_layers=[views.maps]) as gradients:
        gradients(network.normalise(pixels.to(device)), targets=[ClassifierOutputTarget(place) for place in outputs])
        raw = np.maximum(gradients.raw, 0)
    side = pixels.shape[-1]
    heat = np.stack([cv2.resize(each.astype(np.float32), (side, side)) for each in raw])
    most = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, most, out=np.zeros_like(heat), where=most > 0)


def look(predictor: Predictor, xrays: Iterable[CachedXray], class_names: Sequence[str]) -> list[Heat]:
    """The heat of each X-ray for its class, batch by batch, brought back from the model's canvas to the X-ray's own pixels.

    What the model does not see, such as beyond a cropped canvas, has no heat. Of several views the first is looked at, of
    a mirrored one unmirrored. Raises ValueError for a model that is no classifier of whole images, or lacks a class.
    """
    if not isinstance(predictor.network, Classifier) or predictor.family.sees_patches:
        raise ValueError(
            f"{predictor.model} is a model of the family {predictor.family.name}; heat is for classifiers of whole images"
        )
    strange = sorted(set(class_names) - set(predictor.classes))
    if strange:
        raise ValueError(f"{predictor.model} has no class {strange}; it has: {', '.join(predictor.classes)}")
    found = []
    pairs = list(zip(xrays, class_names, strict=True))
    for start in range(0, len(pairs), predictor.fitted.size):
        shown, names = (list(each) for each in zip(*pairs[start : start + predictor.fitted.size], strict=True))
        batch = predictor.canvases(shown)
        canvas = next(iter(batch.pixels))
        heat = heat_maps(predictor.network, batch.pixels[canvas], [predictor.classes.index(name) for name in names])
        for xray, name, place, each in zip(shown, names, batch.placements[canvas], heat, strict=True):
            found.append(Heat(xray, name, place.back(each, *xray.pixels.shape).clip(0, 1)))
    return found


def inside_lungs(found: Iterable[Heat], lungs: LungFinder) -> pd.DataFrame:
    """COLUMNS, a row an image: share of its heat in the lungs' mask, the mask's share of the image, the first by the second.

    Heat that is spread evenly has a `concentration` of 1. NaN where there is no mask or no heat.
    """
    rows = []
    for each in found:
        mask = lungs.find([each.xray])[0].mask
        total = float(each.heat.sum(dtype=float))
        inside, area = float("nan"), float("nan")
        if mask is not None and mask.any() and total > 0:
            inside, area = float(each.heat[mask].sum(dtype=float)) / total, float(mask.mean())
        rows.append((each.xray.image_id, each.class_name, inside, area, inside / area))
    return pd.DataFrame(rows, columns=COLUMNS)


def heat_summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a model, of tables as `inside_lungs` makes them: means over images, and images without a mask or heat."""
    rows = {name: {**table[COLUMNS[2:]].mean(), "images": len(table)} for name, table in tables.items()}
    summary = pd.DataFrame.from_dict(rows, orient="index")
    return summary.assign(not_judged=[int(table.heat_inside.isna().sum()) for table in tables.values()])


def heat_figure(found: Mapping[str, Sequence[Heat]], lungs: LungFinder | None = None) -> Figure:
    """A column an image, a row the image itself, then a row a model, such as without and with segmentation.

    The lungs' outline is drawn where `lungs` has a mask. All models' heats are of the same images, else ValueError.
    """
    first = next(iter(found.values()))
    ids = [each.xray.image_id for each in first]
    for name, heats in found.items():
        if [each.xray.image_id for each in heats] != ids:
            raise ValueError(f"the heats of {name} are of other images than those of {next(iter(found))}")
    figure = Figure(figsize=(2.4 * max(len(ids), 1), 2.6 * (1 + len(found))), layout="constrained")
    axes = figure.subplots(1 + len(found), max(len(ids), 1), squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for row, (name, heats) in enumerate({"image": first, **found}.items()):
        # A run may be named by its whole path, whose end tells it from others.
        axes[row, 0].set_ylabel(name[-LONGEST_NAME:], fontsize=9)
        for axis, each in zip(axes[row], heats, strict=False):
            axis.imshow(each.xray.pixels, cmap="gray", vmin=0, vmax=255)
            if row:
                axis.imshow(each.heat, cmap="jet", vmin=0, vmax=1, alpha=0.4)
            mask = lungs.find([each.xray])[0].mask if lungs is not None else None
            if mask is not None and mask.any() and not mask.all():
                axis.contour(mask, levels=[0.5], colors="limegreen", linewidths=0.8)
            axis.set_title(each.class_name if row else each.xray.image_id, fontsize=8)
    return figure


class _FromMaps(nn.Module):
    """A classifier whose last maps of features pass through `maps`, where Grad-CAM listens; nothing before them learns."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network, self.maps = network, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        backbone = self.network.backbone
        with torch.no_grad():
            # With its auxiliary head inception_v3 answers in two steps.
            split = isinstance(self.network, FindingsClassifier) and self.network.recipe.auxiliary
            last = backbone.forward_postaux(backbone.forward_preaux(x)) if split else backbone.forward_features(x)
        if last.ndim != 4:
            raise ValueError(f"{self.network.recipe.backbone} has no maps of features, but {tuple(last.shape)}: no heat map")
        logits = self.network.head(backbone.forward_head(self.maps(last.detach().requires_grad_())))
        if logits.shape[1] == 1:
            # One logit for two classes: what speaks for the second speaks against the first.
            return torch.cat([logits, -logits], dim=1)
        return logits


class _KeptHeat(GradCAM):
    """The package scales each map from its least heat to its greatest; a share of the heat needs it as it is, `raw`."""

    def get_cam_image(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.raw = super().get_cam_image(*args, **kwargs)
        return self.raw
