"""GeM pooling: the generalised mean of a feature map, with a power that is learnt."""

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

LEAST = 1e-6  # smaller features are raised to this value, because powers of negative numbers are undefined


class GeM(nn.Module):
    """Generalised-mean pooling: (mean of x^p)^(1/p) over each feature map, with a single learnt power p that starts at 3.

    With p = 1 this is average pooling; for large p it approaches maximum pooling. The input is (n, channels, rows, columns);
    the output is (n, channels) if `flatten` is True, else (n, channels, 1, 1). Source: Radenovic, Tolias and Chum 2018
    (TPAMI), section 3.2.
    """

    def __init__(self, flatten: bool = True) -> None:
        super().__init__()
        self.gem_power, self.flatten = nn.Parameter(torch.tensor(3.0)), flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # float32, because the third power of a feature above 40 overflows half precision.
        mean = x.float().clamp(min=LEAST).pow(self.gem_power).mean(dim=(2, 3), keepdim=not self.flatten)
        return mean.pow(1 / self.gem_power)


def with_gem(backbone: Any) -> Any:
    """Replace the pooling of a timm network by GeM, and return the network.

    Raises ValueError if the network, such as a transformer, does not pool feature maps (n, channels, rows, columns).
    """
    pools = [name for name, part in backbone.named_modules() if isinstance(part, SelectAdaptivePool2d)]
    if len(pools) != 1 or getattr(backbone.get_submodule(pools[0]).pool, "dim", (2, 3)) != (2, 3):
        raise ValueError(
            f'pooling is "gem", but {type(backbone).__name__} does not pool feature maps of a convolutional network; set '
            'pooling="backbone"'
        )
    parent, _, name = pools[0].rpartition(".")
    pool = backbone.get_submodule(pools[0])
    flattens = isinstance(pool.flatten, nn.Flatten) or getattr(pool.pool, "flatten", False)
    setattr(backbone.get_submodule(parent), name, GeM(flattens))
    return backbone
