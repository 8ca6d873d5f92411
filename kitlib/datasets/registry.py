"""Lists the data sets that the kit can read, reads them by name, and compares their counts with the published ones."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.datasets.base import Dataset
from kitlib.datasets.bimcv import read_bimcv
from kitlib.datasets.chexpert import read_chexpert
from kitlib.datasets.covid_chestxray import read_covid_chestxray
from kitlib.datasets.covidgr import read_covidgr
from kitlib.datasets.covidx import read_covidx
from kitlib.datasets.darwin import read_darwin
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.jsrt import read_jsrt
from kitlib.datasets.kermany import read_kermany
from kitlib.datasets.nih import read_nih
from kitlib.datasets.ranzcr import read_ranzcr
from kitlib.datasets.ricord import read_ricord
from kitlib.datasets.rsna import read_rsna
from kitlib.datasets.siim import read_train
from kitlib.datasets.siim_acr import read_siim_acr
from kitlib.datasets.table_reader import read_own
from kitlib.datasets.tb_lungs import read_montgomery, read_shenzhen
from kitlib.datasets.vinbigdata import read_vinbigdata
from kitlib.errors import SettingsError
from kitlib.tables import class_columns

OWN = "table"  # the name of a user's own images, see kitlib.datasets.table_reader
READERS: dict[str, Callable[..., Dataset]] = {
    "siim": read_train,
    "nih": read_nih,
    "rsna": read_rsna,
    "vinbigdata": read_vinbigdata,
    "ranzcr": read_ranzcr,
    "siim_acr": read_siim_acr,
    "jsrt": read_jsrt,
    "montgomery": read_montgomery,
    "shenzhen": read_shenzhen,
    "darwin": read_darwin,
    "covid_chestxray": read_covid_chestxray,
    "kermany": read_kermany,
    "covidx": read_covidx,
    "covidgr": read_covidgr,
    "ricord": read_ricord,
    "bimcv": read_bimcv,
    "chexpert": read_chexpert,
    OWN: read_own,
}


def read_dataset(name: str, folder: str | Path | DataFolder, progress: bool = True, source: str = "", **own: Any) -> Dataset:
    """Read the data set `name`, a key of READERS, from `folder`. The key "siim" reads only SIIM's training set.

    If the folder contains another data set in the same layout, such as a hospital's own, pass a name for it as `source`. The
    images then have this source, the patient ids begin with it, and the Dataset has no published counts. `own` has the
    parameters of `read_own` for the data set "table", a user's own images; parameters with empty values are ignored. Raises
    ValueError if `name` is unknown, SettingsError if `own` is given for another data set, DatasetError if a file is missing.
    """
    if name not in READERS:
        raise ValueError(f"unknown data set {name!r}; available: {', '.join(READERS)}")
    own = {parameter: value for parameter, value in own.items() if value}
    if own and name != OWN:
        raise SettingsError(
            f"{', '.join(own)} can only be set for your own images. To read your own images, set `dataset` to {OWN!r}. "
            f"To read {name!r}, remove these parameters"
        )
    data = READERS[name](folder, progress=progress, **own)
    if source:
        images = data.images.assign(source=source, patient_id=f"{source}-" + data.images.patient_id)
        data = replace(data, images=images, published={})
    return data


def read_parts(
    parts: Mapping[str, str | Path | DataFolder], progress: bool = True, sources: Mapping[str, str] | None = None, **own: Any
) -> dict[str, Dataset]:
    """Read several data sets: `parts` maps keys of READERS to folders; the result maps the same keys to Datasets.

    `own` are the parameters for the part "table", a user's own images. `sources` maps some of the keys to a `source` (see
    `read_dataset`). Raises the same errors as `read_dataset`, and SettingsError if `own` or `sources` are for a part that is
    not in `parts`.
    """
    sources = sources or {}
    if unknown := set(sources) - set(parts):
        raise SettingsError(
            f"remove {', '.join(map(repr, sorted(unknown)))} from `sources`: the data sets to read are {', '.join(parts)}"
        )
    return {
        name: read_dataset(name, folder, progress, sources.get(name, ""), **(own if name == OWN or OWN not in parts else {}))
        for name, folder in parts.items()
    }


def compare_with_published(dataset: Dataset) -> pd.DataFrame:
    """Return a table that compares the counts of `dataset` with the published ones, one row per count.

    The columns are `what` (the count's name), `here` (the count in `dataset`), `published` (the published count, NA if
    unknown) and `share` (`here` / `published`). The row "masks" has the number of images with a mask.
    """
    images, labels = dataset.images, dataset.labels
    counts = {
        "images": len(images),
        "studies": images.study_id.nunique(),
        "patients": images.patient_id.nunique(),
        "boxes": len(dataset.boxes),
        "faults": len(dataset.faults),
    }
    if "false_none" in images:
        counts["false_none"] = int(images.false_none.sum())
    if dataset.masks is not None:
        counts["masks"] = dataset.masks.image_id.nunique()
    counts |= {name: int((labels[name] > 0.5).sum()) for name in class_columns(labels, "labels")}
    published = pd.Series({name: dataset.published.get(name, pd.NA) for name in counts}, dtype="Int64")
    table = pd.DataFrame({"here": pd.Series(counts), "published": published})
    return table.assign(share=(table.here / table.published).round(4)).rename_axis("what").reset_index()
