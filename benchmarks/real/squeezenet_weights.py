"""Converts SqueezeNet weights for the kit's networks: Keras's ImageNet weights, or a trained classifier's for YOLO.

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

# Mean and standard deviation per colour, of pixels 0..1.
Normalisation = tuple[Sequence[float], Sequence[float]]
# Keras's input, taken from Caffe: BGR 0..255 minus these means.
CAFFE: Normalisation = tuple(mean / 255 for mean in (103.939, 116.779, 123.68)), (1 / 255,) * 3
KIT: Normalisation = default_cfgs["squeezenet1_1"].default.mean, default_cfgs["squeezenet1_1"].default.std
PLAIN: Normalisation = (0.0,) * 3, (1.0,) * 3

app = typer.Typer()


@app.command()
def keras(source: Path, out: Path) -> None:
    """Convert a .npz file with torchvision's names and OIHW kernels for BGR to a file for the backbone `squeezenet1_1`."""
    weights = read_starting_weights(source)
    caffe_rgb = CAFFE[0][::-1], CAFFE[1]  # the first convolution's colours are flipped from BGR to RGB
    weights["features.0.weight"], weights["features.0.bias"] = renormalise(
        weights["features.0.weight"].flip(1), weights["features.0.bias"], old=caffe_rgb, new=KIT
    )
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out)


@app.command()
def yolo(source: Path, out: Path) -> None:
    """Convert a trained classifier with backbone `squeezenet1_1` to a file for YOLO with this backbone (RGB pixels 0..1)."""
    weights = read_starting_weights(source)
    prefix = "backbone."
    layers = {name.removeprefix(f"{prefix}features."): each for name, each in weights.items() if name.startswith(prefix)}
    first = layers["0.weight"]
    if first.shape[1] == 1:
        first = first.expand(-1, 3, -1, -1) / 3
    layers["0.weight"], layers["0.bias"] = renormalise(first, layers["0.bias"], old=KIT, new=PLAIN)
    save_file({LAYERS + name: tensor.contiguous() for name, tensor in layers.items()}, out)


def renormalise(
    weight: torch.Tensor, bias: torch.Tensor, old: Normalisation, new: Normalisation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a convolution for another normalisation of pixels, with the same outputs.

    `weight` (outputs, channels, k, k) and `bias` (outputs,); `old` and `new` are mean and std per channel, of pixels 0..1.
    With x = (pixel - mean) / std, x_old = x_new std_new / std_old + (mean_new - mean_old) / std_old: the factor goes into
    the weights, the constant into the bias. Exact where the kernel does not reach padding. With (0, 0, 0) and (1, 1, 1) as
    `new`, the network takes plain pixels 0..1.
    """
    (old_mean, old_std), (mean, std) = (
        (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in pair) for pair in (old, new)
    )
    exact = weight.double()
    constant = (exact * (mean - old_mean) / old_std).sum(dim=(1, 2, 3))
    return (exact * std / old_std).to(weight.dtype), (bias.double() + constant).to(bias.dtype)


if __name__ == "__main__":
    app()
