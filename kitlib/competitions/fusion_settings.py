"""`FusionSettings`: how the predictions of several models are merged, for any competition.

A competition may derive a class from FusionSettings. Its additional fields say how merged predictions become the
competition's answers; its GRIDS say which values of these fields are tried in tuning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from kitlib.settings import AtLeastOne, NotNegative, Positive, Probability, Settings

Method = Literal["wbf", "nms", "soft_nms", "nmw"]
METHODS = get_args(Method)
Confidence = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]  # those of ensemble-boxes
CONFIDENCES = get_args(Confidence)
AnyConfidence = Literal[Confidence, "agreed"]  # for "agreed" see kitlib.fusion.box_fusion.AGREEMENT


@dataclass(frozen=True)
class FusionSettings(Settings):
    """Settings of the fusion of predictions. The defaults are the simplest: equal weights, no calibration.

    GRIDS maps the name of each tuning step to a pair: the fields that the step sets together, and the values that it tries.
    FIRST names the steps that are also taken before the tuning of box merging, which depends on the results of these steps.
    """

    GRIDS: ClassVar[Mapping[str, tuple[tuple[str, ...], tuple[Any, ...]]]] = {}
    FIRST: ClassVar[tuple[str, ...]] = ()
    BOX_IOUS: ClassVar[tuple[float, ...]] = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # tried for box_iou; published: 0.55 to 0.625
    BOX_METHODS: ClassVar[tuple[Method, ...]] = ("wbf", "nms")  # soft_nms and nmw are too slow to try on thousands of images
    BOX_CONFIDENCES: ClassVar[tuple[AnyConfidence, ...]] = ("avg", "max", "box_and_model_avg")  # tried for box_confidence

    model_weights: dict[str, NotNegative] = field(default_factory=dict)  # model -> weight; default 1, and 0 excludes a model
    # detector -> slope and offset of its calibration (kitlib.fusion.box_fusion), for each finding if there are several; see
    # calibration_key in kitlib.fusion.model_fusion. Other detectors' scores stay unchanged.
    calibration: dict[str, tuple[Positive, float]] = field(default_factory=dict)
    box_method: Method = "wbf"  # applies to images with two or more lists of boxes
    box_iou: Probability = 0.6  # IoU above which boxes are merged (1st and 11th place 0.6, Heidelberg 0.55, 5th 0.625)
    # boxes with a lower score are dropped before fusion; the limit is low because unlikely boxes still add average precision
    box_min_score: Probability = 0.001
    box_limit: AtLeastOne = 50  # number of boxes merged per list, the most confident; time grows with this number's square
    box_confidence: AnyConfidence = "avg"  # applies only to wbf
    # IoU above which the less confident of two fused boxes is dropped; 1: no box is dropped. Heidelberg's code: 0.1
    final_nms_iou: Probability = 1.0

    def weight(self, model: str) -> float:
        """Return the weight of `model`, or 1 if `model_weights` does not contain the model."""
        return float(self.model_weights.get(model, 1.0))
