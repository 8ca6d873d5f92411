"""Arranges real X-rays as ieee8023's COVID-19 collection and Kermany's children: nearly FLANNEL's training data.

    PYTHONPATH=. python benchmarks/real/covid_layouts.py --data DATA --out inputs/real

OUT/covid-chestxray gets the frontal images of DATA/cxr_cls/ieee8023 with a metadata.csv, OUT/chest-xray-pneumonia the
available 4,004 and 624 images of Kermany's training and test folders. Images are linked or unpacked, not changed.
"""

import json
import zipfile
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from kitlib.atomic import write_csv


def main(
    data: Annotated[Path, typer.Option(help="folder with cxr_cls and cxr_seg")],
    out: Annotated[Path, typer.Option(help="parent of the two new folders")],
) -> None:
    """Create both folders and print the number of images in each."""
    data = data.resolve()
    labels = pd.read_csv(data / "cxr_cls" / "labels.csv", dtype=str, keep_default_na=False)
    covid, children = out / "covid-chestxray", out / "chest-xray-pneumonia"
    _covid_chestxray(data, labels[labels.source == "ieee8023"], covid)
    _kermany(data, labels[labels.source == "kermany_test"], children)
    print(json.dumps({folder.name: len(list(folder.rglob("*.jp*g"))) for folder in (covid, children)}))


def _covid_chestxray(data: Path, rows: pd.DataFrame, folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = rows.file.map(lambda file: Path(file).name)
    for file, name in zip(rows.file, names, strict=True):
        _link(data / file, folder / "images" / name)
    table = pd.DataFrame(
        {
            "patientid": rows.patient_id.str.removeprefix("ieee-"),
            "offset": "",
            "sex": rows.sex,
            "age": rows.age,
            "finding": rows.finding,
            "view": rows["view"],
            "modality": "X-ray",
            "folder": "images",
            "filename": names,
            "license": rows.licence,
        }
    )
    write_csv(folder / "metadata.csv", table)


def _kermany(data: Path, test: pd.DataFrame, folder: Path) -> None:
    for file, original in zip(test.file, test.orig_file, strict=True):
        _link(data / file, _kind(folder / "test", Path(original).name))
    with zipfile.ZipFile(data / "cxr_cls" / "kermany_train" / "images_224.zip") as packed:
        for name in packed.namelist():
            path = _kind(folder / "train", Path(name).name)
            if not path.is_file():
                path.write_bytes(packed.read(name))


def _kind(folder: Path, name: str) -> Path:
    path = folder / ("PNEUMONIA" if name.startswith("person") else "NORMAL") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _link(target: Path, link: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


if __name__ == "__main__":
    typer.run(main)
