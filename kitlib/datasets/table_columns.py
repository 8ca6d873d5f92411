"""The parameter `columns` of notebook 10, which says what the columns of a user's own table mean, and its checks."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.errors import DatasetError, SettingsError
from kitlib.settings import Settings

BOX_KEYS = ("xmin", "ymin", "xmax", "ymax", "width", "height")


@dataclass(frozen=True)
class Columns(Settings):
    """The column names of a user's own table: each field is the name of one column, or "" if the table lacks the column.

    For classes, set either `label`, one column that contains class names, or `labels`, a list of columns that contain 0, 1
    or blank (unknown), one column per class. For boxes, in pixels of the image files, set `xmin`, `ymin`, and either `xmax`
    and `ymax` or `width` and `height`. Raises SettingsError if fields contradict each other, or if two fields name the same
    column.
    """

    file: str = ""  # the image file: a name or path; its suffix and the folders before it may be missing
    patient: str = ""
    study: str = ""
    view: str = ""
    source: str = ""  # hospital, device or collection of each image
    split: str = ""  # train or test
    label: str = ""
    labels: tuple[str, ...] = ()
    sex: str = ""
    age: str = ""  # years
    xmin: str = ""
    ymin: str = ""
    xmax: str = ""
    ymax: str = ""
    width: str = ""
    height: str = ""
    finding: str = ""  # what a box shows
    box_file: str = ""  # the image file in `boxes_table`, if its column is not called as in the table

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [*self.single().values(), *self.labels]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"the parameter `columns` names {repeated[0]!r} twice; each key needs a column of its own")
        if self.label and self.labels:
            raise SettingsError(
                f"`columns` has both `label` ({self.label!r}) and `labels` ({list(self.labels)}); keep `label` if one "
                "column contains the class of each image, or `labels` if each class has a column of 0 and 1"
            )
        box_keys = {key for key in BOX_KEYS if getattr(self, key)}
        if box_keys not in (set(), {"xmin", "ymin", "xmax", "ymax"}, {"xmin", "ymin", "width", "height"}):
            raise SettingsError(
                f"`columns` has the box keys {', '.join(map(repr, sorted(box_keys)))}; set exactly 'xmin', 'ymin', 'xmax' "
                "and 'ymax', or 'xmin', 'ymin', 'width' and 'height'"
            )
        if self.finding and not box_keys:
            raise SettingsError("`columns` has `finding`, but no box; set the box keys, or only `label` for classes")

    @property
    def box(self) -> tuple[str, ...]:
        """The names of the table's four box columns, in the order of BOX_KEYS; empty if the table has no boxes."""
        return tuple(name for key in BOX_KEYS if (name := getattr(self, key)))

    def single(self) -> dict[str, str]:
        """Return a dict from field to column name for all fields that are set, except `labels` (a list) and `box_file`."""
        keys = [key for key, value in vars(self).items() if isinstance(value, str) and key != "box_file"]
        return {key: name for key in keys if (name := getattr(self, key))}


def check_columns(table: pd.DataFrame, path: Path, wanted: Sequence[tuple[str, str]]) -> None:
    """Raise DatasetError unless `table` has each column in `wanted`, which are pairs (field of Columns, column name).

    `path` is the table's file, for messages.
    """
    names = list(table.columns)
    for key, name in wanted:
        if name not in names:
            folded = {column.casefold(): column for column in names}
            close = difflib.get_close_matches(name.casefold(), folded)
            hint = f"; the closest is {folded[close[0]]!r}" if close else ""
            raise DatasetError(
                f"{path.name} has no column {name!r}, which the parameter `columns` gives for the key {key!r}{hint}. Choose "
                f"one of its columns: {', '.join(map(repr, names))}"
            )
        if names.count(name) > 1:
            raise DatasetError(
                f"{path.name} has {names.count(name)} columns {name!r}; rename all but the column for the key {key!r}"
            )
