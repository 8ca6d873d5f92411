"""Scores submissions and plots the predictions beside the ground truth, for any competition but SIIM-COVID."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kitlib.classes import MASK_CODES
from kitlib.competitions.contract import Competition
from kitlib.reports.figures import example_images
from kitlib.reports.findings_figures import findings_images
from kitlib.reports.lungs_figures import mask_images
from kitlib.tables import BOX, read_text_table
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore
from kitlib.xrays.run_lengths import draw_runs


def score_table(competition: Competition, truth: Any, submissions: Mapping[str, str | Path]) -> pd.DataFrame:
    """Score submission files against `truth`: return a table with one row per metric and one column per submission.

    The first row is the competition's score. `submissions` maps the names of the columns to the files. Raises
    SubmissionError for a file that has a fault or whose ids are not those of `truth`.
    """
    ids = list(competition.truth_ids(truth))
    scores = {
        name: competition.metric(truth, competition.read_submission(Path(path), ids)) for name, path in submissions.items()
    }
    return pd.DataFrame(scores)


def submitted_ids(path: str | Path) -> list[str]:
    """Return the ids in the first column of a submission.csv. Raises TableError if it is not a CSV file."""
    return read_text_table(path).iloc[:, 0].tolist()


def answered_boxes(competition: Competition, answers: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return a submission's boxes in pixels of the image files; only findings in the competition's `box_classes` are kept.

    `answers` is the result of the competition's `read_submission`; its columns are kept. `images` must have the columns
    `image_id`, `rows` and `columns`, and a row for each image in `answers`.
    """
    boxes = answers[answers["finding"].isin(competition.box_classes)].astype({"finding": object}).reset_index(drop=True)
    if competition.side is None:
        return boxes
    sizes = images.set_index("image_id").loc[boxes["image_id"], ["columns", "rows", "columns", "rows"]].to_numpy(float)
    return boxes.assign(**dict(zip(BOX, (boxes[list(BOX)].to_numpy() * sizes / competition.side).T, strict=True)))


def answers_figure(
    competition: Competition,
    cache: XrayCache,
    images: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    masks: MaskStore | None,
    answers: Any,
) -> Figure:
    """Plot each X-ray in `images` with its ground truth and its submitted prediction: boxes, mask outlines or probabilities.

    `tables["labels"]`, `tables["boxes"]` and `masks` are the ground truth. If the competition has boxes, `answers` is the
    result of `answered_boxes`, with only the rows to plot. Otherwise, `answers` is the result of the competition's
    `read_submission`.
    """
    ids = images["image_id"]
    if competition.mask_classes:
        drawn = RunMasks(answers, cache, MASK_CODES[competition.mask_classes[0].lower()])
        return mask_images(cache, drawn, ids.tolist(), ids.tolist(), masks)
    if competition.box_classes:
        return example_images(cache, images, boxes=tables["boxes"], detections=answers, shown_score=0)
    return findings_images(cache, answers[answers["image_id"].isin(ids)], images, tables["labels"])


@dataclass(frozen=True)
class RunMasks:
    """Masks that are stored as runs of pixels, with the methods of a MaskStore that the figures use.

    `runs` maps each image_id to an array (n, 2) as returned by `kitlib.xrays.run_lengths.runs_of`. `read` resizes the mask
    to the decoded image in `cache`; pixels in a run have the value `code`, all others 0.
    """

    runs: Mapping[str, np.ndarray]
    cache: XrayCache
    code: int

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.runs

    def read(self, image_id: str) -> np.ndarray:
        """Return the mask of an image, uint8 (rows, columns)."""
        rows, columns = self.cache.read(image_id).pixels.shape
        mask = np.where(draw_runs(self.runs[image_id]), self.code, 0).astype(np.uint8)
        return cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_NEAREST)


def varied_sample(images: pd.DataFrame, labels: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return up to `count` random rows of `images`: half with the most frequent combination of labels, half with others."""
    classes = images[["study_id"]].merge(labels, left_on="study_id", right_on="id", how="left")[list(labels.columns[1:])]
    kind = classes.astype(str).agg(" ".join, axis=1).to_numpy()
    is_usual = pd.Series(kind == pd.Series(kind).mode().iloc[0]).to_numpy()
    order = np.random.default_rng(seed).permutation(len(images))
    usual, others = order[is_usual[order]], order[~is_usual[order]]
    chosen = [*others[: count - min(count // 2, len(usual))], *usual[: count - min(count - count // 2, len(others))]]
    return images.iloc[chosen]
