"""Registers torchvision's SqueezeNet 1.1, with YOLOv8's neck and head, as a backbone of the kit's YOLO; importing is enough.

KIT_BACKBONES=benchmarks.real.squeezenet_yolo lets the kit's notebooks use it.
"""

from benchmarks.real.squeezenet import PADDING
from kitlib.models.yolo import ARCHITECTURES

LAYERS = "model.model.1.m."  # the detector's prefix for torchvision's `features.`

# SqueezeNet's feature maps have strides 8 and 16. Pre-trained weights cover the backbone; neck and head start at random.
ARCHITECTURES["squeezenet1_1"] = {
    "nc": 1,
    "scales": {"n": [1.0, 1.0, 1024]},
    "scale": "n",
    "backbone": [
        [-1, 1, "nn.ZeroPad2d", [[PADDING, 0, PADDING, 0]]],
        [-1, 1, "TorchVision", [512, "squeezenet1_1", None, True, 1, True]],
        [1, 1, "Index", [256, 8]],  # index 0 is the input of the backbone, so layer n has index n + 1
        [1, 1, "Index", [512, 13]],
    ],
    "head": [
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 1, "SPPF", [512, 5]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C2f", [256]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 1, "C2f", [128]],
        [-1, 1, "Conv", [128, 3, 2]],
        [[-1, 8], 1, "Concat", [1]],
        [-1, 1, "C2f", [256]],
        [-1, 1, "Conv", [256, 3, 2]],
        [[-1, 5], 1, "Concat", [1]],
        [-1, 1, "C2f", [512]],
        [[11, 14, 17], 1, "Detect", [1]],
    ],
}
