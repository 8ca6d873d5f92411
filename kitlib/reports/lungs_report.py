"""How well lungs were segmented, and how many images' lungs are of no use: tables with intervals, counted by class."""

import numpy as np
import pandas as pd

from kitlib.lungs.finders import FOUND
from kitlib.tables import check_table, class_columns

# Median Dice of two people who drew the lungs, with the heart, of the same 62 COVID images (annotations of V7 Labs and of
# GeneralBlockchain): more than about that is a matter of the hand that drew.
HUMAN_AGREEMENT = 0.950
ALL = "all"


def overlap_report(
    scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame, samples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """A row a structure and class of images, `all` first: images, patients, and of Dice and Jaccard the mean, its interval
    of 95 %, the median and the lowest.

    `scores` is a table mask_scores with one row an image and structure; images, labels as in kitlib.tables. Intervals are
    percentiles of means over whole patients drawn with replacement, the same draws for each row of a class. Raises
    ValueError for images that are not in `images` or come twice, as of several models.
    """
    scores = check_table(scores, "mask_scores")
    twice = scores.image_id[scores.duplicated(["image_id", "structure"])]
    if len(twice):
        raise ValueError(f"{twice.nunique()} images have several rows of scores, first {twice.iloc[0]}; give one model's")
    joined = _with_classes(scores, images, labels)
    rows = []
    for (structure, name), part in joined.groupby(["structure", "class"], sort=False):
        row = {"structure": structure, "class": name, "images": len(part), "patients": part.patient_id.nunique()}
        for measure in ("dice", "jaccard"):
            low, high = clustered_interval(part[measure].to_numpy(), part.patient_id.to_numpy(), samples, seed)
            told = {"": part[measure].mean(), "_low": low, "_high": high, "_median": part[measure].median()}
            row |= {f"{measure}{what}": value for what, value in told.items()} | {f"{measure}_min": part[measure].min()}
        rows.append(row)
    return pd.DataFrame(rows)


def clustered_interval(
    values: np.ndarray, patients: np.ndarray, samples: int = 500, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (n,), whole `patients` (n,) drawn with replacement."""
    low, high = np.quantile(_means(values, patients, samples, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def dice_draws(scores: pd.DataFrame, images: pd.DataFrame, samples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Mean Dice as the column `score`: of all `images` first, then of each of the draws of whole patients.

    `scores` has one row an image. The same images and one seed give the same draws: the difference of two such tables is a
    paired comparison.
    """
    dice = scores.set_index("image_id").dice.loc[images.image_id].to_numpy()
    drawn = _means(dice, images.patient_id.to_numpy(), samples, seed)
    return pd.DataFrame({"score": [dice.mean(), *drawn]})


def _means(values: np.ndarray, patients: np.ndarray, samples: int, seed: int) -> np.ndarray:
    _, codes = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=samples)
    return times @ sums / (times @ counts)


def verdicts(lungs: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """A row a class, `all` first: images, how many of each verdict there are, and the share that was not found.

    `lungs` is the table of a run that applied a segmenter. Unequal shares say that a rule of exclusion favours a class.
    """
    joined = _with_classes(check_table(lungs, "lungs"), images, labels)
    counts = pd.crosstab(joined["class"], joined.verdict).reindex(joined["class"].unique())
    counts = counts[[FOUND, *(name for name in counts if name != FOUND)]] if FOUND in counts else counts.assign(found=0)
    total = counts.sum(axis=1)
    counts.insert(0, "images", total)
    return counts.assign(not_found=1 - counts[FOUND] / total).rename_axis(columns=None).reset_index()


def _with_classes(table: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """The table's rows under the class `all`, then again under each class of their image that is true."""
    known = table.merge(images[["image_id", "study_id", "patient_id"]], on="image_id", how="left")
    strangers = known.image_id[known.study_id.isna()]
    if len(strangers):
        raise ValueError(f"{strangers.nunique()} images are not in the table images, first {strangers.iloc[0]}")
    truth = labels.set_index("id").reindex(known.study_id)
    parts = [known.assign(**{"class": ALL})]
    for name in class_columns(labels, "labels"):
        parts.append(known[(truth[name] >= 0.5).to_numpy()].assign(**{"class": name}))
    return pd.concat(parts, ignore_index=True)
