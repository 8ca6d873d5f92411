"""Reads several data sets as one, with the classes of one scheme; what the scheme has no class for is counted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from kitlib.classes import CLASS_SCHEMES, scheme_classes
from kitlib.datasets.base import Dataset, one_hot
from kitlib.datasets.registry import read_dataset
from kitlib.tables import check_table, empty_table

# What images of a set without diagnoses say of the patient, by their own labels: the first that is true counts.
DIAGNOSED = {
    "nih": {"No Finding": "normal", "Pneumonia": "pneumonia"},
    "montgomery": {"normal": "normal"},
    "shenzhen": {"normal": "normal"},
}


def read_pool(parts: Mapping[str, str | Path], scheme: str, progress: bool = True) -> Dataset:
    """The data sets `parts` (a key of READERS -> its folder) as one whose labels are the classes of `scheme`, one-hot.

    `scheme` is a key of CLASS_SCHEMES; images whose diagnosis it lacks are left out, with one fault a set and diagnosis. An
    image_id that two sets share is prefixed with the set's name in both. `study_id` is the image's, `diagnosis` and `source`
    say where an image comes from. An official split stays: images of sets without one are of "train". There are no boxes.
    Raises ValueError for another scheme, for a set whose images have no diagnosis, and where no image is left.
    """
    classes = scheme_classes(scheme)
    sets = {name: _diagnosed(read_dataset(name, folder, progress), name) for name, folder in parts.items()}
    ids = pd.Series([image_id for data in sets.values() for image_id in data.images.image_id], dtype=object)
    clashing = set(ids[ids.duplicated()])
    images, masks, faults = [], [], []
    for name, data in sets.items():
        images.append(data.images.assign(image_id=_renamed(data.images.image_id, clashing, name)))
        if data.masks is not None:
            masks.append(data.masks.assign(image_id=_renamed(data.masks.image_id, clashing, name)))
        faults += [data.faults.assign(file=f"{name}: " + data.faults.file), _left_out(data.images, name, scheme)]
    pool = _filled(pd.concat(images, ignore_index=True))
    pool = pool[pool.diagnosis.isin(CLASS_SCHEMES[scheme])].reset_index(drop=True)
    if pool.empty:
        raise ValueError(f"{', '.join(parts)} have no image of the scheme {scheme}: its classes are {', '.join(classes)}")
    pool["study_id"] = pool.image_id
    shown = pool.diagnosis.map(CLASS_SCHEMES[scheme])
    for name in sorted(set(classes) - set(shown)):
        faults.append(pd.DataFrame([(", ".join(parts), name, f"no image shows this class of the scheme {scheme}")]))
    labels = one_hot(pool.image_id, shown, classes)
    drawn = pd.concat(masks, ignore_index=True) if masks else None
    return Dataset(
        check_table(pool, "images", scheme),
        check_table(labels, "labels", scheme),
        empty_table("boxes"),
        _one_table(faults),
        _published(sets, scheme),
        None if drawn is None else drawn[drawn.image_id.isin(pool.image_id)].reset_index(drop=True),
    )


def shortened(images: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """At most `count` of a pool's `images`, in their order: about the same share of each source and diagnosis, by `seed`.

    Which ones depends on the ids, not on their order. A patient's images are not kept together.
    """
    shuffled = images.sort_values("image_id").sample(frac=1, random_state=np.random.default_rng(seed))
    groups = shuffled.groupby(["source", "diagnosis"])
    # Halves, so that what is drawn first of a small group does not come before what is drawn first of a large one.
    share = (groups.cumcount() + 0.5) / groups["image_id"].transform("size")
    return images[images.index.isin(share.sort_values(kind="stable").index[:count])]


def _renamed(image_ids: pd.Series, clashing: set[str], name: str) -> pd.Series:
    return image_ids.mask(image_ids.isin(list(clashing)), f"{name}-" + image_ids)


def _diagnosed(data: Dataset, name: str) -> Dataset:
    """The set with the column `diagnosis`, its own or by DIAGNOSED; an image's labels are those of its study."""
    if "diagnosis" in data.images:
        return data
    if name not in DIAGNOSED:
        raise ValueError(
            f"the images of {name} have no diagnosis, so that they fit no scheme of classes; sets without one that are "
            f"understood nonetheless: {', '.join(DIAGNOSED)}"
        )
    labels = data.labels.set_index("id").loc[data.images.study_id]
    diagnosis = pd.Series("other", index=data.images.index, dtype=object)
    for label, meant in reversed(DIAGNOSED[name].items()):
        diagnosis = diagnosis.mask((labels[label] > 0.5).to_numpy(), meant)
    return replace(data, images=data.images.assign(diagnosis=diagnosis))


def _left_out(images: pd.DataFrame, name: str, scheme: str) -> pd.DataFrame:
    counts = images.diagnosis[~images.diagnosis.isin(CLASS_SCHEMES[scheme])].value_counts().sort_index()
    return pd.DataFrame(
        [
            (name, diagnosis, f"{count} images have a diagnosis that the scheme {scheme} has no class for; left out")
            for diagnosis, count in counts.items()
        ]
    )


def _filled(images: pd.DataFrame) -> pd.DataFrame:
    """Text that only some sets have is "" in the others, and who has no official split is to be trained on."""
    if "split" in images:
        images["split"] = images.split.astype(object).where(images.split.notna(), "train")
    texts = [column for column in images if images[column].map(lambda cell: isinstance(cell, str)).any()]
    return images.assign(**{column: images[column].where(images[column].notna(), "") for column in texts})


def _one_table(faults: list[pd.DataFrame]) -> pd.DataFrame:
    rows = [row for table in faults for row in table.itertuples(index=False, name=None)]
    return pd.DataFrame(rows, columns=["file", "row", "problem"], dtype=object)


def _published(sets: dict[str, Dataset], scheme: str) -> dict[str, int]:
    """The counts of classes of which every set has published all that it holds."""
    counts: dict[str, int] = {}
    unknown = set()
    for data in sets.values():
        for diagnosis in set(data.images.diagnosis) & set(CLASS_SCHEMES[scheme]):
            name = CLASS_SCHEMES[scheme][diagnosis]
            if diagnosis not in data.published:
                unknown.add(name)
            counts[name] = counts.get(name, 0) + data.published.get(diagnosis, 0)
    return {name: count for name, count in counts.items() if name not in unknown}
