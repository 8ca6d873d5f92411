"""Folds that keep a patient, and images that are nearly the same, on one side; and the check that proves it."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kitlib.errors import DatasetError
from kitlib.tables import check_table, empty_table


def make_folds(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    n_folds: int,
    seed: int = 0,
    near_duplicates: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table folds (id = image_id, fold from 0) over the images that are not `false_none` and not of the split "test".

    Images that share a patient or a group of `near_duplicates` (columns image_id, group), directly or through others, share
    a fold. Each fold gets the whole set's shares of classes (an image counts for the rarest of its own) and of box presence
    as closely as whole groups allow. Depends on `seed` and the rows, not on their order. Raises ValueError where there are
    fewer groups than folds, an image's study has no label, or `n_folds` is below 2.
    """
    kept = _looked_at(images)
    if "split" in kept:
        kept = kept[kept.split != "test"].reset_index(drop=True)
    groups = leak_groups(kept, near_duplicates)
    found = len(np.unique(groups))
    if not 2 <= n_folds <= found:
        raise ValueError(f"{n_folds} folds of {found} groups of patients: from 2 to as many folds as groups are possible")
    strata = _strata(kept, labels, boxes)
    counts = pd.crosstab(groups, strata).to_numpy()
    fold = _spread_evenly(counts, np.full(n_folds, n_folds), np.random.default_rng(seed))[groups]
    folds = check_table(pd.DataFrame({"id": kept.image_id, "fold": fold}), "folds")
    check_no_leak(folds, kept, near_duplicates)
    return folds


def hold_out_test(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    share: float,
    seed: int = 0,
    near_duplicates: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """`images` with the column `split`, "test" for about `share` of them and "train" for the others; in place of any other.

    Images that share a patient or a group of near-duplicates are on one side, and each class has its share on both as
    closely as whole groups allow; `false_none` images are of "train". With a share of 0.1, nine folds of the rest give
    80/10/10. Depends on `seed` and the rows, not on their order. Raises ValueError for a share that is not between 0 and 1,
    and where a side would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of test images is {share}, wanted more than 0 and less than 1")
    kept = _looked_at(images)
    groups = leak_groups(kept, near_duplicates)
    counts = pd.crosstab(groups, _strata(kept, labels, empty_table("boxes"))).to_numpy()
    parts = np.array([1 / (1 - share), 1 / share])
    side = _spread_evenly(counts, parts, np.random.default_rng([seed, 1]))[groups]
    if len(set(side)) < 2:
        raise ValueError(f"{len(counts)} groups of patients cannot be parted with a share of {share}: one side is empty")
    check_no_leak(pd.DataFrame({"id": kept.image_id, "fold": side}), kept, near_duplicates)
    return images.assign(split=np.where(images.image_id.isin(kept.image_id[side == 1]), "test", "train"))


def source_folds(images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table folds in which each source is a fold, numbered in the order of the alphabet: leave one source out.

    Over the images that make_folds takes. Images whose patient, or near-duplicate, is in another source too are in no fold:
    wherever they stood, something would leak. Raises ValueError where there is one source, or one loses all its images.
    """
    kept = _looked_at(images)
    if "split" in kept:
        kept = kept[kept.split != "test"].reset_index(drop=True)
    sources = sorted(set(kept.source))
    if len(sources) < 2:
        raise ValueError(f"the images are of one source, {', '.join(sources)}: folds by source need at least two")
    apart = kept.source.groupby(leak_groups(kept, near_duplicates)).transform("nunique") == 1
    lost = sorted(set(sources) - set(kept.source[apart]))
    if lost:
        raise ValueError(f"every image of {', '.join(lost)} shows a patient, or is a near-duplicate, of another source")
    kept = kept[apart]
    folds = pd.DataFrame({"id": kept.image_id, "fold": kept.source.map(sources.index)})
    folds = check_table(folds, "folds")
    check_no_leak(folds, kept, near_duplicates)
    return folds


def leak_groups(images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> np.ndarray:
    """A group number for every row of `images`: connected through patients and near-duplicates, chains included."""
    links = [pd.factorize(images.patient_id)[0]]
    if near_duplicates is not None:
        group = images.image_id.map(near_duplicates.set_index("image_id").group)
        # An image without a group is near nothing but itself.
        links.append(pd.factorize(group.astype(object).where(group.notna(), images.image_id + " alone"))[0])
    rows = np.arange(len(images))
    edges, nodes = [], len(images)
    for link in links:
        edges.append((rows, nodes + link))
        nodes += int(link.max(initial=-1)) + 1
    start, end = (np.concatenate(part) for part in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(start), dtype=bool), (start, end)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][: len(images)]


def check_no_leak(folds: pd.DataFrame, images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> None:
    """Raise DatasetError, naming patients and images, where something that must stay together lies in several folds.

    Also raises it where an image of `folds` is not in `images`: whose patient it shows cannot be checked then.
    """
    placed = check_table(folds, "folds").rename(columns={"id": "image_id"})
    placed = placed.merge(images[["image_id", "patient_id"]], on="image_id", how="left")
    unknown = placed[placed.patient_id.isna()]
    if len(unknown):
        raise DatasetError(f"{len(unknown)} images of the folds are not among the images, first {unknown.image_id.iloc[0]}")
    _refuse_spread(placed, "patient_id", "patients")
    if near_duplicates is not None:
        _refuse_spread(placed.merge(near_duplicates, on="image_id"), "group", "groups of near-duplicate images")


def _looked_at(images: pd.DataFrame) -> pd.DataFrame:
    """In the order of their ids, without what no annotator looked at."""
    kept = check_table(images, "images").sort_values("image_id", ignore_index=True)
    return kept[~kept.false_none.astype(bool)].reset_index(drop=True) if "false_none" in kept else kept


def _refuse_spread(placed: pd.DataFrame, column: str, name: str) -> None:
    spread = placed.groupby(column).fold.nunique()
    leaking = sorted(spread[spread > 1].index)
    if leaking:
        shown = "; ".join(
            f"{value} (" + ", ".join(f"{row.image_id} in fold {row.fold}" for row in rows.itertuples()) + ")"
            for value, rows in placed[placed[column].isin(leaking[:5])].groupby(column)
        )
        raise DatasetError(f"{len(leaking)} {name} are in several folds, first: {shown}. Make new folds with make_folds")


def _spread_evenly(counts: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fold for every group, given its number of images in each stratum (groups, strata).

    `parts` (folds,) are the reciprocals of the folds' shares, which sum to one: n folds of the same size have n each.
    Largest groups first, each into the fold where the squared distances from its share of every stratum, each relative to
    that, grow least; the many groups of one image then fill what is left. scikit-learn's StratifiedGroupKFold, whose order
    follows the spread within a group, ends up to 5 points off on SIIM's training set.
    """
    # The number of images settles ties. Without it a set whose strata are all rare would fill one fold only.
    counts = np.column_stack([counts, counts.sum(axis=1)])
    weight = np.r_[np.ones(counts.shape[1] - 1), 1e-3]
    even = counts.sum(axis=0) / np.asarray(parts, dtype=float)[:, None]
    filled = np.zeros(even.shape)
    fold = np.empty(len(counts), dtype=int)
    order = rng.permutation(len(counts))
    for group in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        growth = (counts[group] * (2 * (filled - even) + counts[group]) * weight / even).sum(axis=1)
        fold[group] = growth.argmin()
        filled[fold[group]] += counts[group]
    return fold


def _strata(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame) -> np.ndarray:
    """The rarest class that is true of every image, and box presence, as one number."""
    classes = check_table(labels, "labels").set_index("id")
    missing = sorted(set(images.study_id) - set(classes.index))
    if missing:
        raise ValueError(f"{len(missing)} studies have images and no label, first {missing[0]}: drop them or label them")
    true = classes.loc[images.study_id].fillna(0).to_numpy() > 0.5
    rarest_first = true[:, np.argsort(true.sum(axis=0), kind="stable")]
    rarest = np.where(rarest_first.any(axis=1), rarest_first.argmax(axis=1), true.shape[1])
    return 2 * rarest + images.image_id.isin(boxes.image_id).to_numpy()
