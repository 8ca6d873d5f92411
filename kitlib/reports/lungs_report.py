"""Reports on segmentation, by class: the overlap with annotated masks, and the number of images without usable lungs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kitlib.classes import SPARSE_STRUCTURES
from kitlib.lungs.clean_up import FOUND
from kitlib.tables import check_table, class_columns
from kitlib.xrays.mask_store import MaskStore

# Median Dice of two annotators who drew lungs and heart in the same 62 COVID images (annotations of V7 Labs and of
# GeneralBlockchain). Differences above about this value depend on the annotator.
HUMAN_AGREEMENT = 0.950
ALL = "all"


def overlap_report(
    scores: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame, samples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Return one row per structure and class, with the mean, interval, median and minimum of Dice and of Jaccard.

    The class `all`, with all images, comes first. `scores` is a `mask_scores` table with one row per image and structure;
    `images` and `labels` are as in kitlib.tables. The columns are `structure`, `class`, the counts `images` and `patients`,
    and for Dice `dice` (the mean), `dice_low`, `dice_high`, `dice_median` and `dice_min`; likewise for Jaccard. The 95 %
    intervals are percentiles of means over whole patients drawn with replacement; all rows of a class get the same draws.
    Raises ValueError if an image is not in `images`, or has several rows per structure, for example from several models.
    """
    scores = check_table(scores, "mask_scores")
    repeated = scores.image_id[scores.duplicated(["image_id", "structure"])]
    if len(repeated):
        raise ValueError(
            f"{repeated.nunique()} images have several rows of scores; the first image is {repeated.iloc[0]!r}. Pass the "
            "rows of one model"
        )
    joined = _with_classes(scores, images, labels)
    rows = []
    for (structure, name), part in joined.groupby(["structure", "class"], sort=False):
        row = {"structure": structure, "class": name, "images": len(part), "patients": part.patient_id.nunique()}
        for measure in ("dice", "jaccard"):
            low, high = clustered_interval(part[measure].to_numpy(), part.patient_id.to_numpy(), samples, seed)
            statistics = {"": part[measure].mean(), "_low": low, "_high": high, "_median": part[measure].median()}
            row |= {f"{measure}{suffix}": value for suffix, value in statistics.items()} | {
                f"{measure}_min": part[measure].min()
            }
        rows.append(row)
    return pd.DataFrame(rows)


def classes_of_images(
    images: pd.DataFrame, labels: pd.DataFrame, masks: MaskStore, structures: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `images` and `labels` to pass to `overlap_report` for a segmenter of `structures`.

    If the only structure is one that most images lack (SPARSE_STRUCTURES), the classes are "with NAME" and "without NAME",
    according to each image's mask; images that are not in `masks` are removed. Otherwise, both are returned unchanged.
    """
    (name, *others) = structures
    if others or name not in SPARSE_STRUCTURES:
        return images, labels
    images = images[images.image_id.isin(masks.ids)]
    has = np.array([masks.shows(image_id) for image_id in images.image_id], bool)
    classes = {"id": images.image_id, f"with {name}": has.astype(float), f"without {name}": (~has).astype(float)}
    return images.assign(study_id=images.image_id), pd.DataFrame(classes)


def examples(scores: pd.DataFrame, masks: MaskStore, count: int = 4) -> pd.DataFrame:
    """Return the rows of the `count` worst and the `count` best images in `scores`, the `mask_scores` of one structure.

    In all of these images, the structure is annotated (see `masks`). Rows of up to `count` false positives follow: images
    with an empty annotated mask, for which the structure was predicted.
    """
    has = np.array([masks.shows(image_id) for image_id in scores.image_id], bool)
    ranked, false_alarms = scores[has].sort_values("dice"), scores[~has & (scores.dice < 1)]
    return pd.concat([ranked.head(count), ranked.iloc[count:].tail(count), false_alarms.head(count)])


def clustered_interval(
    values: np.ndarray, patients: np.ndarray, samples: int = 500, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval (low, high) of the mean of `values`, with whole patients drawn with replacement.

    `values` and `patients` are arrays (n,): a value and the patient it belongs to.
    """
    low, high = np.quantile(_means(values, patients, samples, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def dice_draws(scores: pd.DataFrame, images: pd.DataFrame, samples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Return a table with the mean Dice as `score`: the first row is for all images, each later row for one bootstrap draw.

    Whole patients are drawn with replacement. `scores` has one row per image. The same images and seed get the same draws,
    so the difference of two such tables is a paired comparison.
    """
    dice = scores.set_index("image_id").dice.loc[images.image_id].to_numpy()
    drawn = _means(dice, images.patient_id.to_numpy(), samples, seed)
    return pd.DataFrame({"score": [dice.mean(), *drawn]})


def _means(values: np.ndarray, patients: np.ndarray, samples: int, seed: int) -> np.ndarray:
    _, codes = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    counts_of_draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=samples)
    return counts_of_draws @ sums / (counts_of_draws @ counts)


def verdicts(lungs: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Return the number of images per class and verdict: "found" for usable lungs, or the reason why they are not usable.

    The class `all`, with all images, comes first. `lungs` is the table of a run that applied a segmenter. The columns are
    `class`, `images`, one per verdict, and `not_found`, the share of images without usable lungs. If this share differs
    between classes, results without these images are biased towards a class.
    """
    joined = _with_classes(check_table(lungs, "lungs"), images, labels)
    counts = pd.crosstab(joined["class"], joined.verdict).reindex(joined["class"].unique())
    counts = counts[[FOUND, *(name for name in counts if name != FOUND)]] if FOUND in counts else counts.assign(found=0)
    total = counts.sum(axis=1)
    counts.insert(0, "images", total)
    return counts.assign(not_found=1 - counts[FOUND] / total).rename_axis(columns=None).reset_index()


def _with_classes(table: pd.DataFrame, images: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Return all rows of `table` with the class `all`, then, for each class, the rows of the images with this label.

    Raises ValueError for an image that is not in `images`.
    """
    joined = table.merge(images[["image_id", "study_id", "patient_id"]], on="image_id", how="left")
    unknown = joined.image_id[joined.study_id.isna()]
    if len(unknown):
        raise ValueError(f"{unknown.nunique()} images are not in the `images` table; the first is {unknown.iloc[0]}")
    truth = labels.set_index("id").reindex(joined.study_id)
    parts = [joined.assign(**{"class": ALL})]
    for name in class_columns(labels, "labels"):
        parts.append(joined[(truth[name] >= 0.5).to_numpy()].assign(**{"class": name}))
    return pd.concat(parts, ignore_index=True)
