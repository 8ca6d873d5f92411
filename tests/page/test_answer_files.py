"""The exact contents of the files for download, for predictions that are stated here."""

import json
from pathlib import Path

import pandas as pd
import pytest

from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused
from kitlib.inference.loaded_models import Answer
from kitlib.page.answer_files import write_answer, write_rows
from kitlib.page.opened_study import OpenedImage, OpenedStudy
from tests.small_page import described_system

IMAGES = (OpenedImage("b", "key1", Path("b"), 10, 20, remarks=("dark",)), OpenedImage("a", "key2", Path("a"), 30, 40))
STUDY = OpenedStudy("1.2", IMAGES, copies=None, remarks=("left out",))
MODELS = pd.DataFrame({"model": ["m"], "fold": [1], "seconds": [0.25]})
NONES = pd.DataFrame(
    [("key1", 0.25, False, True), ("key2", 0.5, True, False)], columns=["image_id", "none", "prior", "seen"]
)
BOXES = pd.DataFrame(
    [
        ("key1", "mass", 0.25, 1.0, 2.0, 3.0, 4.0),
        ("key2", "mass", 0.75, 1.0, 2.0, 3.0, 4.0),
        ("key1", "edema", 0.87654321, 1.234, 2.0, 3.0, 4.0),
    ],
    columns=["image_id", "finding", "score", "xmin", "ymin", "xmax", "ymax"],
)


STUDY_SYSTEM, BOXES_SYSTEM, CLASSES_SYSTEM = (described_system("s", kind) for kind in ("study", "boxes", "classes"))


def fused(prior=False):
    """An answer whose study classes are class frequencies if `prior` is True; image `b` has two boxes, `a` is not seen."""
    studies = pd.DataFrame([("1.2", 0.1, 0.2, 0.3, 0.4, prior)], columns=["study_id", *STUDY_CLASSES, "prior"])
    return Answer(MODELS, ("by fold 1",), fused=Fused(studies, NONES, BOXES))


@pytest.fixture
def written(tmp_path):
    def write(answer, system):
        write_answer(tmp_path / "answer.json", answer, STUDY, system)
        return json.loads((tmp_path / "answer.json").read_text())

    return write


def test_the_json_file_has_rounded_boxes_best_first_and_null_for_what_was_not_predicted(written):
    told = written(fused(), STUDY_SYSTEM)
    assert (told["study_id"], told["system"], told["models"]) == ("1.2", "s", [{"model": "m", "fold": 1}])
    assert told["remarks"] == ["left out", "by fold 1"]
    first, second = told["images"]
    assert first == {
        **{"image_id": "b", "rows": 10, "columns": 20, "none": 0.25, "remarks": ["dark"]},
        "boxes": [
            {"finding": "edema", "score": 0.8765432, "xmin": 1.23, "ymin": 2.0, "xmax": 3.0, "ymax": 4.0},
            {"finding": "mass", "score": 0.25, "xmin": 1.0, "ymin": 2.0, "xmax": 3.0, "ymax": 4.0},
        ],
    }
    assert second == {"image_id": "a", "rows": 30, "columns": 40, "none": None, "boxes": None, "remarks": []}


def test_the_json_file_has_the_study_classes_that_models_for_siim_predicted(written):
    predicted = dict(zip(STUDY_CLASSES, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert written(fused(), STUDY_SYSTEM)["study"] == predicted
    assert written(fused(prior=True), STUDY_SYSTEM)["study"] is None
    assert "study" not in written(fused(), BOXES_SYSTEM)


def test_boxes_are_listed_by_image_and_score(tmp_path):
    path = write_rows(tmp_path, fused(), STUDY, BOXES_SYSTEM)
    table = pd.read_csv(path)
    assert path.name == "boxes.csv" and list(table) == ["image_id", "finding", "score", "xmin", "ymin", "xmax", "ymax"]
    assert table[["image_id", "finding"]].to_numpy().tolist() == [["a", "mass"], ["b", "edema"], ["b", "mass"]]


def test_probabilities_of_images_are_listed_with_their_names(tmp_path, written):
    answer = Answer(MODELS, (), classes=pd.DataFrame({"image_id": ["key1", "key2"], "x": [0.25, 0.5]}))
    path = write_rows(tmp_path, answer, STUDY, CLASSES_SYSTEM)
    assert path.name == "predictions.csv" and pd.read_csv(path).to_numpy().tolist() == [["b", 0.25], ["a", 0.5]]
    told = written(answer, CLASSES_SYSTEM)
    assert [image["classes"] for image in told["images"]] == [{"x": 0.25}, {"x": 0.5}]
    assert "study" not in told and "boxes" not in told["images"][0] and "masks" not in told["images"][0]
