"""Makes folds and test splits that keep a patient's images and near-duplicates together; checks folds for leaks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kitlib.errors import DatasetError
from kitlib.tables import check_table, empty_table

# A patient id that has this many studies, and more than this share of all studies, is not that of a single patient.
PLACEHOLDER_STUDIES, PLACEHOLDER_SHARE = 10, 0.5


def make_folds(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    boxes: pd.DataFrame,
    n_folds: int,
    seed: int = 0,
    near_duplicates: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Assign images to `n_folds` stratified folds; return a `folds` table: `id` is the image id, `fold` counts from 0.

    Images that no annotator looked at (`false_none`) and images in the split "test" get no fold. Each leak group of other
    images stays in one fold (see `find_leak_groups`; `near_duplicates` has the columns image_id, group). Apart from this,
    the proportions of classes and of images with boxes are as similar across folds as possible. An image counts for its
    rarest class. The result depends on `seed` and on the rows, but not on their order. Raises ValueError if `n_folds` is
    below 2 or above the number of leak groups, or if an image's study has no label; DatasetError if most studies have the
    same patient id.
    """
    included = _annotated_images(images)
    if "split" in included:
        included = included[included.split != "test"]
    groups = _find_patient_groups(included, near_duplicates)
    n_groups = len(np.unique(groups))
    if not 2 <= n_folds <= n_groups:
        choice = f"choose from 2 to {n_groups} folds" if n_groups > 1 else "at least two groups are needed"
        raise ValueError(f"{n_groups} groups of patients cannot be divided into {n_folds} folds: {choice}")
    strata = _strata(included, labels, boxes)
    counts = pd.crosstab(groups, strata).to_numpy()
    fold = _assign_groups(counts, np.full(n_folds, n_folds), np.random.default_rng(seed))[groups]
    return check_table(pd.DataFrame({"id": included.image_id, "fold": fold}), "folds")


def hold_out_test(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    share: float,
    seed: int = 0,
    near_duplicates: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return `images` with a column `split`: "test" for about `share` of the images, "train" for the others.

    Replaces an existing split. Images that share a patient, a study or a group of near-duplicates get the same split. Apart
    from this, the proportions of classes in both splits are as similar as possible. Images that no annotator looked at
    (`false_none`) are "train". With a share of 0.1 and nine folds of the rest, a model is trained on 80 % of the images,
    validated on 10 % and tested on 10 %. The result depends on `seed` and on the rows, but not on their order. Raises
    ValueError if the share is not between 0 and 1, or if all images must stay together; DatasetError if most studies have
    the same patient id.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of test images is {share}; expected more than 0 and less than 1")
    included = _annotated_images(images)
    groups = _find_patient_groups(included, near_duplicates)
    counts = pd.crosstab(groups, _strata(included, labels, empty_table("boxes"))).to_numpy()
    parts = np.array([1 / (1 - share), 1 / share])
    if len(counts) < 2:
        raise ValueError(f"a test set requires two or more groups of patients; the images have {len(counts)}")
    side_of_group = _assign_groups(counts, parts, np.random.default_rng([seed, 1]))
    if len(set(side_of_group)) < 2:
        # Every group was nearer to the target on one side; the smallest one moves, so that neither side is empty.
        side_of_group[counts.sum(axis=1).argmin()] ^= 1
    side = side_of_group[groups]
    return images.assign(split=np.where(images.image_id.isin(included.image_id[side == 1]), "test", "train"))


def hold_out_sources(
    images: pd.DataFrame, sources: Sequence[str], near_duplicates: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return `images` with the split "test" for all images from `sources`, such as an external test set in a pool.

    Images that share a patient, a study or a group of near-duplicates with images from `sources` become "test" too. All
    other images keep their split, or get "train" if they have none. Raises ValueError for a source without images, or if no
    image remains to train on.
    """
    if missing := sorted(set(sources) - set(images.source)):
        available = ", ".join(sorted(set(images.source)))
        raise ValueError(f"test_sources: no image is from {', '.join(missing)}; available sources: {available}")
    groups = find_leak_groups(images, near_duplicates)
    held_out = np.isin(groups, groups[images.source.isin(sources)])
    split = images["split"] if "split" in images else pd.Series("train", images.index)
    split = split.fillna("train").mask(held_out, "test")
    if (split == "test").all():
        raise ValueError(f"test_sources: without {', '.join(sources)} no image remains to train on; name fewer sources")
    return images.assign(split=split)


def make_source_folds(images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a `folds` table with one fold per source, numbered alphabetically, for leave-one-source-out validation.

    Images that no annotator looked at (`false_none`) and images in the split "test" get no fold. Images whose patient, study
    or near-duplicate also occurs in another source get no fold either, because they would leak. Raises ValueError if there
    is only one source, or if a source loses all its images; DatasetError if most studies have the same patient id.
    """
    included = _annotated_images(images)
    if "split" in included:
        included = included[included.split != "test"]
    sources = sorted(set(included.source))
    if len(sources) < 2:
        raise ValueError(f"all images are from the source {', '.join(sources)}: folds by source require two or more")
    in_one_source = included.source.groupby(_find_patient_groups(included, near_duplicates)).transform("nunique") == 1
    emptied = sorted(set(sources) - set(included.source[in_one_source]))
    if emptied:
        raise ValueError(
            f"no image of {', '.join(emptied)} can be in a fold, because each shares a patient, a study or a near-duplicate "
            "with another source; use folds by patient"
        )
    included = included[in_one_source]
    folds = pd.DataFrame({"id": included.image_id, "fold": included.source.map(sources.index)})
    return check_table(folds, "folds")


def _find_patient_groups(images: pd.DataFrame, near_duplicates: pd.DataFrame | None) -> np.ndarray:
    """Return a group number for every image, as `find_leak_groups` does.

    Raises DatasetError if most studies have the same patient id: the id is then a placeholder from anonymisation.
    """
    studies = images.drop_duplicates("study_id").patient_id.value_counts()
    if len(studies) and studies.iloc[0] >= PLACEHOLDER_STUDIES and studies.iloc[0] > PLACEHOLDER_SHARE * studies.sum():
        raise DatasetError(
            f"{studies.iloc[0]} of {studies.sum()} studies have the patient id {studies.index[0]!r}, so these studies would "
            'be in one fold. If it is a placeholder from anonymisation, set folds_by to "study" in notebook 10, so that '
            "each study counts as a patient of its own, or correct the column `patient_id` of the `images` table"
        )
    return find_leak_groups(images, near_duplicates)


def find_leak_groups(images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> np.ndarray:
    """Return an int array with a group number for every row of `images`; rows with the same number must share a fold.

    Rows have the same number if they share a patient, a study or a group of near-duplicates, directly or through other rows.
    """
    # Studies too, because the files of a study may state different patients.
    links = [pd.factorize(images.patient_id)[0], pd.factorize(images.study_id)[0]]
    if near_duplicates is not None:
        group = images.image_id.map(near_duplicates.set_index("image_id").group)
        # An image that is missing from near_duplicates is a group of its own.
        links.append(pd.factorize(group.astype(object).where(group.notna(), images.image_id + " alone"))[0])
    rows = np.arange(len(images))
    edges, nodes = [], len(images)
    for link in links:
        edges.append((rows, nodes + link))
        nodes += len(images)  # a link has at most this many groups
    start, end = (np.concatenate(part) for part in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(start)), (start, end)), shape=(nodes, nodes))
    return connected_components(graph)[1][: len(images)]


def check_no_leak(folds: pd.DataFrame, images: pd.DataFrame, near_duplicates: pd.DataFrame | None = None) -> None:
    """Raise DatasetError, with examples, if a patient, a study or a group of near-duplicates is in several folds.

    Also raises DatasetError if an image in `folds` is not in `images`, because its patient is then unknown.
    """
    assigned = check_table(folds, "folds").rename(columns={"id": "image_id"})
    assigned = assigned.merge(images[["image_id", "patient_id", "study_id"]], how="left")
    unknown = assigned[assigned.patient_id.isna()]
    if len(unknown):
        raise DatasetError(
            f"{len(unknown)} images in the folds are not in the `images` table; the first is {unknown.image_id.iloc[0]!r}"
        )
    _check_one_fold_each(assigned, "patient_id", "patients")
    _check_one_fold_each(assigned, "study_id", "studies")
    if near_duplicates is not None:
        _check_one_fold_each(assigned.merge(near_duplicates), "group", "groups of near-duplicate images")


def _annotated_images(images: pd.DataFrame) -> pd.DataFrame:
    """Return the `images` table sorted by image id, without the images that no annotator looked at (`false_none`)."""
    annotated = check_table(images, "images").sort_values("image_id")
    return annotated[~annotated.false_none.astype(bool)] if "false_none" in annotated else annotated


def _check_one_fold_each(assigned: pd.DataFrame, column: str, name: str) -> None:
    fold_counts = assigned.groupby(column).fold.nunique()
    leaking = sorted(fold_counts[fold_counts > 1].index)
    if leaking:
        examples = "; ".join(
            f"{value} (" + ", ".join(f"{row.image_id} in fold {row.fold}" for row in rows.itertuples()) + ")"
            for value, rows in assigned[assigned[column].isin(leaking[:5])].groupby(column)
        )
        raise DatasetError(f"{len(leaking)} {name} are in several folds, such as {examples}. Make new folds with make_folds")


def _assign_groups(counts: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an int array (groups,) with the fold number of every group.

    `counts` (groups, strata) is the number of images of each group in each stratum (see `_strata`). `parts` (folds,) has one
    number per fold: 1 divided by the share of the images that the fold should get. For n folds of equal size, it is n.

    Groups are assigned from the largest to the smallest. The error of a fold is the sum over strata of (number of images -
    target)**2 / target; a group goes to the fold whose error it increases least. The many groups with a single image come
    last and even out the folds. scikit-learn's StratifiedGroupKFold, which orders groups by their spread over strata, is up
    to 5 percentage points off on SIIM's training set.
    """
    # The total number of images breaks ties. Without it, a single fold would be filled if all strata are rare.
    counts = np.column_stack([counts, counts.sum(axis=1)])
    weight = np.r_[np.ones(counts.shape[1] - 1), 1e-3]
    target = counts.sum(axis=0) / parts[:, None]
    filled = np.zeros(target.shape)
    fold = np.empty(len(counts), dtype=int)
    order = rng.permutation(len(counts))
    for group in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        growth = (counts[group] * (2 * (filled - target) + counts[group]) * weight / target).sum(axis=1)
        fold[group] = growth.argmin()
        filled[fold[group]] += counts[group]
    return fold


def _strata(images: pd.DataFrame, labels: pd.DataFrame, boxes: pd.DataFrame) -> list[np.ndarray]:
    """Return the stratum of each image as two arrays: the number of the image's rarest class, and whether it has a box.

    Raises ValueError if the study of an image has no label.
    """
    classes = check_table(labels, "labels").set_index("id")
    missing = sorted(set(images.study_id) - set(classes.index))
    if missing:
        raise ValueError(f"{len(missing)} studies have no label, such as {missing[0]!r}; add labels or remove their images")
    true = classes.loc[images.study_id].to_numpy() > 0.5
    # An additional class that every image has, because an image or a whole data set may have no class.
    rarest_first = np.column_stack([true[:, np.argsort(true.sum(axis=0), kind="stable")], np.ones(len(true), bool)])
    return [rarest_first.argmax(axis=1), images.image_id.isin(boxes.image_id).to_numpy()]
