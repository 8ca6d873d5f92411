"""Writes a study's predictions to files for download: JSON, and CSV (submission rows, boxes or class probabilities)."""

from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.atomic import write_csv, write_json
from kitlib.bundle import versions
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused
from kitlib.inference.loaded_models import Answer
from kitlib.inference.systems import System
from kitlib.page.opened_study import OpenedStudy
from kitlib.scoring.submission_csv import submission_ids, write_submission
from kitlib.tables import BOX

NOT_FOR_DIAGNOSIS = "Not for diagnosis: these are research models from a competition, not a medical device."


def with_image_names(fused: Fused, study: OpenedStudy) -> Fused:
    """Return `fused` with each image's id in a submission, instead of the key of the decoded copy, as `image_id`."""
    names = {image.key: image.image_id for image in study.images}
    tables = (table.assign(image_id=table["image_id"].map(names)) for table in (fused.nones, fused.detections))
    return Fused(fused.studies, *tables)


def write_rows(folder: Path, answer: Answer, study: OpenedStudy, system: System) -> Path | None:
    """Write the study's predictions as a CSV file in `folder` and return its path; return None if the models only segment.

    If `system` predicts the rows of SIIM's submission, the file is submission.csv, with the rows of the study and of its
    images; a row that no model has predicted gets the class frequencies. If `system` has other detectors, the file is
    boxes.csv. If the models only classify images, the file is predictions.csv, with each image's probabilities.
    """
    if answer.classes is not None and answer.fused is None:
        names = answer.classes["image_id"].map({image.key: image.image_id for image in study.images})
        write_csv(folder / "predictions.csv", answer.classes.assign(image_id=names))
        return folder / "predictions.csv"
    if answer.fused is None:
        return None
    path, fused = folder / "submission.csv", with_image_names(answer.fused, study)
    if not system.fills_siim:
        boxes = fused.detections.sort_values(["image_id", "score"], ascending=[True, False])
        write_csv(folder / "boxes.csv", boxes[["image_id", "finding", "score", *BOX]])
        return folder / "boxes.csv"
    ids = submission_ids([study.study_id], [image.image_id for image in study.images])
    studies, nones = fused.studies[~fused.studies["prior"]], fused.nones[~fused.nones["prior"]]
    write_submission(path, ids, studies, nones, fused.detections)
    return path


def write_answer(path: str | Path, answer: Answer, study: OpenedStudy, system: System) -> None:
    """Write the predictions as JSON, with probabilities 0..1 and all boxes in pixels of the original image.

    Values that no model has predicted are null. If structures other than lungs were segmented, `masks` has the highest
    probability of each structure in the image. The study's class probabilities are written only if `system` predicts the
    rows of SIIM's submission.
    """
    of_study, of_image = _fused(answer.fused, study) if answer.fused is not None else ({}, {})
    of_study, classes = of_study if system.fills_siim else {}, _classes(answer.classes)
    write_json(
        path,
        {
            "note": NOT_FOR_DIAGNOSIS,
            "study_id": study.study_id,
            **of_study,
            "images": [
                {
                    "image_id": image.image_id,
                    "rows": image.rows,
                    "columns": image.columns,
                    **of_image.get(image.key, {}),
                    **classes.get(image.key, {}),
                    **({"masks": masks} if (masks := _highest(answer, image.key)) else {}),
                    "remarks": list(image.remarks),
                }
                for image in study.images
            ],
            "remarks": [*study.remarks, *answer.remarks],
            "system": system.name,
            "models": answer.models[["model", "fold"]].to_dict("records"),
            "versions": versions(),
        },
    )


def _fused(fused: Fused, study: OpenedStudy) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the study's part of the JSON file, and a dict from each image's key to the image's part of the file.

    The study's part has class probabilities; an image's part has the probability of `none` (no finding) and boxes.
    """
    study_row, nones = fused.studies.iloc[0], fused.nones.set_index("image_id")
    classes = None if study_row["prior"] else {name: float(study_row[name]) for name in STUDY_CLASSES}
    of_image = {
        image.key: {
            "none": None if nones["prior"][image.key] else float(nones["none"][image.key]),
            "boxes": _boxes(fused.detections, image.key) if nones["seen"][image.key] else None,
        }
        for image in study.images
    }
    return {"study": classes}, of_image


def _classes(classes: pd.DataFrame | None) -> dict[str, dict[str, Any]]:
    rows = {} if classes is None else classes.set_index("image_id").to_dict("index")
    return {str(key): {"classes": row} for key, row in rows.items()}


def _highest(answer: Answer, image_id: str) -> dict[str, float]:
    return {name: round(float(probabilities.max()), 3) for name, probabilities in answer.maps(image_id).items()}


def _boxes(detections: pd.DataFrame, image_id: str) -> list[dict[str, Any]]:
    rows = detections[detections["image_id"] == image_id].sort_values("score", ascending=False)
    return rows[["finding", "score", *BOX]].round({"score": 7, **dict.fromkeys(BOX, 2)}).to_dict("records")
