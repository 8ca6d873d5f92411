"""Predictions as downloadable files: the study's rows of a submission, and JSON for programs."""

from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.atomic import write_json
from kitlib.bundle import versions
from kitlib.classes import STUDY_CLASSES
from kitlib.fusion.model_fusion import Fused
from kitlib.inference.loaded_models import Answer
from kitlib.inference.systems import System
from kitlib.page.opened_study import OpenedStudy
from kitlib.scoring.submission_csv import submission_ids, write_submission
from kitlib.tables import BOX

NOT_FOR_DIAGNOSIS = "Not for diagnosis: these are research models from a competition, not a medical device."


def with_image_names(fused: Fused, study: OpenedStudy) -> Fused:
    """Return the predictions with each image's own image_id instead of its internal key in the column image_id."""
    names = {image.key: image.image_id for image in study.images}
    tables = (table.assign(image_id=table["image_id"].map(names)) for table in (fused.nones, fused.detections))
    return Fused(fused.studies, *tables)


def write_rows(path: str | Path, answer: Answer, study: OpenedStudy) -> None:
    """Write as CSV the rows that a submission with these models would contain for the study and its images.

    Rows that no model has predicted get the placeholder prediction (the class frequencies).
    """
    fused = with_image_names(answer.fused, study)
    ids = submission_ids([study.study_id], [image.image_id for image in study.images])
    studies, nones = fused.studies[~fused.studies["prior"]], fused.nones[~fused.nones["prior"]]
    write_submission(path, ids, studies, nones, fused.detections)


def write_answer(path: str | Path, answer: Answer, study: OpenedStudy, system: System) -> None:
    """Write the predictions as JSON, with probabilities 0..1 and all boxes in pixels of the original image.

    Values that no model has predicted are null.
    """
    fused = with_image_names(answer.fused, study)
    study_row = fused.studies.iloc[0]
    seen = set(fused.nones.loc[fused.nones["seen"], "image_id"])
    nones = fused.nones["none"].where(~fused.nones["prior"]).set_axis(fused.nones["image_id"])
    write_json(
        path,
        {
            "note": NOT_FOR_DIAGNOSIS,
            "study_id": study.study_id,
            "study": None if study_row["prior"] else {name: float(study_row[name]) for name in STUDY_CLASSES},
            "images": [
                {
                    "image_id": image.image_id,
                    "rows": image.rows,
                    "columns": image.columns,
                    "none": None if pd.isna(nones[image.image_id]) else float(nones[image.image_id]),
                    "opacity": _boxes(fused.detections, image.image_id) if image.image_id in seen else None,
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


def _boxes(detections: pd.DataFrame, image_id: str) -> list[dict[str, Any]]:
    rows = detections[detections["image_id"] == image_id].sort_values("score", ascending=False)
    return rows[["score", *BOX]].round({"score": 7, **dict.fromkeys(BOX, 2)}).to_dict("records")
