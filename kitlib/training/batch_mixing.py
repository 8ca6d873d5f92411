"""MixUp and CutMix: mix pairs of images in a batch, and their targets in the same proportion."""

import math
from typing import Any

import torch


def mix_batch(batch: dict[str, Any], mixup: float, cutmix: float) -> dict[str, Any]:
    """Return a copy of a batch (see `kitlib.training.xray_dataset.collate`) with mixed images and targets, without boxes.

    `mixup` and `cutmix` are the alpha of Beta(alpha, alpha), from which one share per batch is drawn; 0 switches the method
    off, and if both are 0 the batch is returned unchanged. If both are used, each batch uses either, with probability 1/2.
    Partners are a permutation of the batch, so that the sum of each target over the batch does not change. MixUp blends
    pixels, which become float32 0..255 (Zhang et al. 2018, section 2). CutMix pastes a rectangle of the partner; the share
    is the area of the image that stays (Yun et al. 2019, section 3.1).

    `label` and `none` are blended by the share; a target that is NaN in either image becomes NaN. `mask` (n, cells, cells),
    if the batch has it, is mixed like the pixels, and the edges of the rectangle are then between cells. All random numbers
    come from torch's CPU generator, on any device. Boxes are dropped, because neither image's boxes fit the mixture.
    """
    if not mixup and not cutmix:
        return batch
    uses_cutmix = cutmix > 0 and (not mixup or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(float(cutmix if uses_cutmix else mixup))
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    pixels, mask = batch["pixels"], batch.get("mask")
    partner = torch.randperm(len(pixels)).to(pixels.device)
    mixed = {name: value for name, value in batch.items() if name != "boxes"}
    if uses_cutmix:
        side, cells = pixels.shape[-1], pixels.shape[-1] if mask is None else mask.shape[-1]
        top, bottom, left, right = _draw_rectangle(cells, share)
        share = 1 - (bottom - top) * (right - left) / cells**2
        mixed["pixels"] = _paste(pixels, partner, [edge * (side // cells) for edge in (top, bottom, left, right)])
        if mask is not None:
            mixed["mask"] = _paste(mask, partner, [top, bottom, left, right])
    else:
        mixed["pixels"] = _blend(pixels.float(), partner, share)
        if mask is not None:
            mixed["mask"] = _blend(mask, partner, share)
    return mixed | {name: _blend(batch[name], partner, share) for name in ("label", "none")}


def _draw_rectangle(cells: int, share: float) -> tuple[int, int, int, int]:
    """Draw a square of area (1 - share) around a random centre; return top, bottom, left, right, clipped to the canvas."""
    half = cells * math.sqrt(1 - share) / 2
    edges = []
    for centre in (torch.rand(2) * cells).tolist():
        edges += [min(max(round(edge), 0), cells) for edge in (centre - half, centre + half)]
    return tuple(edges)


def _paste(values: torch.Tensor, partner: torch.Tensor, edges: list[int]) -> torch.Tensor:
    top, bottom, left, right = edges
    result = values.clone()
    result[:, top:bottom, left:right] = values[partner, top:bottom, left:right]
    return result


def _blend(values: torch.Tensor, partner: torch.Tensor, share: float) -> torch.Tensor:
    return share * values + (1 - share) * values[partner]
