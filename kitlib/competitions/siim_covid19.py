"""SIIM-FISABIO-RSNA COVID-19 Detection (2021): four classes of studies, the class `none` of images, and boxes of opacities.

`none` means that an image has no opacity. The metric, the submission format and its check are in kitlib.scoring; this file
makes predictions to submit from merged ones. All published formulas are implemented; `SiimFusion` chooses among them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.contract import Competition
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions, weighted_mean
from kitlib.datasets.sample_submission import HEADER, read_sample
from kitlib.datasets.siim import STUDY_TABLE, read_test
from kitlib.errors import ScoringError, SettingsError
from kitlib.scoring import score
from kitlib.scoring.placeholders import PRIORS, placeholder
from kitlib.scoring.submission_csv import Submission, fill_rows, read_submission, submission_ids
from kitlib.scoring.validate import validate_rows
from kitlib.settings import NotNegative, Probability

NONE_PARTS = ("none_classifier", "none_negative", "none_no_box", "none_product")
# Weights of NONE_PARTS: each part alone, published mixtures (3rd place 0.7 and 0.3, 11th 0.5 and 0.5) and similar mixtures.
NONE_MIXTURES = (
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
    (0.5, 0.5, 0.0, 0.0),
    (0.7, 0.0, 0.3, 0.0),
    (0.5, 0.0, 0.5, 0.0),
    (0.3, 0.0, 0.7, 0.0),
    (0.0, 0.5, 0.5, 0.0),
    (0.0, 0.5, 0.0, 0.5),
    (0.7, 0.0, 0.0, 0.3),
    (0.5, 0.0, 0.0, 0.5),
    (0.4, 0.3, 0.3, 0.0),
    (0.25, 0.25, 0.25, 0.25),
)


@dataclass(frozen=True)
class SiimFusion(FusionSettings):
    """Fusion settings of SIIM-COVID: the formula for `none`, the probability that an image has no opacity.

    The settings also say how `none` changes the box scores and the study class `negative`. By default, neither is changed.
    """

    GRIDS: ClassVar = {
        "none: " + ", ".join(part.removeprefix("none_") for part in NONE_PARTS): (NONE_PARTS, NONE_MIXTURES),
        "opacity_power": (("opacity_power",), (0.0, 0.1, 0.16 / 0.84, 0.3, 0.4, 0.6, 0.8, 1.0)),
        "negative_share": (("negative_share",), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
    }

    # An image's `none` is the weighted mean of the available ones of four parts; these are the parts' weights:
    none_classifier: NotNegative = 1.0  # `none` as the classifier predicts it
    none_negative: NotNegative = 0.0  # `negative` of the image's study
    none_no_box: NotNegative = 0.0  # 1 - the highest box score
    none_product: NotNegative = 0.0  # product of 1 - score over the boxes
    opacity_power: NotNegative = 0.0  # box score = score * (1 - none)^opacity_power; 3rd place 0.4, 11th 0.16/0.84
    negative_share: Probability = 1.0  # negative = share * negative + (1 - share) * mean none of the study; 11th place 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in NONE_PARTS):
            raise SettingsError(f"SiimFusion needs a weight above 0 among {', '.join(NONE_PARTS)}")


@dataclass(frozen=True)
class Fused:
    """Fused predictions for every study and image of a table of images.

    `studies` has the columns `study_id`, the four classes and `prior`; `nones` has `image_id`, `none`, `prior` and `seen`;
    `detections` has `image_id`, `finding`, `score`, and the corners `xmin`, `ymin`, `xmax` and `ymax` in original pixels.
    `none` is the probability that an image has no opacity. If no model has predicted a row, `prior` is True and the row's
    probabilities are the class frequencies. `seen` is True for images that a detector with a nonzero weight has predicted.
    If SiimFusion.negative_share is below 1, the four classes of a study may not sum to 1.
    """

    studies: pd.DataFrame
    nones: pd.DataFrame
    detections: pd.DataFrame


def decide(merged: MergedPredictions, settings: SiimFusion) -> Fused:
    """Return the predictions to submit for all studies and images in `merged`; see Fused.

    `none`, the probability that an image has no opacity, changes the box scores and the study class `negative` as `settings`
    say. If no model has predicted a study or an image, its probabilities are the class frequencies (PRIORS).
    """
    studies, nones, score = combine(merged, settings)
    return Fused(studies, nones, merged.detections().assign(score=score))


def combine(merged: MergedPredictions, settings: SiimFusion) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Return the tables `studies` and `nones` of Fused, and the adjusted scores of the merged boxes, an array (boxes,).

    The probability `none` of an image has four estimates (NONE_PARTS, see SiimFusion), some of which may be NaN. `none` is
    the weighted mean of those that are not NaN or, if all their weights are 0, the first of them.
    """
    images, box_image, score = merged.images, merged.boxes["row"].to_numpy(), merged.boxes["score"].to_numpy()
    study_ids = pd.Index(images["study_id"].unique())
    studies = merged.studies.set_index("study_id").reindex(study_ids)[list(STUDY_CLASSES)]
    study_of_image = study_ids.get_indexer(images["study_id"])
    no_box_product = np.ones(len(images))
    np.multiply.at(no_box_product, box_image, 1 - score)
    parts = np.stack(
        [
            merged.probability("none"),
            studies["negative"].to_numpy()[study_of_image],
            merged.no_box(),
            np.where(merged.seen, no_box_product, np.nan),
        ]
    )
    none = weighted_mean(parts, np.array([getattr(settings, name) for name in NONE_PARTS]))
    study_none = pd.Series(none).groupby(study_of_image).mean().reindex(range(len(study_ids))).to_numpy()
    studies = studies.fillna(PRIORS)
    share = np.where(np.isnan(study_none), 1.0, settings.negative_share)
    has_no_score = ~study_ids.isin(merged.studies["study_id"])
    studies["negative"] = share * studies["negative"] + (1 - share) * np.nan_to_num(study_none)
    image_ids = pd.Index(images["image_id"])
    nones = pd.DataFrame({"image_id": image_ids, "none": none, "prior": np.isnan(none), "seen": merged.seen})
    nones = nones.fillna({"none": PRIORS["none"]})
    rescored = score * (1 - nones["none"].to_numpy()[box_image]) ** settings.opacity_power
    return studies.assign(prior=has_no_score).rename_axis("study_id").reset_index(), nones, rescored


def judge(truth: score.Truth, merged: MergedPredictions, settings: SiimFusion) -> float:
    """Return the score (0..1) of what `decide` returns. `merged.boxes` needs a column `match` (see Competition)."""
    studies, nones, box_score = combine(merged, settings)
    image = pd.Index(truth.image_ids).get_indexer(merged.images["image_id"])[merged.boxes["row"].to_numpy()]
    return score.score_matched(truth, studies, nones, image, box_score, merged.boxes["match"].to_numpy())["score"]


def fill(ids: list[str], fused: Fused) -> tuple[list[list[str]], list[str]]:
    """Return the submission's rows for `ids`, and the ids that no model has predicted, which get placeholder predictions."""
    return fill_rows(ids, fused.studies[~fused.studies.prior], fused.nones[~fused.nones.prior], fused.detections)


def read_truth(path: Path) -> score.Truth:
    """Read the ground truth in a folder (see kitlib.scoring.score.read_truth). Raises ScoringError if `path` is a file."""
    if path.is_file():
        raise ScoringError(
            f"{path} is a file; expected the folder with train_study_level.csv and train_image_level.csv, because this "
            "competition scores studies and images together"
        )
    if path.is_dir() and not (path / STUDY_TABLE).is_file():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:9]) or "no file"
        raise ScoringError(
            f"the folder {path} lacks {STUDY_TABLE}, which SIIM-COVID's ground truth requires; it has {names}. To score "
            "another competition, give its name with --competition"
        )
    return score.read_truth(path)


def _read_submission(path: Path, ids: list[str]) -> Submission:
    """Read a submission file. `ids` is not used, because `metric` checks the ids."""
    return read_submission(path)


SIIM_COVID19 = Competition(
    name="siim-covid19",
    slug="siim-covid19-detection",
    title="SIIM-FISABIO-RSNA COVID-19 Detection",
    header=tuple(HEADER),
    read_truth=read_truth,
    truth_ids=lambda truth: submission_ids(truth.labels["id"], truth.image_ids),
    read_sample=lambda path: read_sample(path).ids,
    read_submission=_read_submission,
    find_faults=validate_rows,
    metric=score.score,
    baseline_rows=lambda ids: [[name, placeholder(name)] for name in ids],
    dataset="siim",
    settings=SiimFusion,
    truth_of=lambda images, labels, boxes, masks: score.truth_of(images, labels, boxes),
    decide=decide,
    fill=fill,
    read_test=lambda folder: read_test(folder, headers=False),
    judge=judge,
    time_limit_hours=9.0,
    study_classes=STUDY_CLASSES,
    image_classes=("none",),
    box_classes=("opacity",),
)
