"""Arranges real X-rays as RSNA's and NIH's data sets.

    PYTHONPATH=. python benchmarks/real/layouts.py --data DATA --out inputs/real

OUT/rsna gets the images of DATA/cxr_det that RSNA's radiologists annotated, with their rows of the label table; OUT/nih gets
the NIH images of DATA/cxr_cls with their findings. No patient and no group of near-duplicates is in both, so that a backbone
trained on OUT/nih has not seen the images on which a detector is tested. Images are linked, not copied.
"""

import json
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from kitlib.atomic import write_csv, write_json
from kitlib.datasets.rsna import CLASSES, IMAGES, LABELS, MAPPING


def main(
    data: Annotated[Path, typer.Option(help="folder with cxr_det, cxr_cls and label_tables")],
    out: Annotated[Path, typer.Option(help="parent of the new folders rsna/ and nih/")],
) -> None:
    """Create both folders and print the number of images in each."""
    data = data.resolve()
    labels = pd.read_csv(data / "cxr_cls" / "labels.csv", dtype=str, keep_default_na=False)
    read = pd.read_csv(data / "cxr_det" / "images.csv", dtype=str, keep_default_na=False)
    read = read[read.rsna_patientId != ""]
    _rsna(data, read, out / "rsna")
    named = labels.set_index("file").group.reindex(read.image).dropna()
    patients = {*read.patient_id, *labels.patient_id[labels.file.isin(read.image)]}
    others = labels[(labels.source == "nih") & ~labels.group.isin(named) & ~labels.patient_id.isin(patients)]
    _nih(data, others[~others.file.isin(read.image)], out / "nih")
    print(json.dumps({"rsna": len(read), "nih": len(list((out / "nih" / "images_001" / "images").iterdir()))}))


def _rsna(data: Path, read: pd.DataFrame, folder: Path) -> None:
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for row in read.itertuples():
        _link(data / row.image, folder / IMAGES / f"{row.rsna_patientId}.jpg")
    tables = data / "label_tables"
    rows = pd.read_csv(tables / "rsna_stage_2_train_labels.csv.gz", dtype=str, keep_default_na=False)
    write_csv(folder / LABELS, rows[rows.patientId.isin(read.rsna_patientId)])
    write_csv(
        folder / CLASSES, read.rename(columns={"rsna_patientId": "patientId", "rsna_class": "class"})[["patientId", "class"]]
    )
    pairs = zip(read.rsna_patientId, read.image, strict=True)
    write_json(folder / MAPPING, [{"subset_img_id": rsna, "img_id": f"{Path(image).stem}.png"} for rsna, image in pairs])


def _nih(data: Path, rows: pd.DataFrame, folder: Path) -> None:
    images = folder / "images_001" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for file in rows.file:
        _link(data / file, images / Path(file).name)
    names = rows.file.map(lambda file: Path(file).name)
    table = pd.DataFrame(
        {
            "Image Index": names,
            "Finding Labels": rows.finding,
            "Patient ID": rows.patient_id.str.removeprefix("nih-"),
            "View Position": rows["view"],
        }
    )
    write_csv(folder / "Data_Entry_2017.csv", table)


def _link(target: Path, link: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


if __name__ == "__main__":
    typer.run(main)
