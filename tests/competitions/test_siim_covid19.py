import dataclasses

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import STUDY_LABEL_COLUMNS
from kitlib.competitions.siim_covid19 import NONE_MIXTURES, NONE_PARTS, SIIM_COVID19, Fused, SiimFusion
from kitlib.errors import ScoringError, SubmissionError
from kitlib.scoring.score import SCORE_KEYS, score_files
from kitlib.scoring.submission_csv import submission_ids, write_all_negative, write_submission
from kitlib.scoring.validate import validate


@pytest.fixture
def folder(tmp_path):
    """The truth of twenty studies of one image each, of which those of the first class have no box."""
    names = [f"{number:012x}" for number in range(20)]
    table = pd.DataFrame(np.eye(4, dtype=int)[np.arange(20) % 4], columns=list(STUDY_LABEL_COLUMNS))
    table.insert(0, "id", [f"{name}_study" for name in names])
    table.to_csv(tmp_path / "train_study_level.csv", index=False)
    boxes = ["[{'x': 1.5, 'y': 2, 'width': 30, 'height': 40}]" if number % 4 else "" for number in range(20)]
    images = pd.DataFrame({"id": [f"{name}_image" for name in names], "boxes": boxes})
    images.to_csv(tmp_path / "train_image_level.csv", index=False)
    write_all_negative(tmp_path / "sample.csv", submission_ids(names, names))
    return tmp_path


def test_scores_and_faults_are_those_of_the_scoring_room(folder):
    scores = SIIM_COVID19.score_files(folder, folder / "sample.csv")
    assert list(scores) == list(SCORE_KEYS) and scores == score_files(folder, folder / "sample.csv")
    # One of four studies is negative, one of four images has no box, and the other four classes get nothing.
    assert scores["score"] == pytest.approx((1 / 4 + 1 / 4) / 6)
    text = (folder / "sample.csv").read_text()
    bad = text.replace("negative 1 0 0 1 1", "negative 2 0 0 1 1", 3) + "x_study,none 1 0 0 1 1\n"
    (folder / "bad.csv").write_text(bad)
    faults = SIIM_COVID19.validate_file(folder / "bad.csv", folder / "sample.csv")
    assert faults == validate(folder / "sample.csv", folder / "bad.csv") and len(faults) == 4
    assert faults[-1].problem == "extra id: it is not in the sample submission"
    by_truth = SIIM_COVID19.validate_file(folder / "bad.csv", truth=folder)
    assert by_truth[:-1] == faults[:-1] and by_truth[-1].problem == "extra id: it is not in the ground truth"


def test_the_baseline_is_the_placeholder_file(folder):
    assert SIIM_COVID19.write_baseline(folder / "sample.csv", folder / "baseline.csv") == 40
    write_submission(folder / "placeholders.csv", pd.read_csv(folder / "sample.csv").id)
    assert (folder / "baseline.csv").read_bytes() == (folder / "placeholders.csv").read_bytes()


def test_errors_are_those_of_the_scoring_room(folder):
    with pytest.raises(ScoringError, match="is a file; expected the folder with train_study_level"):
        SIIM_COVID19.score_files(folder / "train_study_level.csv", folder / "sample.csv")
    (folder / "other").mkdir()
    with pytest.raises(ScoringError, match=r"lacks train_study_level.csv, .*; it has no file\. To score another"):
        SIIM_COVID19.score_files(folder / "other", folder / "sample.csv")
    (folder / "other" / "train.csv").touch()
    with pytest.raises(ScoringError, match=r"lacks train_study_level.csv, .*; it has train.csv\. To score another"):
        SIIM_COVID19.score_files(folder / "other", folder / "sample.csv")
    write_all_negative(folder / "short.csv", ["000000000000_study"])
    with pytest.raises(ScoringError, match="must have exactly the ids of the truth, but 39 are missing"):
        SIIM_COVID19.score_files(folder, folder / "short.csv")
    with pytest.raises(SubmissionError, match="must begin with the header"):
        SIIM_COVID19.score_files(folder, folder / "train_study_level.csv")


def test_the_published_formulas_are_tried_and_the_default_is_the_classifier_alone():
    """Mixtures and powers of box scores (0.4 and 0.16 / 0.84) of the 3rd and the 11th place, and the 11th's share of 0.7."""
    alone = [tuple(float(part == other) for other in NONE_PARTS) for part in NONE_PARTS]
    assert {*alone, (0.7, 0.0, 0.3, 0.0), (0.5, 0.5, 0.0, 0.0)} <= set(NONE_MIXTURES)
    assert [sum(mixture) for mixture in NONE_MIXTURES] == pytest.approx([1] * len(NONE_MIXTURES))
    grids = dict(SiimFusion.GRIDS.values())
    assert grids[NONE_PARTS] == NONE_MIXTURES
    assert {0.0, 0.4, 0.16 / 0.84} <= set(grids[("opacity_power",)]) and {1.0, 0.7} <= set(grids[("negative_share",)])
    default = dataclasses.asdict(SiimFusion())
    assert tuple(default[part] for part in NONE_PARTS) == alone[0]
    assert (default["opacity_power"], default["negative_share"]) == (0, 1)


def test_decided_tables_have_names_if_there_are_several():
    assert SIIM_COVID19.tables(Fused("s", "n", "d")) == {"studies": "s", "nones": "n", "detections": "d"}
    assert SIIM_COVID19.tables({"a": "mask"}) == {}


def test_the_test_set_is_listed_without_opening_its_images(tmp_path):
    (tmp_path / "test" / "s" / "x").mkdir(parents=True)
    (tmp_path / "test" / "s" / "x" / "i.dcm").write_bytes(b"no DICOM")
    (tmp_path / "sample_submission.csv").write_text(
        "id,PredictionString\ns_study,negative 1 0 0 1 1\ni_image,none 1 0 0 1 1\n"
    )
    test = SIIM_COVID19.read_test(tmp_path)
    assert test.images[["image_id", "study_id", "rows"]].to_numpy().tolist() == [["i", "s", 0]] and test.faults.empty
