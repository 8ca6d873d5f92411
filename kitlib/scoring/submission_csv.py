"""Reads and writes SIIM-COVID's submission.csv, its ids and its prediction strings.

A row has an id, `<id>_study` or `<id>_image`, and a prediction string. The string consists of groups of six words: label,
confidence, xmin, ymin, xmax and ymax. Study classes and `none` have the one-pixel box `0 0 1 1`; `opacity` boxes are in
pixels of the original DICOM image.
"""

import csv
import logging
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.atomic import write_text
from kitlib.classes import IMAGE_CLASSES, SCORED_CLASSES, STUDY_CLASSES
from kitlib.datasets.sample_submission import HEADER
from kitlib.errors import SubmissionError
from kitlib.scoring.placeholders import ONE_PIXEL_LABELS, PRIORS, format_confidence, one_pixel_groups
from kitlib.tables import BOX

logger = logging.getLogger(__name__)

ONE_PIXEL = (0.0, 0.0, 1.0, 1.0)
LABELS = {"study": STUDY_CLASSES, "image": IMAGE_CLASSES}
_LABEL_CODE = {label: code for code, label in enumerate(SCORED_CLASSES)}


@dataclass(frozen=True)
class Submission:
    """Contents of a submission file: its `ids` in the file's order, and two tables of its predictions.

    Each row of a table is one group (label, confidence and box) of a prediction string. `studies` has the columns study_id,
    label, score, xmin, ymin, xmax and ymax; `images` has image_id instead of study_id. In the tables, ids lack their suffix
    `_study` or `_image`; ids and labels are categorical.
    """

    ids: tuple[str, ...]
    studies: pd.DataFrame
    images: pd.DataFrame


def split_id(submission_id: str) -> tuple[str, str]:
    """Split an id such as `00188a671292_study` into `00188a671292` and `study`.

    Raises SubmissionError if the id does not end in `_study` or `_image`.
    """
    bare, _, level = submission_id.rpartition("_")
    if not bare or level not in LABELS:
        raise SubmissionError(f"id {submission_id!r} must end in _study or _image")
    return bare, level


def submission_ids(study_ids: Iterable[str], image_ids: Iterable[str]) -> list[str]:
    """Return the ids of a submission's rows: `<id>_study` of all studies, then `<id>_image` of all images."""
    return [f"{study}_study" for study in study_ids] + [f"{image}_image" for image in image_ids]


def read_cells(path: str | Path) -> list[tuple[int, list[str]]]:
    """Return each row of a CSV file, header included, as its line number (from 1) and its cells; skip blank lines.

    Raises SubmissionError if the file cannot be read.
    """
    # The csv module's default limit of 131,072 characters per cell allows only about 2,500 boxes.
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SubmissionError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error


def parse_prediction(text: str) -> tuple[list[str], np.ndarray]:
    """Parse a prediction string of n groups; return its n labels, and an array (n, 5) of its numbers.

    The columns of the array are confidence, xmin, ymin, xmax and ymax. Raises ValueError if the string does not consist of
    groups of a label and five numbers; the values of labels and numbers are not checked.
    """
    tokens = text.split()
    if not tokens or len(tokens) % 6:
        raise ValueError(f"{len(tokens)} words are not groups of six (label confidence xmin ymin xmax ymax)")
    labels = tokens[::6]
    del tokens[::6]
    # float() would accept 1_0 as ten.
    if "_" in text:
        raise ValueError("labels and numbers must not contain an underscore")
    return labels, np.fromiter(map(float, tokens), dtype=float, count=len(tokens)).reshape(-1, 5)


def read_submission(path: str | Path) -> Submission:
    """Return the contents of a submission file. Raises SubmissionError for the first row that cannot be scored."""
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
                raise ValueError(
                    f"labels {', '.join(sorted(unknown))} are not valid for an id that ends in _{level}; valid labels are: "
                    f"{', '.join(LABELS[level])}"
                )
            if not np.isfinite(numbers).all():
                raise ValueError("a number is not finite")
        except ValueError as error:
            raise SubmissionError(f"{path}, row {line}: {error}; `python -m kitlib validate` lists every fault") from error
        ids.append(submission_id)
        parts[level].append((name, [_LABEL_CODE[label] for label in labels], numbers))
    if len(set(ids)) < len(ids):
        raise SubmissionError(f"{path} has a duplicate id; `python -m kitlib validate` lists every fault")
    return Submission(tuple(ids), _group_table("study_id", parts["study"]), _group_table("image_id", parts["image"]))


def _group_table(key: str, parts: list[tuple[str, list[int], np.ndarray]]) -> pd.DataFrame:
    # Categorical columns, because hundreds of thousands of repeated strings take more time and memory than the boxes.
    codes = [code for _, labels, _ in parts for code in labels]
    rows = np.repeat(np.arange(len(parts)), [len(labels) for _, labels, _ in parts])
    numbers = np.concatenate([np.empty((0, 5)), *(numbers for *_, numbers in parts)])
    table = pd.DataFrame(numbers, columns=["score", *BOX])
    table.insert(0, key, pd.Categorical.from_codes(rows, categories=[name for name, *_ in parts]))
    table.insert(1, "label", pd.Categorical.from_codes(codes, categories=SCORED_CLASSES))
    return table


def as_tables(submission: Submission) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Convert a submission to three tables: probabilities of studies, probabilities of `none`, and detections.

    Their columns are `study_id` and the four classes; `image_id` and `none`; and `image_id`, `score`, `xmin`, `ymin`, `xmax`
    and `ymax`. If a prediction string repeats a study class or `none`, the highest confidence is used. A study class that is
    missing from a study's prediction string gets 0.
    """
    studies = submission.studies.astype({"study_id": object, "label": object})
    studies = studies.pivot_table("score", "study_id", "label", "max", fill_value=0.0)
    studies = studies.reindex(columns=list(STUDY_CLASSES), fill_value=0.0).rename_axis(columns=None).reset_index()
    images = submission.images.astype({"image_id": object, "label": object})
    nones = images[images.label == "none"].groupby("image_id", as_index=False).score.max()
    detections = images[images.label == "opacity"].drop(columns="label").reset_index(drop=True)
    return studies, nones.rename(columns={"score": "none"}), detections


def write_submission(
    path: str | Path, ids: Iterable[str], *tables: pd.DataFrame | None, **named: pd.DataFrame | None
) -> tuple[str, ...]:
    """Write a submission with one row per id, atomically; return the ids whose rows are placeholder predictions.

    `tables` and `named` are the arguments of `fill_rows` after `ids`. Raises the errors of `fill_rows`.
    """
    rows, placeholder_ids = fill_rows(ids, *tables, **named)
    if placeholder_ids:
        logger.info("%s: %d of %d rows are placeholder predictions", path, len(placeholder_ids), len(rows))
    write_text(path, "".join(f"{','.join(cells)}\n" for cells in [HEADER, *rows]))
    return tuple(placeholder_ids)


def fill_rows(
    ids: Iterable[str],
    study_probabilities: pd.DataFrame | None = None,
    none_probabilities: pd.DataFrame | None = None,
    detections: pd.DataFrame | None = None,
) -> tuple[list[list[str]], list[str]]:
    """Return a submission's rows (id and prediction string) in the order of `ids`, and the ids with placeholder predictions.

    `ids` are those of sample_submission.csv. The three tables have the columns that `as_tables` describes, with boxes in
    original pixels. If the probabilities of an id are missing or NaN, its row gets a placeholder prediction, the class
    frequencies (PRIORS). Predictions for ids that are not in `ids` are ignored, because Kaggle rejects additional rows.
    Raises ValueError for duplicate ids, for probabilities or scores outside 0..1, and for boxes that are not finite.
    """
    ids = list(ids)
    studies = _probabilities(study_probabilities, "study_id", STUDY_CLASSES)
    nones = _probabilities(none_probabilities, "image_id", ("none",))
    boxes = {} if detections is None else box_groups(detections.assign(label="opacity"))
    rows: list[list[str]] = []
    placeholder_ids, known_count = [], 0
    for submission_id in ids:
        name, level = split_id(submission_id)
        probabilities = (studies if level == "study" else nones).get(name)
        classes = ONE_PIXEL_LABELS[level]
        known_count += probabilities is not None
        if probabilities is None or np.isnan(probabilities).any():
            placeholder_ids.append(submission_id)
            probabilities = np.array([PRIORS[label] for label in classes])
        groups = boxes.get(name, []) if level == "image" else []
        rows.append([submission_id, " ".join([*groups, *one_pixel_groups(classes, probabilities)])])
    if len(set(ids)) < len(ids):
        raise ValueError(f"the ids of a submission must be unique, but {len(ids) - len(set(ids))} are duplicates")
    if known_count < len(studies) + len(nones):
        unknown = len(studies) + len(nones) - known_count
        logger.warning("%d predictions are ignored, because their ids are not in the sample submission", unknown)
    return rows, placeholder_ids


def write_all_negative(path: str | Path, ids: Iterable[str]) -> None:
    """Write a submission with `negative 1` for every study id and `none 1` for every image id, as in Kaggle's sample."""
    prediction = {"study": "negative 1 0 0 1 1", "image": "none 1 0 0 1 1"}
    rows = [f"{submission_id},{prediction[split_id(submission_id)[1]]}" for submission_id in ids]
    write_text(path, "\n".join([",".join(HEADER), *rows]) + "\n")


def _probabilities(table: pd.DataFrame | None, key: str, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    if table is None:
        return {}
    values = table[list(classes)].to_numpy(dtype=float)
    if table[key].duplicated().any():
        raise ValueError(
            f"{key} {table[key][table[key].duplicated()].iloc[0]} has several rows of probabilities; expected one"
        )
    if (values < 0).any() or (values > 1).any():
        raise ValueError(f"{', '.join(map(repr, classes))}: expected 0..1, got {np.nanmin(values)}..{np.nanmax(values)}")
    return dict(zip(table[key], values, strict=True))


def box_groups(detections: pd.DataFrame, boxless: Collection[str] = ()) -> dict[str, list[str]]:
    """Return a dict from image_id to the groups of the prediction string, each `label confidence xmin ymin xmax ymax`.

    The groups of an image are sorted by falling score. `detections` has `image_id`, `label`, `score`, `xmin`, `ymin`, `xmax`
    and `ymax`. Boxes are rounded to a tenth of a pixel; boxes without an area are left out. Labels in `boxless` describe
    whole images and get the box `0 0 1 1`. Raises ValueError for scores outside 0..1 and for boxes that are not finite.
    """
    values = detections[["score", *BOX]].to_numpy(dtype=float)
    if not ((values[:, 0] >= 0) & (values[:, 0] <= 1)).all():
        raise ValueError("detections must have scores in 0..1")
    if not np.isfinite(values[:, 1:]).all():
        raise ValueError("detections must have finite boxes")
    # Boxes are rounded to a tenth of a pixel. Boxes without area after that are left out, because Kaggle would reject them.
    rounded = values[:, 1:].round(1)
    has_area = (rounded[:, 0] < rounded[:, 2]) & (rounded[:, 1] < rounded[:, 3])
    order = np.flatnonzero(has_area)[np.argsort(-values[has_area, 0], kind="stable")]
    ids, labels = (detections[name].to_numpy(dtype=object)[order] for name in ("image_id", "label"))
    groups: dict[str, list[str]] = {}
    for name, label, (score, *corners) in zip(ids, labels, values[order].tolist(), strict=True):
        box = "0 0 1 1" if label in boxless else " ".join(f"{corner:.1f}" for corner in corners)
        groups.setdefault(name, []).append(f"{label} {format_confidence(score)} {box}")
    return groups
