"""Mixes each image of a training batch with another image (MixUp or CutMix), and their targets in the same proportion."""

import math
from typing import Any

import torch


def mix_batch(batch: dict[str, Any], mixup: float, cutmix: float) -> dict[str, Any]:
    """Return a copy of a training batch in which each image and its targets are mixed with a partner and its targets.

    `batch` is a result of `kitlib.training.xray_dataset.collate`. `mixup` and `cutmix` are the alphas of the two methods; an
    alpha of 0 switches the method off. If both are 0, the batch is returned unchanged. If both are above 0, one method is
    chosen at random for the batch, each with probability 1/2. The images' partners are a random permutation of the batch.
    One share per batch is drawn from Beta(alpha, alpha).

    MixUp returns share * image + (1 - share) * partner, with pixels in float32, 0..255 (Zhang et al. 2018, section 2).
    CutMix pastes a rectangle of the partner into the image; the share is then set to the part of the image's area that the
    rectangle leaves visible (Yun et al. 2019, section 3.1).

    Each of the targets `label` and `none` becomes share * target + (1 - share) * partner's target, or NaN if either of these
    is NaN. If the batch has a `mask` (n, cells, cells), it is mixed like the pixels; CutMix's rectangle then has its edges
    between cells. Boxes and their findings are removed, because neither image's boxes fit the mixture. Random numbers come
    from torch's CPU generator.
    """
    if not mixup and not cutmix:
        return batch
    uses_cutmix = cutmix > 0 and (not mixup or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(float(cutmix if uses_cutmix else mixup))
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    pixels, mask = batch["pixels"], batch.get("mask")
    partner = torch.randperm(len(pixels)).to(pixels.device)
    mixed = {name: value for name, value in batch.items() if name not in ("boxes", "findings")}
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
    """Draw a random rectangle and return its edges in cells: top, bottom, left, right.

    Before clipping, it is a square with a random centre whose area is the fraction (1 - share) of a canvas of `cells` x
    `cells`. It is then clipped to the canvas.
    """
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
