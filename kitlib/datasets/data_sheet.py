"""What a set of images with exclusive classes is made of, and what in it could be learnt instead of the disease."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kitlib.tables import check_table, class_columns

AGE_GROUPS = {"0-17": 18, "18-39": 40, "40-64": 65, "65+": np.inf}  # up to these years
UNKNOWN = "unknown"
CHILD = "child"  # in the column age_group, where a set says so of images whose age nobody knows
NEARLY_ALL = 0.95


@dataclass(frozen=True)
class DataSheet:
    """`tables` has, for source, view, sex and age, the images of each class (a row) with each value (a column).

    `flags` has the columns kind, which ("" where it is not of one class or fold) and problem, worst kinds first.
    """

    tables: dict[str, pd.DataFrame]
    flags: pd.DataFrame


def exclusive(labels: pd.DataFrame) -> bool:
    """Whether exactly one of several classes is true of every row."""
    values = labels[class_columns(labels, "labels")].to_numpy(dtype=float)
    return bool(values.shape[1] > 1 and np.isin(values, [0, 1]).all() and (values.sum(axis=1) == 1).all())


def data_sheet(
    images: pd.DataFrame,
    labels: pd.DataFrame,
    folds: pd.DataFrame | None = None,
    near_duplicates: pd.DataFrame | None = None,
) -> DataSheet:
    """What `images` show by source, view, sex and age, and what must be told with every figure that is computed on them.

    An age is of AGE_GROUPS, or unknown; who has none is a child where the column `age_group` says so. Flagged are: a class
    without images; one whose images come nearly all from one of several sources; one of children beside one of adults; a
    class that a fold lacks; patients, and groups of `near_duplicates` (image_id, group), that are in several of the folds,
    or in a fold and the official test set. Raises ValueError where the labels are not exclusive.
    """
    images, labels = check_table(images, "images"), check_table(labels, "labels")
    if not exclusive(labels):
        raise ValueError("the labels are not exclusive: a data sheet wants exactly one of several classes for every study")
    classes = class_columns(labels, "labels")
    truth = labels.set_index("id")[classes].idxmax(axis=1)
    shown = pd.Categorical(images.study_id.map(truth), categories=classes)
    values = {
        "source": images.source,
        "view": images["view"].replace("", UNKNOWN),
        "sex": images.get("sex", pd.Series("", images.index)).fillna("").replace("", UNKNOWN),
        "age": age_groups(images),
    }
    tables = {
        name: pd.crosstab(shown, column.to_numpy(), dropna=False).rename_axis(index="class", columns=name)
        for name, column in values.items()
    }
    known = [name for name in (*AGE_GROUPS, UNKNOWN) if name in tables["age"]]
    tables["age"] = tables["age"][known]
    flags = _of_sources(tables["source"]) + _of_ages(tables["age"])
    if folds is not None:
        flags += _of_folds(images.assign(shown=shown.astype(object)), classes, folds, near_duplicates)
    return DataSheet(tables, pd.DataFrame(flags, columns=["kind", "which", "problem"], dtype=object))


def age_groups(images: pd.DataFrame) -> pd.Series:
    """A key of AGE_GROUPS, or UNKNOWN, for every image."""
    years = images.age if "age" in images else pd.Series(np.nan, index=images.index)
    groups = pd.cut(years, [0, *AGE_GROUPS.values()], right=False, labels=list(AGE_GROUPS)).astype(object)
    child = (images.age_group == CHILD) if "age_group" in images else pd.Series(False, index=images.index)
    return groups.where(groups.notna(), np.where(child, next(iter(AGE_GROUPS)), UNKNOWN))


def data_sheet_figure(sheet: DataSheet) -> Figure:
    """A panel a table: each class's images by value, as shares of the class, with its number of images."""
    figure = Figure(figsize=(11, 1.6 + 0.9 * len(sheet.tables["source"])), layout="constrained")
    for axis, (name, table) in zip(figure.subplots(2, 2).ravel(), sheet.tables.items(), strict=True):
        counts = table.sum(axis=1)
        shares = table.div(counts.clip(lower=1), axis=0)
        shares.index = [f"{row} ({counts[row]})" for row in table.index]
        shares[::-1].plot.barh(stacked=True, ax=axis, width=0.8, colormap="tab20")
        axis.set(xlim=(0, 1), xlabel=f"share of the class's images, by {name}", ylabel="")
        axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _of_sources(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    flags = [("no image", name, "no image shows this class") for name in table.index[table.sum(axis=1) == 0]]
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
                    f"{share:.1%} of its {counts.sum()} images are of {source}, {of_source:.1%} of whose images show it: "
                    "what marks the source can pass for what marks the class",
                )
            )
    best, most = table.max(axis=0).sum() / table.to_numpy().sum(), table.sum(axis=1).max() / table.to_numpy().sum()
    if flags:
        flags.append(
            (
                "one source",
                "",
                f"by its source alone {best:.1%} of the images are told right, {most:.1%} by the commonest class",
            )
        )
    return flags


def _of_ages(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    known = table.drop(columns=UNKNOWN, errors="ignore")
    children = known.get("0-17", pd.Series(0, index=known.index)) / known.sum(axis=1).replace(0, np.nan)
    adult = children.index[children <= 1 - NEARLY_ALL]
    return [
        (
            "children among adults",
            name,
            f"{share:.1%} of the images whose age is known are children's, and none or nearly none of {', '.join(adult)}: "
            "age can pass for what marks the class",
        )
        for name, share in children[children >= NEARLY_ALL].items()
        if len(adult)
    ]


def _of_folds(
    images: pd.DataFrame, classes: list[str], folds: pd.DataFrame, near_duplicates: pd.DataFrame | None
) -> list[tuple[str, str, str]]:
    place = images.image_id.map(folds.set_index("id").fold.map("fold {}".format))
    if "split" in images:
        place = place.mask(images.split == "test", "the test set")
    placed = images.assign(place=place)[place.notna()]
    flags = []
    spread = {"patient": placed.patient_id}
    if near_duplicates is not None:
        spread["group of near-duplicates"] = placed.image_id.map(near_duplicates.set_index("image_id").group)
    for name, groups in spread.items():
        places = placed.place.groupby(groups).nunique()
        if (places > 1).any():
            first = placed[groups == places.index[places > 1][0]]
            examples = ", ".join(f"{row.image_id} in {row.place}" for row in first.head(3).itertuples())
            flags.append(("leak", "", f"{(places > 1).sum()} times a {name} is in several places, first: {examples}"))
    counts = pd.crosstab(placed.place, placed.shown).reindex(columns=classes, fill_value=0)
    for name in counts.index:
        lacking = [each for each in classes if counts.loc[name, each] == 0]
        if lacking:
            flags.append(("class missing", name, f"has no image of {', '.join(lacking)}"))
    return flags
