"""Makes a data sheet of images with mutually exclusive classes: counts by source, view, sex and age, and warnings."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kitlib.tables import check_table, class_columns
from kitlib.xrays.modality import NOT_AN_XRAY

AGE_GROUPS = {"0-17": 18, "18-39": 40, "40-64": 65, "65+": np.inf}  # name -> upper bound in years, exclusive
UNKNOWN = "unknown"
CHILD = "child"  # value of the column age_group in data sets of children without exact ages
NEARLY_ALL = 0.95  # share of images


@dataclass(frozen=True)
class DataSheet:
    """Image counts of a data set with mutually exclusive classes, and warnings about the data set.

    `tables` has a table of image counts for each of "source", "view", "sex" and "age", with one row per class and one column
    per value. `flags` has one row per warning and the columns kind, which (the class, fold or test set that the warning
    concerns, "" if none) and problem. Warnings about sources come first, then ages, modalities and folds.
    """

    tables: dict[str, pd.DataFrame]
    flags: pd.DataFrame


def are_exclusive(labels: pd.DataFrame) -> bool:
    """Return whether every row of a `labels` table has a 1 for exactly one of two or more classes and 0 for all others."""
    values = labels[class_columns(labels, "labels")].to_numpy(dtype=float)
    return bool(values.shape[1] > 1 and np.isin(values, [0, 1]).all() and (values.sum(axis=1) == 1).all())


def make_data_sheet(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    folds: pd.DataFrame | None = None,
    near_duplicates: pd.DataFrame | None = None,
    decoding: pd.DataFrame | None = None,
) -> DataSheet:
    """Return a DataSheet: image counts of each class by source, view, sex and age, and warnings of what can bias results.

    Ages are grouped as in AGE_GROUPS. An image without an age is in the group 0-17 if its `age_group` is "child", otherwise
    in the group "unknown". `near_duplicates` has the columns image_id and group. `decoding` is the table that XrayCache.fill
    returns. Warnings concern classes without images, classes with nearly all images from one of several sources, classes
    of children if another class is of adults, classes missing from a fold, and classes with images that are no projection
    X-rays according to `decoding`. Warnings also concern patients and groups of near-duplicates that are in several folds,
    or in a fold and in the official test set. Raises ValueError if the classes are not mutually exclusive.
    """
    images, labels = check_table(images, "images"), check_table(labels, "labels")
    if not are_exclusive(labels):
        raise ValueError(
            "the labels are not exclusive: a data sheet requires exactly one of at least two classes for every study"
        )
    classes = class_columns(labels, "labels")
    truth = labels.set_index("id")[classes].idxmax(axis=1)
    image_classes = pd.Categorical(images.study_id.map(truth), categories=classes)
    values = {
        "source": images.source,
        "view": images["view"].replace("", UNKNOWN),
        "sex": images.get("sex", pd.Series("", images.index)).fillna("").replace("", UNKNOWN),
        "age": group_ages(images),
    }
    tables = {
        name: pd.crosstab(image_classes, column.to_numpy(), dropna=False).rename_axis(index="class", columns=name)
        for name, column in values.items()
    }
    groups = [name for name in (*AGE_GROUPS, UNKNOWN) if name in tables["age"]]
    tables["age"] = tables["age"][groups]
    flags = _flag_sources(tables["source"]) + _flag_ages(tables["age"])
    if decoding is not None:
        flags += _flag_modalities(images.assign(true_class=image_classes.astype(object)), decoding)
    if folds is not None:
        flags += _flag_folds(images.assign(true_class=image_classes.astype(object)), classes, folds, near_duplicates)
    return DataSheet(tables, pd.DataFrame(flags, columns=["kind", "which", "problem"]))


def group_ages(images: pd.DataFrame) -> pd.Series:
    """Return the age group of every image, a key of AGE_GROUPS or "unknown", with the index of `images`."""
    years = images.age if "age" in images else pd.Series(np.nan, index=images.index)
    groups = pd.cut(years, [0, *AGE_GROUPS.values()], right=False, labels=list(AGE_GROUPS)).astype(object)
    child = (images.age_group == CHILD) if "age_group" in images else pd.Series(False, index=images.index)
    return groups.where(groups.notna(), np.where(child, next(iter(AGE_GROUPS)), UNKNOWN))


def data_sheet_figure(sheet: DataSheet) -> Figure:
    """Return a figure with one panel per table of the data sheet.

    A panel has one bar per class, labelled with the class's number of images. The bar's parts are the shares of these images
    with each value, such as each source.
    """
    figure = Figure(figsize=(11, 1.6 + 0.9 * len(sheet.tables["source"])), layout="constrained")
    for axis, (name, table) in zip(figure.subplots(2, 2).ravel(), sheet.tables.items(), strict=True):
        counts = table.sum(axis=1)
        shares = table.div(counts.clip(lower=1), axis=0)
        shares.index = [f"{row} ({counts[row]})" for row in table.index]
        shares[::-1].plot.barh(stacked=True, ax=axis, width=0.8, colormap="tab20")
        axis.set(xlim=(0, 1), xlabel=f"share of the class's images, by {name}", ylabel="")
        axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _flag_sources(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    flags = [("no image", name, "there is no image of this class") for name in table.index[table.sum(axis=1) == 0]]
    if table.shape[1] < 2:
        return flags
    for name, counts in table[table.sum(axis=1) > 0].iterrows():
        source, share = counts.idxmax(), counts.max() / counts.sum()
        if share >= NEARLY_ALL:
            of_source = counts[source] / table[source].sum()
            flags.append(
                (
                    "one source",
                    name,
                    f"{share:.1%} of this class's {counts.sum()} images are from {source}, and {of_source:.1%} of the "
                    "images from there show this class: a model may learn to recognise the source instead of the class",
                )
            )
    best, most = table.max().sum() / table.to_numpy().sum(), table.sum(axis=1).max() / table.to_numpy().sum()
    if flags:
        flags.append(
            (
                "one source",
                "",
                f"predicting the class from the source alone is right for {best:.1%} of the images; always predicting the "
                f"most frequent class is right for {most:.1%}",
            )
        )
    return flags


def _flag_ages(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    known_ages = table.drop(columns=UNKNOWN, errors="ignore")
    children = known_ages.get("0-17", pd.Series(0, index=known_ages.index)) / known_ages.sum(axis=1)
    adult = children.index[children <= 1 - NEARLY_ALL]
    return [
        (
            "children among adults",
            name,
            f"{share:.1%} of this class's images with a known age show children, but (nearly) no image of "
            f"{', '.join(adult)} does: a model may learn to recognise the age instead of the class",
        )
        for name, share in children[children >= NEARLY_ALL].items()
        if len(adult)
    ]


def _flag_modalities(images: pd.DataFrame, decoding: pd.DataFrame) -> list[tuple[str, str, str]]:
    warnings = decoding.set_index("image_id").warnings.explode().dropna()
    others = warnings[warnings.str.startswith(NOT_AN_XRAY)]
    classes = others.index.map(images.set_index("image_id").true_class)
    return [
        ("not an X-ray", name, f"{count} images of this class: {warning}")
        for (name, warning), count in others.groupby([classes, others]).size().items()
    ]


def _flag_folds(
    images: pd.DataFrame, classes: list[str], folds: pd.DataFrame, near_duplicates: pd.DataFrame | None
) -> list[tuple[str, str, str]]:
    location = images.image_id.map(folds.set_index("id").fold.map("fold {}".format))
    if "split" in images:
        location = location.mask(images.split == "test", "the test set")
    located = images.assign(location=location)[location.notna()]
    flags = []
    spread = {"patients": located.patient_id}
    if near_duplicates is not None:
        spread["groups of near-duplicates"] = located.image_id.map(near_duplicates.set_index("image_id").group)
    for name, groups in spread.items():
        counts_of_locations = located.location.groupby(groups).nunique()
        if (counts_of_locations > 1).any():
            first = located[groups == counts_of_locations.index[counts_of_locations > 1][0]]
            examples = ", ".join(f"{row.image_id} in {row.location}" for row in first.head(3).itertuples())
            flags.append(
                (
                    "leak",
                    "",
                    f"{name} in several folds, or in a fold and the test set: {(counts_of_locations > 1).sum()}; "
                    f"the first: {examples}",
                )
            )
    counts = pd.crosstab(located.location, located.true_class).reindex(columns=classes, fill_value=0)
    for name in counts.index:
        missing = [class_name for class_name in classes if counts.loc[name, class_name] == 0]
        if missing:
            flags.append(("class missing", name, f"has no image of {', '.join(missing)}"))
    return flags
