"""Reads several data sets as one, with the classes of one scheme or with lung masks of one convention."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kitlib.classes import CLASS_SCHEMES, DIAGNOSES, scheme_classes
from kitlib.datasets.base import Dataset, one_hot
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.registry import OWN, read_parts
from kitlib.tables import check_table, empty_table

# Data set without diagnoses -> label -> diagnosis. The first label that is true decides; if no label is true: "other".
DIAGNOSED = {
    "nih": {"No Finding": "normal", "Pneumonia": "pneumonia"},
    "montgomery": {"normal": "normal"},
    "shenzhen": {"normal": "normal"},
}


def read_pool(parts: Mapping[str, str | Path | DataFolder], scheme: str, progress: bool = True, **own: Any) -> Dataset:
    """Read several data sets as one Dataset; `parts` maps the names of the data sets (keys of READERS) to their folders.

    Labels have one column for each class of `scheme`, a key of CLASS_SCHEMES; exactly one class of each image is 1. Images
    whose diagnosis has no class in the scheme are left out; `faults` has a row for each such diagnosis of a data set. An
    image_id that occurs in two data sets is prefixed with the data set's name in both. Every image is a study of its own;
    `images` has the columns `diagnosis` and `source`. Official splits are retained; images from data sets without a split
    are "train". There are no boxes. `own` is passed to `read_own`, which reads the part "table": the user's own images.
    Raises ValueError if the scheme is unknown, a data set has no diagnoses, or no image remains.
    """
    classes = scheme_classes(scheme)
    sets = {name: _with_diagnosis(data, name) for name, data in read_parts(parts, progress, **own).items()}
    ids = pd.Series([image_id for data in sets.values() for image_id in data.images.image_id])
    clashing = set(ids[ids.duplicated()])
    images, masks, faults = [], [], []
    for name, data in sets.items():
        images.append(data.images.assign(image_id=_prefix_clashing(data.images.image_id, clashing, name)))
        if data.masks is not None:
            masks.append(data.masks.assign(image_id=_prefix_clashing(data.masks.image_id, clashing, name)))
        faults += [data.faults.assign(file=f"{name}: " + data.faults.file), _excluded_faults(data.images, name, scheme)]
    pool = _fill_missing(pd.concat(images))
    pool = pool[pool.diagnosis.isin(CLASS_SCHEMES[scheme])]
    if pool.empty:
        raise ValueError(f"no image in {', '.join(parts)} has a class of the scheme {scheme!r} ({', '.join(classes)})")
    image_classes = pool.diagnosis.map(CLASS_SCHEMES[scheme])
    for name in sorted(set(classes) - set(image_classes)):
        faults.append(pd.DataFrame([(", ".join(parts), name, f"there is no image of this class of the scheme {scheme}")]))
    labels = one_hot(pool.image_id, image_classes, classes)
    all_masks = pd.concat(masks) if masks else None
    return Dataset(
        check_table(pool.assign(study_id=pool.image_id), "images", scheme),
        check_table(labels, "labels", scheme),
        empty_table("boxes"),
        _join_faults(faults),
        _published_counts(sets, scheme),
        None if all_masks is None else all_masks[all_masks.image_id.isin(pool.image_id)].reset_index(drop=True),
    )


def read_mask_pool(parts: Mapping[str, str | Path | DataFolder], progress: bool = True, **own: Any) -> Dataset:
    """Read several data sets with lung masks as one Dataset; `parts` maps their names (keys of READERS) to their folders.

    All masks must follow the same convention (see MASK_CONVENTIONS), because each convention defines lungs differently.
    Montgomery and Shenzhen can be joined, as in the UNet + HRNet paper, but neither of them with Darwin. An image_id that
    occurs in two data sets is prefixed with the data set's name in both. Labels have the columns of all data sets; a label
    that a data set lacks is unknown (NaN). `own` is passed to `read_own`, which reads the part "table": the user's own
    images. Raises ValueError if a data set has no masks, or if the conventions differ.
    """
    sets = read_parts(parts, progress, **own)
    without = [name for name, data in sets.items() if data.masks is None]
    if without:
        raise ValueError(f"the data set {without[0]} has no masks; a pool without classes requires masks in every data set")
    conventions = {name: ", ".join(sorted(set(data.images.convention))) for name, data in sets.items()}
    if len(set(conventions.values())) > 1:
        listing = ", ".join(f"{name} {convention}" for name, convention in conventions.items())
        raise ValueError(
            f"the masks follow several conventions, which define lungs differently: {listing}. Pool sets of one convention"
        )
    ids = pd.Series([image_id for data in sets.values() for image_id in data.images.image_id])
    clashing, images, labels, masks, faults, published = set(ids[ids.duplicated()]), [], [], [], [], Counter[str]()
    for name, data in sets.items():
        image_ids = _prefix_clashing(data.images.image_id, clashing, name)
        images.append(data.images.assign(image_id=image_ids, study_id=image_ids))
        labels.append(data.labels.assign(id=_prefix_clashing(data.labels.id, clashing, name)))
        masks.append(data.masks.assign(image_id=_prefix_clashing(data.masks.image_id, clashing, name)))  # type: ignore[union-attr]
        faults.append(data.faults.assign(file=f"{name}: " + data.faults.file))
        published.update(data.published)
    return Dataset(
        check_table(_fill_missing(pd.concat(images)), "images"),
        check_table(pd.concat(labels), "labels"),
        empty_table("boxes"),
        _join_faults(faults),
        dict(published),
        pd.concat(masks, ignore_index=True),
    )


def sample_images(images: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """Return a random sample of at most `count` rows of `images`, with about the same share of each source and diagnosis.

    `images` is the table of a pool; the sampled rows keep its order. Which rows are sampled depends on `seed` and the image
    ids, but not on the order of the rows. Images of one patient are sampled independently.
    """
    shuffled = images.sort_values("image_id").sample(frac=1, random_state=np.random.default_rng(seed))
    groups = shuffled.groupby(["source", "diagnosis"])
    # Because of the offset of one half, the first image of a small group ranks behind the first image of a large group.
    share = (groups.cumcount() + 0.5) / groups["image_id"].transform("size")
    return images[images.index.isin(share.sort_values(kind="stable").index[:count])]


def _prefix_clashing(image_ids: pd.Series, clashing: set[str], name: str) -> pd.Series:
    return image_ids.mask(image_ids.isin(list(clashing)), f"{name}-" + image_ids)


def _with_diagnosis(data: Dataset, name: str) -> Dataset:
    """Return `data` with a column `diagnosis` in `images`; if the column is missing, it is derived from the labels.

    Raises ValueError if the column is missing and DIAGNOSED does not say how to derive it for the data set `name`.
    """
    if "diagnosis" in data.images:
        return data
    if name == OWN:
        raise ValueError(
            f"the scheme needs diagnoses, which your own images lack. Diagnoses are {', '.join(DIAGNOSES)}; "
            "rename your classes to diagnoses by `class_names`, such as {COVID: COVID-19}"
        )
    if name not in DIAGNOSED:
        raise ValueError(
            f"the data set {name} has no diagnoses, so its images fit no scheme of classes. Only the labels of these data "
            f"sets can be converted to diagnoses: {', '.join(DIAGNOSED)}"
        )
    labels = data.labels.set_index("id").loc[data.images.study_id]
    diagnosis = pd.Series("other", index=data.images.index)
    for label, label_diagnosis in reversed(DIAGNOSED[name].items()):
        diagnosis = diagnosis.mask((labels[label] > 0.5).to_numpy(), label_diagnosis)
    return replace(data, images=data.images.assign(diagnosis=diagnosis))


def _excluded_faults(images: pd.DataFrame, name: str, scheme: str) -> pd.DataFrame:
    counts = images.diagnosis[~images.diagnosis.isin(CLASS_SCHEMES[scheme])].value_counts().sort_index()
    return pd.DataFrame(
        [
            (name, diagnosis, f"{count} images have this diagnosis, which has no class in the scheme {scheme}; left out")
            for diagnosis, count in counts.items()
        ]
    )


def _fill_missing(images: pd.DataFrame) -> pd.DataFrame:
    """Return `images` with "" in place of missing texts. If there is a column `split`, its missing values become "train"."""
    if "split" in images:
        images["split"] = images.split.astype(object).where(images.split.notna(), "train")
    texts = [column for column in images if images[column].map(lambda cell: isinstance(cell, str)).any()]
    return images.assign(**{column: images[column].where(images[column].notna(), "") for column in texts})


def _join_faults(faults: list[pd.DataFrame]) -> pd.DataFrame:
    rows = [row for table in faults for row in table.itertuples(index=False, name=None)]
    return pd.DataFrame(rows, columns=["file", "row", "problem"])


def _published_counts(sets: dict[str, Dataset], scheme: str) -> dict[str, int]:
    """Return a dict from class to its published number of images, summed over the data sets.

    A class is left out if one of the data sets contains it but published no number for it.
    """
    counts: dict[str, int] = {}
    unknown = set()
    for data in sets.values():
        for diagnosis in set(data.images.diagnosis) & set(CLASS_SCHEMES[scheme]):
            name = CLASS_SCHEMES[scheme][diagnosis]
            if diagnosis not in data.published:
                unknown.add(name)
            counts[name] = counts.get(name, 0) + data.published.get(diagnosis, 0)
    return {name: count for name, count in counts.items() if name not in unknown}
