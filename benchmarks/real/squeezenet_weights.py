"""SqueezeNet's weights for the kit's networks: Keras's ImageNet weights for any, a trained classifier's for a YOLO.

PYTHONPATH=. python benchmarks/real/squeezenet_weights.py keras KERAS.npz squeezenet.safetensors
PYTHONPATH=. python benchmarks/real/squeezenet_weights.py yolo runs/real/backbone/fold0 yolo.safetensors
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file

from benchmarks.real.squeezenet import default_cfgs
from benchmarks.real.squeezenet_yolo import LAYERS
from kitlib.models.starting_weights import read_starting_weights

# Mean and spread, a colour, of pixels 0..1.
Normalisation = tuple[Sequence[float], Sequence[float]]
# Keras's input, which is Caffe's: BGR of 0..255 less these means.
CAFFE: Normalisation = tuple(each / 255 for each in (103.939, 116.779, 123.68)), (1 / 255,) * 3
KIT: Normalisation = default_cfgs["squeezenet1_1"].default.mean, default_cfgs["squeezenet1_1"].default.std
PLAIN: Normalisation = (0.0,) * 3, (1.0,) * 3

app = typer.Typer()


@app.command()
def keras(source: Path, out: Path) -> None:
    """From a .npz file with torchvision's names and kernels OIHW, for BGR, to a file for the backbone `squeezenet1_1`."""
    weights = read_starting_weights(source)
    had = CAFFE[0][::-1], CAFFE[1]  # the first convolution's colours are turned from BGR to RGB
    weights["features.0.weight"], weights["features.0.bias"] = renormalised(
        weights["features.0.weight"].flip(1), weights["features.0.bias"], had, wants=KIT
    )
    save_file({name: each.contiguous() for name, each in weights.items()}, out)


@app.command()
def yolo(source: Path, out: Path) -> None:
    """From a trained classifier on `squeezenet1_1` to a file for the YOLO of that name, for pixels 0..1 in colour."""
    found = read_starting_weights(source)
    layers = {name.removeprefix("backbone.features."): each for name, each in found.items() if name.startswith("backbone.")}
    first = layers["0.weight"]
    if first.shape[1] == 1:
        first = first.expand(-1, 3, -1, -1) / 3
    layers["0.weight"], layers["0.bias"] = renormalised(first, layers["0.bias"], had=KIT, wants=PLAIN)
    save_file({LAYERS + name: each.contiguous() for name, each in layers.items()}, out)


def renormalised(
    weight: torch.Tensor, bias: torch.Tensor, had: Normalisation, wants: Normalisation
) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution for pixels normalised by other numbers, whose outputs are the old ones.

    `weight` (outputs, channels, k, k) and `bias` (outputs,); `had` and `wants` are mean and spread a channel of pixels 0..1.
    With x = (pixel - mean) / std on both sides, x_had = x_wants std_wants / std_had + (mean_wants - mean_had) / std_had: the
    factor goes into the weights, the constant into the bias. Exact where no padding meets the kernel. With (0, 0, 0) and
    (1, 1, 1) wanted, the network takes plain pixels 0..1.
    """
    (had_mean, had_std), (mean, std) = (
        (torch.tensor(each, dtype=torch.float64).view(1, -1, 1, 1) for each in pair) for pair in (had, wants)
    )
    exact = weight.double()
    constant = (exact * (mean - had_mean) / had_std).sum(dim=(1, 2, 3))
    return (exact * std / had_std).to(weight.dtype), (bias.double() + constant).to(bias.dtype)


if __name__ == "__main__":
    app()
