"""Registers SqueezeNet 1.1, which timm lacks, as a timm backbone with the name `squeezenet1_1`; importing is enough.

KIT_BACKBONES=benchmarks.real.squeezenet lets the kit's notebooks use it.
"""

import torch
import torchvision
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureListNet, feature_take_indices
from torch import nn
from torch.nn import functional

FEATURES = 512  # channels of the last map
# Rows and columns of zeros (the mean grey) before a detector's image. SqueezeNet's own layers pad too little: without these,
# cells would be shifted by up to half a stride, and one per side would be missing.
PADDING = 4


class SqueezeNet(torchvision.models.SqueezeNet):
    """torchvision's SqueezeNet 1.1 and its key names (`features.N...`, `classifier.1...`), with the interface of timm.

    Feature maps have strides 4, 8 and 16. The first convolution has no padding, so a side of 16 k pixels gives maps of
    4 k - 1, 2 k - 1 and k - 1 cells, whether pooling rounds up or, as in Keras, down; see also PaddedFeatures. With
    `num_classes=0` the model returns pooled features (n, 512). Iandola et al. 2016, arXiv 1602.07360.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5, global_pool: str = "avg") -> None:
        super().__init__("1_1", 1, drop_rate)
        if in_chans != 3:
            self.features[0] = nn.Conv2d(in_chans, 64, kernel_size=3, stride=2)
            nn.init.kaiming_uniform_(self.features[0].weight)
            nn.init.zeros_(self.features[0].bias)
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = FEATURES
        self.feature_info = [
            {"num_chs": 128, "reduction": 4, "module": "features.4"},
            {"num_chs": 256, "reduction": 8, "module": "features.7"},
            {"num_chs": FEATURES, "reduction": 16, "module": "features.12"},
        ]
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Replace the classifier by a random one; 0 classes: pooled features or, with `global_pool` "", the last map."""
        if global_pool not in ("", "avg") or (num_classes and not global_pool):
            raise ValueError(f"global_pool of squeezenet1_1 must be 'avg', or '' without classes, not {global_pool!r}")
        self.num_classes = num_classes
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if global_pool else []
        if not num_classes:
            self.classifier = nn.Sequential(*pool)
            return
        last = nn.Conv2d(FEATURES, num_classes, kernel_size=1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.classifier = nn.Sequential(nn.Dropout(self.drop_rate), last, nn.ReLU(inplace=True), *pool)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last map (n, 512, ~rows / 16, ~columns / 16) of x (n, in_chans, rows, columns)."""
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean(dim=(2, 3)) if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last map and the maps selected by `indices` of strides 4, 8 and 16, as timm's models do."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt of squeezenet1_1 must be 'NCHW', not {output_fmt!r}")
        selected, last = feature_take_indices(len(self.feature_info), indices)
        map_of_layer = {int(info["module"].partition(".")[2]): number for number, info in enumerate(self.feature_info)}
        maps: list[torch.Tensor] = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if map_of_layer.get(number) in selected:
                maps.append(x)
            if stop_early and map_of_layer.get(number) == last:
                break
        return maps if intermediates_only else (x, maps)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns that group parameters by depth, as timm's models do; `coarse`: one group per stride."""
        if not coarse:
            return {"stem": r"^features\.0\.", "blocks": [(r"^features\.(\d+)\.", None)]}
        return {
            "stem": r"^features\.0\.",
            "blocks": [
                (r"^features\.[34]\.", (0,)),
                (r"^features\.[67]\.", (1,)),
                (r"^features\.(?:9|1\d)\.", (2,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError("squeezenet1_1 has no gradient checkpointing")


class PaddedFeatures(FeatureListNet):
    """The maps for `features_only`, padded to exactly side / 4, side / 8 and side / 16 cells."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return super().forward(functional.pad(x, (PADDING, 0) * 2))


default_cfgs = generate_default_cfgs(
    {
        "squeezenet1_1": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (13, 13),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            # ImageNet's values, averaged over the colours: with the same mean and std for all, a grey pixel has the same
            # value in each colour, so the first convolution can be summed over the colours without error.
            "mean": (0.449,) * 3,
            "std": (0.226,) * 3,
            "first_conv": "features.0",
            "classifier": "classifier.1",
        }
    }
)


@register_model
def squeezenet1_1(pretrained: bool = False, **options: object) -> SqueezeNet:
    """Build the model for `timm.create_model`, which passes its options."""
    return build_model_with_cfg(
        SqueezeNet,
        "squeezenet1_1",
        pretrained,
        feature_cfg={
            "out_indices": options.pop("out_indices", (0, 1, 2)),
            "flatten_sequential": True,
            "feature_cls": PaddedFeatures,
        },
        **options,
    )
