"""MixUp and CutMix: a batch's images blended with one another, their targets in the same shares."""

import math
from typing import Any

import torch


def mix_batch(batch: dict[str, Any], mixup: float, cutmix: float) -> dict[str, Any]:
    """A batch of `kitlib.training.xray_dataset.collate` with its images and targets mixed; the one given stays as it is.

    `mixup` and `cutmix` are alpha of Beta(alpha, alpha), from which one share a batch is drawn, 0 for never; with both, a
    batch gets one of the two, each with probability 1/2. Every image meets a partner of its own (a permutation), so that the
    sum of each target over the batch stays. MixUp blends pixels, which become float32 0..255 (Zhang et al. 2018, section 2).
    CutMix lays a rectangle of the partner over the image; the share is the area that is left (Yun et al. 2019, section 3.1).

    `label` and `none` are blended by the share, and what is NaN in either stays unknown. `mask` (n, cells, cells), where
    there is one, goes with the pixels: the rectangle's edges then lie between its cells. All is drawn from torch's generator
    of the CPU, whatever the device. Boxes are left out: those of neither image fit the mixture.
    """
    if not mixup and not cutmix:
        return batch
    cut = cutmix > 0 and (not mixup or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(float(cutmix if cut else mixup))
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    pixels, mask = batch["pixels"], batch.get("mask")
    partner = torch.randperm(len(pixels)).to(pixels.device)
    mixed = {name: value for name, value in batch.items() if name != "boxes"}
    if cut:
        side, cells = pixels.shape[-1], pixels.shape[-1] if mask is None else mask.shape[-1]
        top, bottom, left, right = _rectangle(cells, share)
        share = 1 - (bottom - top) * (right - left) / cells**2
        mixed["pixels"] = _pasted(pixels, partner, [edge * (side // cells) for edge in (top, bottom, left, right)])
        if mask is not None:
            mixed["mask"] = _pasted(mask, partner, [top, bottom, left, right])
    else:
        mixed["pixels"] = _blended(pixels.float(), partner, share)
        if mask is not None:
            mixed["mask"] = _blended(mask, partner, share)
    return mixed | {name: _blended(batch[name], partner, share) for name in ("label", "none")}


def _rectangle(cells: int, share: float) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a square of area (1 - share), its centre anywhere, cut at the canvas's edges."""
    half = cells * math.sqrt(1 - share) / 2
    edges = []
    for centre in (torch.rand(2) * cells).tolist():
        edges += [min(max(round(edge), 0), cells) for edge in (centre - half, centre + half)]
    return tuple(edges)


def _pasted(values: torch.Tensor, partner: torch.Tensor, edges: list[int]) -> torch.Tensor:
    top, bottom, left, right = edges
    pasted = values.clone()
    pasted[:, top:bottom, left:right] = values[partner, top:bottom, left:right]
    return pasted


def _blended(values: torch.Tensor, partner: torch.Tensor, share: float) -> torch.Tensor:
    return share * values + (1 - share) * values[partner]
