"""RANZCR CLiP, Catheter and Line Position Challenge (2021): the probabilities of eleven labels of an image.

The metric is ROC AUC, averaged over the labels. A pair of equal values counts half. Only the order of the values in a column
matters, so a submission may also contain values that are not probabilities, such as ranks.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.classes import RANZCR_LABELS
from kitlib.competitions.contract import Competition, fill_rows
from kitlib.competitions.csv_files import Rows, join_rows, read_numbers, read_truth_table, refuse_rows
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.merged import MergedPredictions
from kitlib.datasets.ranzcr import ID, PUBLISHED
from kitlib.errors import ScoringError
from kitlib.scoring.metrics import mean_auc
from kitlib.scoring.placeholders import format_confidence

logger = logging.getLogger(__name__)

LABELS = RANZCR_LABELS


def read_truth(path: Path) -> pd.DataFrame:
    """Return the ground truth in train.csv: a table with image_id and one column for each of LABELS, 0 or 1.

    Raises ScoringError if a label is not 0 or 1, or if an image has several rows.
    """
    table = read_truth_table(path, ("train.csv",), (ID, *LABELS))
    values = read_numbers(table, LABELS)
    refuse_rows(table, ~((values == 0) | (values == 1)).all(axis=1), "every label must be 0 or 1")
    refuse_rows(table, table[ID].duplicated().to_numpy(), "the image has several rows")
    return join_rows(dict(zip(table[ID], values[:, None], strict=True)), LABELS)


def _parse_row(image_id: str, cells: list[str]) -> tuple[np.ndarray, list[str]]:
    """Parse the cells of a submission row; return the labels' values, float (1, 11), and a list of faults."""
    values, faults = np.full((1, len(LABELS)), np.nan), []
    for index, (label, cell) in enumerate(zip(LABELS, cells, strict=True)):
        try:
            # float() would accept 1_0 as ten.
            value = float(cell.replace("_", "?"))
        except ValueError:
            faults.append(f"{label} is {cell!r}, but must be a number")
            continue
        if not math.isfinite(value):
            faults.append(f"{label} is {cell}, but must be finite")
        values[0, index] = value
    return values, faults


ROWS = Rows((ID, *LABELS), _parse_row)


def read_submission(path: Path, ids: list[str]) -> pd.DataFrame:
    """Read a submission file; return a table with image_id and the value of each of LABELS."""
    return join_rows(ROWS.read(path, ids), LABELS)


def metric(truth: pd.DataFrame, submission: pd.DataFrame) -> dict[str, float]:
    """Return `score`, the mean ROC AUC, and the ROC AUC of each label by name, all 0..1.

    Both tables have image_id and a column for each of LABELS. If all images of the truth have the same value of a label, the
    label's ROC AUC is NaN, the mean ignores it, and a warning is logged. Raises ScoringError unless `submission` has every
    image of the truth.
    """
    values = submission.set_index("image_id")[list(LABELS)].reindex(truth["image_id"])
    missing = values.index[values.isna().any(axis=1)]
    if len(missing):
        raise ScoringError(f"{len(missing)} images of the truth have no value in the submission, such as {missing[0]!r}")
    scores = mean_auc(truth[list(LABELS)].to_numpy(), values.to_numpy(), LABELS)
    undefined = [label for label in LABELS if math.isnan(scores[label])]
    if undefined:
        logger.warning(
            "the ROC AUC of %s is undefined, because the truth has only zeros or only ones there; the score is the mean "
            "over the other labels",
            ", ".join(undefined),
        )
    return scores


def baseline_rows(ids: list[str]) -> list[list[str]]:
    """Return a row for each id. All rows have the same values: for each label, the share of training images with it."""
    shares = [format_confidence(PUBLISHED[label] / PUBLISHED["images"]) for label in LABELS]
    return [[name, *shares] for name in ids]


def truth_of(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame, masks: Any) -> pd.DataFrame:
    """Return the ground truth of prepared images: image_id and LABELS, without images that lack a label."""
    known = images[["image_id", "study_id"]].merge(labels, left_on="study_id", right_on="id")
    return known[["image_id", *LABELS]].dropna().reset_index(drop=True)


def decide(merged: MergedPredictions, settings: FusionSettings) -> pd.DataFrame:
    """Return a table with image_id and the probability of each of LABELS, for images that at least one model has predicted.

    A label without a prediction for such an image gets the label's share of the training images as its probability.
    """
    shares = {label: PUBLISHED[label] / PUBLISHED["images"] for label in LABELS}
    return merged.scores.reindex(columns=["image_id", *LABELS]).dropna(how="all", subset=list(LABELS)).fillna(shares)


def fill(ids: list[str], scores: pd.DataFrame) -> tuple[list[list[str]], list[str]]:
    """Return the submission's rows for `ids`, and the ids without scores, which get a row of `baseline_rows`."""
    values = scores[list(LABELS)].to_numpy().tolist()
    cells = {name: list(map(format_confidence, row)) for name, row in zip(scores["image_id"], values, strict=True)}
    return fill_rows(baseline_rows(ids), cells)


RANZCR_CLIP = Competition.with_rows(
    ROWS,
    name="ranzcr-clip",
    slug="ranzcr-clip-catheter-line-classification",
    title="RANZCR CLiP - Catheter and Line Position Challenge",
    read_truth=read_truth,
    truth_ids=lambda truth: truth["image_id"],
    read_submission=read_submission,
    metric=metric,
    baseline_rows=baseline_rows,
    dataset="ranzcr",
    settings=FusionSettings,
    truth_of=truth_of,
    decide=decide,
    fill=fill,
    time_limit_hours=9.0,
    image_classes=LABELS,
)
