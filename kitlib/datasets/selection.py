"""Selects images of a data set before folds are made: by the patient's age, by source, and by diagnosis."""

from collections.abc import Mapping

import numpy as np
import pandas as pd


def leave_out_young(images: pd.DataFrame, least_age: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `images` without the images of patients younger than `least_age` years, and a table of counts.

    Images of unknown age are kept: data sets of adults often omit the age, and for some classes more often than for others.
    The table of counts has one row per source or, if `images` has a column `diagnosis`, per source and diagnosis. Its
    columns `images`, `younger` (excluded) and `unknown_age` (kept) are numbers of images. Raises ValueError if `images` has
    no column `age`, or if no image remains.
    """
    if "age" not in images:
        raise ValueError("least_age is set, but the data set states no ages; set least_age to 0")
    is_younger, is_unknown = images["age"] < least_age, images["age"].isna()
    if is_younger.all():
        raise ValueError(f"all {len(images)} images are of patients younger than {least_age:g} years; lower least_age")
    groups = [name for name in ("source", "diagnosis") if name in images]
    counted = images[groups].assign(images=1, younger=is_younger.astype(int), unknown_age=is_unknown.astype(int))
    return images[~is_younger].reset_index(drop=True), counted.groupby(groups, as_index=False).sum()


def limit_sources(images: pd.DataFrame, most: Mapping[str, int], seed: int) -> pd.DataFrame:
    """Return `images` with at most `most[source]` images of each source in `most`, choosing whole patients at random.

    The choice depends on `seed` and the patient ids, not on the order. Raises ValueError if a source in `most` has no image.
    """
    unknown = sorted(set(most) - set(images["source"]))
    if unknown:
        raise ValueError(f"'most_of' has the sources {unknown}, but the images have {sorted(set(images['source']))}")
    kept = ~images["source"].isin(list(most))
    for source, count in sorted(most.items()):
        sizes = images[images["source"] == source].groupby("patient_id").size()
        drawn = sizes.loc[np.random.default_rng(seed).permutation(sizes.index)].cumsum()
        kept |= (images["source"] == source) & images["patient_id"].isin(drawn.index[drawn <= count])
    return images[kept].reset_index(drop=True)


def limit_diagnoses(images: pd.DataFrame, at_most: Mapping[str, int], seed: int = 0) -> pd.DataFrame:
    """Return `images` with at most `at_most[name]` images, chosen at random, of each diagnosis `name` in `at_most`.

    The number 0 means no limit. The order of `images` is preserved. The choice depends on `seed` and on the image ids, but
    not on their order. Raises ValueError if a diagnosis in `at_most` has no image, or if a number is not a whole number of
    at least 0.
    """
    available = sorted(set(images.diagnosis))
    for name, count in at_most.items():
        if name not in available:
            raise ValueError(f"'at_most' has the diagnosis {name!r}, but the images have {available}")
        if type(count) is not int or count < 0:
            raise ValueError(f"'at_most' has {count!r} for {name!r}; expected a whole number, 0 or more")
    shuffled = images.sort_values("image_id").sample(frac=1, random_state=np.random.default_rng(seed))
    limit = shuffled.diagnosis.map(lambda name: at_most.get(name) or len(images))
    kept = shuffled.groupby("diagnosis").cumcount() < limit
    return images[images.index.isin(kept.index[kept])]
