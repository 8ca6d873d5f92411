"""The competition's submission.csv: its ids, its prediction strings, read whole and written whole.

A row is `<id>_study` or `<id>_image` and a string of groups of six: label, confidence, xmin, ymin, xmax, ymax. Study classes
and `none` carry the one-pixel box `0 0 1 1`; `opacity` boxes are in pixels of the original DICOM image.
"""

import csv
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.atomic import write_text
from kitlib.classes import IMAGE_CLASSES, SCORED_CLASSES, STUDY_CLASSES
from kitlib.errors import SubmissionError
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

HEADER = ["id", "PredictionString"]
ONE_PIXEL = (0.0, 0.0, 1.0, 1.0)
LABELS = {"study": STUDY_CLASSES, "image": IMAGE_CLASSES}
_LABEL_CODE = {label: code for code, label in enumerate(SCORED_CLASSES)}

# Shares of SIIM's train tables (6,054 studies, 6,334 images): what is written where no model has said anything.
PRIORS = {
    "negative": 1676 / 6054,
    "typical": 2855 / 6054,
    "indeterminate": 1049 / 6054,
    "atypical": 474 / 6054,
    "none": 2040 / 6334,
}


@dataclass(frozen=True)
class Submission:
    """What a submission file says. `ids` as in the file, in its order; the tables have bare ids and one row a group.

    `studies`: study_id, label, score, xmin, ymin, xmax, ymax. `images`: image_id and the same. Id and label are categorical.
    """

    ids: tuple[str, ...]
    studies: pd.DataFrame
    images: pd.DataFrame


def split_id(submission_id: str) -> tuple[str, str]:
    """`00188a671292_study` -> (`00188a671292`, `study`). Raises SubmissionError for any other ending."""
    bare, _, level = submission_id.rpartition("_")
    if not bare or level not in LABELS:
        raise SubmissionError(f"id {submission_id!r} must end in _study or _image")
    return bare, level


def submission_ids(study_ids: Iterable[str], image_ids: Iterable[str]) -> list[str]:
    """Ids as a submission writes them, studies first like sample_submission.csv."""
    return [f"{study}_study" for study in study_ids] + [f"{image}_image" for image in image_ids]


def read_cells(path: str | Path) -> list[tuple[int, list[str]]]:
    """(line number from 1, cells) of every line that is not blank, the header too. Raises SubmissionError."""
    # The default limit of 131,072 characters a cell is about 2,500 boxes.
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SubmissionError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error


def read_ids(path: str | Path) -> list[str]:
    """The ids of sample_submission.csv, in its order. Raises SubmissionError for a wrong header, a wrong or a second id."""
    cells = read_cells(path)
    if not cells or cells[0][1][:1] != HEADER[:1]:
        raise SubmissionError(f"{path} must begin with the header {','.join(HEADER)}")
    ids = [row[0] for _, row in cells[1:]]
    for submission_id in ids:
        split_id(submission_id)
    if len(set(ids)) < len(ids):
        raise SubmissionError(f"{path} has an id twice: {pd.Series(ids)[pd.Series(ids).duplicated()].iloc[0]}")
    return ids


def parse_prediction(text: str) -> tuple[list[str], np.ndarray]:
    """Labels and an array (n, 5) of confidence, xmin, ymin, xmax, ymax. Raises ValueError, not yet checking any value."""
    tokens = text.split()
    if not tokens or len(tokens) % 6:
        raise ValueError(f"{len(tokens)} words are not groups of six (label confidence xmin ymin xmax ymax)")
    labels = tokens[::6]
    del tokens[::6]
    # float() would read 1_0 as ten.
    if "_" in text:
        raise ValueError("an underscore is no part of a label or number")
    return labels, np.fromiter(map(float, tokens), dtype=float, count=len(tokens)).reshape(-1, 5)


def read_submission(path: str | Path) -> Submission:
    """Read a whole submission. Raises SubmissionError at the first row that cannot be scored."""
    cells = read_cells(path)
    if not cells or cells[0][1] != HEADER:
        raise SubmissionError(f"{path} must begin with the header {','.join(HEADER)}")
    ids: list[str] = []
    parts: dict[str, list[tuple[str, list[int], np.ndarray]]] = {level: [] for level in LABELS}
    for line, row in cells[1:]:
        try:
            submission_id, text = row
            name, level = split_id(submission_id)
            labels, numbers = parse_prediction(text)
            unknown = set(labels) - set(LABELS[level])
            if unknown:
                raise ValueError(f"labels {', '.join(sorted(unknown))} do not belong to a row of kind {level}")
            if not np.isfinite(numbers).all():
                raise ValueError("a number is not finite")
        except ValueError as error:
            raise SubmissionError(f"{path}, row {line}: {error}; `python -m kitlib validate` lists every fault") from error
        ids.append(submission_id)
        parts[level].append((name, [_LABEL_CODE[label] for label in labels], numbers))
    if len(set(ids)) < len(ids):
        raise SubmissionError(f"{path} has an id twice; `python -m kitlib validate` lists every fault")
    return Submission(tuple(ids), _group_table("study_id", parts["study"]), _group_table("image_id", parts["image"]))


def _group_table(key: str, parts: list[tuple[str, list[int], np.ndarray]]) -> pd.DataFrame:
    # Categories, because hundreds of thousands of repeated strings cost more time and memory than the boxes.
    codes = [code for _, labels, _ in parts for code in labels]
    rows = np.repeat(np.arange(len(parts)), [len(labels) for _, labels, _ in parts])
    numbers = np.concatenate([np.empty((0, 5)), *(numbers for *_, numbers in parts)])
    table = pd.DataFrame(numbers, columns=["score", *BOX])
    table.insert(0, key, pd.Categorical.from_codes(rows, categories=[name for name, *_ in parts]))
    table.insert(1, "label", pd.Categorical.from_codes(codes, categories=SCORED_CLASSES))
    return table


def as_tables(submission: Submission) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A submission as fused tables: studies (study_id, the four classes), nones (image_id, none), detections.

    Of a label that a row names twice the highest confidence counts; one that it does not name is 0.
    """
    studies = submission.studies.astype({"study_id": object, "label": object})
    studies = studies.pivot_table("score", "study_id", "label", "max", fill_value=0.0)
    studies = studies.reindex(columns=list(STUDY_CLASSES), fill_value=0.0).rename_axis(columns=None).reset_index()
    images = submission.images.astype({"image_id": object, "label": object})
    nones = images[images.label == "none"].groupby("image_id", as_index=False).score.max()
    detections = images[images.label == "opacity"].drop(columns="label").reset_index(drop=True)
    return studies, nones.rename(columns={"score": "none"}), detections


def write_submission(
    path: str | Path,
    ids: Iterable[str],
    study_probabilities: pd.DataFrame | None = None,
    none_probabilities: pd.DataFrame | None = None,
    detections: pd.DataFrame | None = None,
) -> tuple[str, ...]:
    """Write one row for every id, in the given order, beside and rename; return the ids that got PRIORS.

    `ids` as in sample_submission.csv. `study_probabilities`: study_id and the four classes; `none_probabilities`: image_id,
    none; `detections`: image_id, score, xmin, ymin, xmax, ymax in original pixels. Where a probability is missing or NaN,
    the prior stands. Predictions for other ids are left out, because Kaggle refuses rows it did not ask for. Raises
    ValueError for a doubled id or a value outside 0..1.
    """
    ids = list(ids)
    studies = _probabilities(study_probabilities, "study_id", STUDY_CLASSES)
    nones = _probabilities(none_probabilities, "image_id", ("none",))
    boxes = _box_strings(detections)
    lines, on_priors, known = [",".join(HEADER)], [], 0
    for submission_id in ids:
        name, level = split_id(submission_id)
        found = (studies if level == "study" else nones).get(name)
        classes = STUDY_CLASSES if level == "study" else ("none",)
        known += found is not None
        if found is None or np.isnan(found).any():
            on_priors.append(submission_id)
            found = np.array([PRIORS[label] for label in classes])
        groups = boxes.get(name, []) if level == "image" else []
        groups = groups + [f"{label} {_confidence(p)} 0 0 1 1" for label, p in zip(classes, found, strict=True)]
        lines.append(f"{submission_id},{' '.join(groups)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"ids for {path} repeat: {len(ids) - len(set(ids))} too many")
    if known < len(studies) + len(nones):
        logger.warning(
            "%s: predictions of %d ids that were not asked for are left out", path, len(studies) + len(nones) - known
        )
    if on_priors:
        logger.info("%s: %d of %d rows hold priors", path, len(on_priors), len(ids))
    write_text(path, "\n".join(lines) + "\n")
    return tuple(on_priors)


def write_all_negative(path: str | Path, ids: Iterable[str]) -> None:
    """The sample submission's answer, `negative 1` and `none 1` everywhere: the floor that a score is held against."""
    answer = {"study": "negative 1 0 0 1 1", "image": "none 1 0 0 1 1"}
    rows = [f"{submission_id},{answer[split_id(submission_id)[1]]}" for submission_id in ids]
    write_text(path, "\n".join([",".join(HEADER), *rows]) + "\n")


def _probabilities(table: pd.DataFrame | None, key: str, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    if table is None:
        return {}
    values = table[list(classes)].to_numpy(dtype=float)
    if table[key].duplicated().any():
        raise ValueError(f"{key} {table[key][table[key].duplicated()].iloc[0]} has two rows of {', '.join(classes)}")
    if (values < 0).any() or (values > 1).any():
        raise ValueError(f"{', '.join(classes)} must lie in 0..1, got {np.nanmin(values)}..{np.nanmax(values)}")
    return dict(zip(table[key], values, strict=True))


def _box_strings(detections: pd.DataFrame | None) -> dict[str, list[str]]:
    """image_id -> its `opacity` groups, highest score first."""
    if detections is None or detections.empty:
        return {}
    values = detections[["score", *BOX]].to_numpy(dtype=float)
    if not np.isfinite(values).all() or (values[:, 0] < 0).any() or (values[:, 0] > 1).any():
        raise ValueError("detections must have scores in 0..1 and finite boxes")
    # A tenth of a pixel is written; what loses its area by that would make Kaggle refuse the file.
    rounded = values[:, 1:].round(1)
    kept = (rounded[:, 0] < rounded[:, 2]) & (rounded[:, 1] < rounded[:, 3])
    ids, values = detections["image_id"].to_numpy(dtype=object)[kept], values[kept]
    order = np.argsort(-values[:, 0], kind="stable")
    strings: dict[str, list[str]] = {}
    for name, (score, xmin, ymin, xmax, ymax) in zip(ids[order], values[order].tolist(), strict=True):
        strings.setdefault(name, []).append(f"opacity {_confidence(score)} {xmin:.1f} {ymin:.1f} {xmax:.1f} {ymax:.1f}")
    return strings


def _confidence(p: float) -> str:
    """Seven significant digits (a float32's), never in exponent notation: not every reader of the format knows it."""
    text = f"{p:.7g}"
    return text if "e" not in text else f"{p:.15f}".rstrip("0").rstrip(".")
