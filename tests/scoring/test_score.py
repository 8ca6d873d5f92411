import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from kitlib.classes import SCORED_CLASSES, STUDY_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.errors import ScoringError
from kitlib.scoring.score import Truth, competition_score, read_truth, score, score_files, score_tables, truth_of
from kitlib.scoring.submission_csv import read_submission, submission_ids, write_all_negative, write_submission
from kitlib.tables import BOX
from tests.voc_reference import slow_average_precision


@pytest.fixture
def competition(tmp_path):
    """Folder with the truth of 40 studies of one image each, ten per class; an image's boxes do not overlap."""
    names = [f"{n:012x}" for n in range(40)]
    classes = np.arange(40) % 4
    table = pd.DataFrame({"id": [f"{name}_study" for name in names]})
    for place, column in enumerate(STUDY_LABEL_COLUMNS):
        table[column] = (classes == place).astype(int)
    table.to_csv(tmp_path / "train_study_level.csv", index=False)
    drawn = [[{"x": 5.5 + 300 * k, "y": 7, "width": 200, "height": 99.5} for k in range(n % 4)] for n in range(40)]
    labels = [
        " ".join(f"opacity 1 {b['x']} {b['y']} {b['x'] + 200} 106.5" for b in found) or "none 1 0 0 1 1" for found in drawn
    ]
    pd.DataFrame(
        {
            "id": [f"{name}_image" for name in names],
            "boxes": [str(found) if found else "" for found in drawn],
            "label": labels,
            "StudyInstanceUID": names,
        }
    ).to_csv(tmp_path / "train_image_level.csv", index=False)
    return tmp_path


def perfect(truth):
    studies = truth.labels.rename(columns={"id": "study_id"})
    nones = pd.DataFrame({"image_id": truth.image_ids, "none": truth.is_none.astype(float)})
    return studies, nones, truth.boxes.assign(score=1.0)


def write(path, truth, tables):
    write_submission(path, submission_ids(truth.labels["id"], truth.image_ids), *tables)
    return path


def test_perfect_predictions_score_one(competition):
    truth = read_truth(competition)
    tables = perfect(truth)
    expected = dict.fromkeys(("score", *SCORED_CLASSES, "opacity_boxed"), 1.0)
    assert score_files(competition, write(competition / "submission.csv", truth, tables)) == pytest.approx(expected)
    assert score_tables(truth, *tables) == pytest.approx(expected)
    studies, nones, boxes = tables
    # Other images and studies are ignored, but none may be missing.
    elsewhere = pd.concat([boxes.assign(image_id="elsewhere"), boxes])
    assert score_tables(truth, studies, nones, elsewhere) == pytest.approx(expected)
    with pytest.raises(ScoringError, match=r"1 studies or images have no probability, such as \['000000000000'\]"):
        score_tables(truth, studies.iloc[1:], nones, boxes)
    with pytest.raises(ScoringError, match=r"2 studies or images have no probability, such as \['000000000000', '0"):
        score_tables(truth, studies, nones.iloc[2:], boxes)


def test_the_truth_of_some_images_is_that_of_their_studies_and_boxes(competition):
    whole = read_truth(competition)
    images = pd.DataFrame({"image_id": whole.image_ids, "study_id": whole.image_ids}).iloc[[3, 1]]
    truth = truth_of(images, whole.labels, whole.boxes)
    assert truth.image_ids == (whole.image_ids[3], whole.image_ids[1])
    assert truth.labels["id"].tolist() == [whole.image_ids[1], whole.image_ids[3]]
    assert truth.boxes["image_id"].tolist() == [whole.image_ids[1]] + [whole.image_ids[3]] * 3  # image n has n % 4 boxes
    assert math.isnan(competition_score(dict.fromkeys(SCORED_CLASSES, math.nan)))


def test_the_all_negative_floor(competition):
    truth = read_truth(competition)
    write_all_negative(competition / "floor.csv", submission_ids(truth.labels["id"], truth.image_ids))
    found = score_files(competition, competition / "floor.csv")
    # Ten of 40 studies are negative, ten of 40 images have no box: (1/4 + 1/4) / 6.
    assert found == pytest.approx(
        {"score": 1 / 12, "none": 1 / 4, "opacity_boxed": 0}
        | dict.fromkeys(SCORED_CLASSES, 0)
        | {"negative": 1 / 4, "none": 1 / 4}
    )


def random_tables(truth, seed):
    rng = np.random.default_rng(seed)
    studies = pd.DataFrame(rng.dirichlet(np.ones(4), len(truth.labels)).round(2), columns=list(STUDY_CLASSES))
    studies.insert(0, "study_id", truth.labels["id"])
    nones = pd.DataFrame({"image_id": truth.image_ids, "none": rng.random(len(truth.image_ids)).round(2)})
    found = truth.boxes.sample(300, replace=True, random_state=seed).reset_index(drop=True)
    found[list(BOX)] = (found[list(BOX)] + rng.normal(0, 30, (300, 4))).round(1)
    found = found[(found.xmin < found.xmax) & (found.ymin < found.ymax)].assign(score=lambda t: rng.random(len(t)).round(1))
    stray = rng.choice(truth.image_ids, len(found))
    found["image_id"] = np.where(rng.random(len(found)) < 0.3, stray, found["image_id"])
    return studies, nones, found


@pytest.mark.parametrize("seed", range(3))
def test_file_tables_and_slow_reference_agree(competition, seed):
    truth = read_truth(competition)
    studies, nones, found = tables = random_tables(truth, seed)
    from_file = score_files(competition, write(competition / "submission.csv", truth, tables))
    one = (0, 0, 1, 1)
    expected = {
        label: slow_average_precision(
            [(i, p, one) for i, p in zip(studies.study_id, studies[label], strict=True)],
            [(i, one) for i in truth.labels.id[truth.labels[label] == 1]],
        )
        for label in STUDY_CLASSES
    }
    boxless = [(i, one) for i in truth.image_ids if i not in set(truth.boxes.image_id)]
    expected["none"] = slow_average_precision(
        [(i, p, one) for i, p in zip(nones.image_id, nones["none"], strict=True)], boxless
    )
    exact = [tuple(Fraction(side) for side in row) for row in found[list(BOX)].to_numpy()]
    drawn = [(i, tuple(map(Fraction, row))) for i, *row in truth.boxes.itertuples(index=False)]
    detections = list(zip(found.image_id, found.score, exact, strict=True))
    expected["opacity"] = slow_average_precision(detections, drawn)
    expected["score"] = np.mean([expected[label] for label in SCORED_CLASSES])
    boxed = set(truth.boxes.image_id)
    expected["opacity_boxed"] = slow_average_precision([row for row in detections if row[0] in boxed], drawn)
    assert from_file == pytest.approx(expected)
    assert expected["opacity_boxed"] > expected["opacity"]
    assert score_tables(truth, studies, nones, found) == pytest.approx(expected)


def test_score_does_not_depend_on_the_order_of_rows_and_groups(competition):
    truth = read_truth(competition)
    path = write(competition / "submission.csv", truth, random_tables(truth, 7))
    expected = score_files(competition, path)
    header, *rows = path.read_text().splitlines()
    turned = []
    for row in reversed(rows):
        name, text = row.split(",")
        words = text.split()
        turned.append(f"{name}," + " ".join(" ".join(words[k : k + 6]) for k in range(len(words) - 6, -1, -6)))
    path.write_text("\n".join([header, *turned]) + "\n")
    assert score_files(competition, path) == expected


def test_ids_that_differ_from_the_truth_are_refused(competition):
    truth = read_truth(competition)
    path = write(competition / "submission.csv", truth, perfect(truth))
    text = path.read_text()
    path.write_text(text.replace("000000000003_image", "000000000abc_image"))
    with pytest.raises(
        ScoringError,
        match=r"1 are missing, such as \['000000000003_image'\], and 1 are unknown, such as \['000000000abc_image'\]",
    ):
        score_files(competition, path)


def test_a_class_absent_from_the_truth_is_ignored_in_the_mean(tmp_path, caplog):
    labels = pd.DataFrame(
        {"id": ["a", "b"], "negative": [1.0, 0], "typical": [0, 1.0], "indeterminate": 0.0, "atypical": 0.0}
    )
    truth = Truth(labels, ("a", "b"), pd.DataFrame({"image_id": ["b"], "xmin": 0.0, "ymin": 0.0, "xmax": 9.0, "ymax": 9.0}))
    found = score(truth, read_submission(write(tmp_path / "s.csv", truth, perfect(truth))))
    assert found["score"] == score_tables(truth, *perfect(truth))["score"] == 1
    assert math.isnan(found["atypical"])
    assert "lacks the classes indeterminate, atypical" in caplog.text


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        *(("train_study_level.csv", ",1,0", f",{label},0") for label in ("x", "2", "0.5", "-1", "", "nan")),
        ("train_study_level.csv", "000000000001_study", "000000000000_study"),
        ("train_image_level.csv", "000000000001_image", "000000000000_image"),
        ("train_image_level.csv", "'width'", "'w'"),
        ("train_image_level.csv", "boxes", "b"),
    ],
)
def test_an_unreadable_truth_file_is_named(competition, file, old, new):
    path = competition / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ScoringError, match=file):
        read_truth(competition)


@pytest.mark.real_data
def test_baseline_and_perfect_predictions_on_the_real_tables(real_data, tmp_path):
    truth = read_truth(real_data / "siim_csv")
    assert (len(truth.labels), len(truth.image_ids), len(truth.boxes)) == (6054, 6334, 7853)
    ids = submission_ids(truth.labels["id"], truth.image_ids)
    write_all_negative(tmp_path / "floor.csv", ids)
    floor = score(truth, read_submission(tmp_path / "floor.csv"))
    # 1,676 of 6,054 studies are negative, 2,040 of 6,334 images have no box.
    assert floor["negative"] == pytest.approx(1676 / 6054)
    assert floor["none"] == pytest.approx(2040 / 6334)
    assert floor["score"] == pytest.approx(0.0998, abs=5e-5)
    assert json.dumps(floor)
    assert set(score_tables(truth, *perfect(truth)).values()) == {1.0}
