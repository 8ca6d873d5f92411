import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import STUDY_CLASSES
from kitlib.errors import SubmissionError
from kitlib.scoring.submission_csv import (
    PRIORS,
    as_tables,
    box_groups,
    read_submission,
    split_id,
    submission_ids,
    write_submission,
)
from kitlib.tables import BOX

IDS = submission_ids(["s1", "s2"], ["i1", "i2"])


def studies(**rows):
    return pd.DataFrame([(name, *values) for name, values in rows.items()], columns=["study_id", *STUDY_CLASSES])


def nones(**rows):
    return pd.DataFrame({"image_id": list(rows), "none": list(rows.values())})


def boxes(*rows):
    return pd.DataFrame(rows, columns=["image_id", "score", *BOX])


def rows_of(path):
    header, *rows = path.read_text().splitlines()
    assert header == "id,PredictionString"
    return dict(row.split(",") for row in rows)


def test_every_id_has_a_row_in_order_and_placeholder_predictions_fill_gaps(tmp_path):
    path = tmp_path / "submission.csv"
    on_priors = write_submission(
        path,
        IDS[::-1],
        studies(s2=[0.61, 0.22, 0.11, 0.06]),
        nones(i1=0.27, i2=float("nan")),
        boxes(("i1", 0.03, 10, 10, 400, 900), ("i1", 0.62, 789.26, 582.4, 1815.9, 2499.7)),
    )
    assert on_priors == ("i2_image", "s1_study")
    rows = rows_of(path)
    assert list(rows) == IDS[::-1]
    # The two example rows of the competition's format.
    assert rows["s2_study"] == "negative 0.61 0 0 1 1 typical 0.22 0 0 1 1 indeterminate 0.11 0 0 1 1 atypical 0.06 0 0 1 1"
    assert rows["i1_image"] == (
        "opacity 0.62 789.3 582.4 1815.9 2499.7 opacity 0.03 10.0 10.0 400.0 900.0 none 0.27 0 0 1 1"
    )
    assert rows["i2_image"] == "none 0.3220714 0 0 1 1"
    assert float(rows["s1_study"].split()[1]) == pytest.approx(PRIORS["negative"], abs=1e-7)


def test_placeholder_predictions_alone_make_a_complete_file(tmp_path):
    assert write_submission(tmp_path / "s.csv", IDS) == tuple(IDS)
    found = read_submission(tmp_path / "s.csv")
    assert found.ids == tuple(IDS)
    assert len(found.studies) == 8 and found.images["label"].tolist() == ["none", "none"]
    # The four class frequencies of the train table sum to one.
    assert found.studies["score"].sum() == pytest.approx(2, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_confidences_are_plain_decimals_of_seven_digits(tmp_path_factory, p):
    path = tmp_path_factory.mktemp("s") / "s.csv"
    write_submission(path, ["i_image"], none_probabilities=nones(i=p))
    text = rows_of(path)["i_image"].split()[1]
    assert "e" not in text
    assert float(text) == pytest.approx(p, rel=1e-6, abs=1e-15)


def test_scores_that_differ_in_float32_near_one_stay_different(tmp_path):
    near = [1.0, float(np.float32(1) - np.float32(2**-23))]
    write_submission(tmp_path / "s.csv", IDS[2:], none_probabilities=nones(i1=near[0], i2=near[1]))
    assert read_submission(tmp_path / "s.csv").images["score"].nunique() == 2


def test_a_box_that_loses_its_area_by_rounding_is_dropped(tmp_path):
    flat = boxes(("i", 0.9, 10.01, 5, 10.04, 50), ("i", 0.8, 5, 10.01, 50, 10.04))
    write_submission(tmp_path / "s.csv", ["i_image"], None, nones(i=0.5), flat)
    assert rows_of(tmp_path / "s.csv") == {"i_image": "none 0.5 0 0 1 1"}


def test_predictions_for_other_ids_are_ignored_and_logged(tmp_path, caplog):
    write_submission(tmp_path / "s.csv", ["i1_image"], None, nones(i1=0.5, i9=0.5), boxes(("i9", 0.9, 1, 1, 9, 9)))
    assert list(rows_of(tmp_path / "s.csv")) == ["i1_image"]
    assert "1 predictions are ignored, because their ids are not in the sample" in caplog.text
    caplog.clear()
    write_submission(tmp_path / "s.csv", IDS, studies(s1=[0.4, 0.3, 0.2, 0.1]), nones(i1=0.5, i2=float("nan")))
    assert "ignored" not in caplog.text


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"none_probabilities": nones(i1=1.5)}, "0..1"),
        ({"none_probabilities": nones(i1=-0.5)}, "0..1"),
        ({"detections": boxes(("i1", 1.5, 1, 1, 9, 9))}, "scores in 0..1"),
        ({"detections": boxes(("i1", -0.5, 1, 1, 9, 9))}, "scores in 0..1"),
        ({"study_probabilities": pd.concat([studies(s1=[1, 0, 0, 0])] * 2)}, "s1 has several rows"),
        ({"detections": boxes(("i1", float("nan"), 1, 1, 9, 9))}, "scores in 0..1"),
        ({"detections": boxes(("i1", 0.5, 1, 1, float("inf"), 9))}, "finite boxes"),
        ({"ids": ["i1_image", "i1_image"]}, "1 are duplicates"),
        ({"ids": ["i1"]}, "_study or _image"),
    ],
)
def test_invalid_values_are_not_written(tmp_path, given_, words):
    path = tmp_path / "s.csv"
    write_submission(path, IDS)
    before = path.read_text()
    with pytest.raises(ValueError, match=words):
        write_submission(path, **{"ids": IDS, **given_})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


confidence = st.floats(1e-6, 1).map(lambda p: float(f"{p:.7g}"))
coordinate = st.floats(-50, 5000).map(lambda x: round(x, 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["i1", "i2"]), confidence, coordinate, coordinate)))
def test_reading_returns_what_was_written(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("s") / "s.csv"
    table = boxes(*[(name, p, x, y, round(x + 20, 1), round(y + 30.5, 1)) for name, p, x, y in found])
    write_submission(path, IDS, studies(s1=[0.4, 0.3, 0.2, 0.1]), nones(i1=0.25), table)
    back = read_submission(path)
    opacities = back.images[back.images.label == "opacity"].drop(columns="label").astype({"image_id": str})
    key = ["image_id", "score", *BOX]
    pd.testing.assert_frame_equal(
        opacities.sort_values(key, ignore_index=True), table.sort_values(key, ignore_index=True), check_dtype=False
    )
    assert back.studies.loc[back.studies.study_id == "s1", "score"].tolist() == [0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,Prediction\n", "header"),
        ("id,PredictionString\ns_study,negative 1 0 0 1\n", "row 2: 5 words"),
        ("id,PredictionString\n\ns_study,none 1 0 0 1 1\n", "row 3: labels none"),
        ("id,PredictionString\ni_image,none nan 0 0 1 1\n", "not finite"),
        ("id,PredictionString\ni_image,none 1_0 0 0 1 1\n", "underscore"),
        ("id,PredictionString\ni_image,none x 0 0 1 1\n", "row 2: could not convert"),
        ("id,PredictionString\ni,none 1 0 0 1 1\n", "_study or _image"),
        ("id,PredictionString\ni_image\n", "row 2"),
        ("id,PredictionString\ni_image,none 1 0 0 1 1\ni_image,none 1 0 0 1 1\n", "duplicate id"),
    ],
)
def test_unreadable_submissions_name_the_row(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(SubmissionError, match=words):
        read_submission(tmp_path / "s.csv")


def test_an_id_ends_in_its_level():
    assert split_id("a_b_image") == ("a_b", "image")


def test_a_row_of_many_thousand_boxes_is_read(tmp_path):
    table = boxes(*[("i1", 0.5, n, 0, n + 10, 10) for n in range(6000)])
    write_submission(tmp_path / "s.csv", ["i1_image"], None, nones(i1=0.1), table)
    assert len(read_submission(tmp_path / "s.csv").images) == 6001


def test_as_tables_returns_the_tables_that_were_written(tmp_path):
    studies = pd.DataFrame({"study_id": ["s"], "negative": 0.5, "typical": 0.25, "indeterminate": 0.125, "atypical": 0.0625})
    nones = pd.DataFrame({"image_id": ["i", "j"], "none": [0.75, 0.5]})
    boxes = pd.DataFrame(
        {"image_id": ["i", "i"], "score": [0.5, 0.25], "xmin": 1.0, "ymin": 2.0, "xmax": [9.0, 7.5], "ymax": 8.0}
    )
    ids = submission_ids(["s"], ["i", "j"])
    write_submission(tmp_path / "submission.csv", ids, studies, nones, boxes)
    for written, read in zip((studies, nones, boxes), as_tables(read_submission(tmp_path / "submission.csv")), strict=True):
        pd.testing.assert_frame_equal(read, written, check_dtype=False)


def test_tables_have_the_highest_confidence_of_a_repeated_class_and_0_for_a_missing_one(tmp_path):
    text = "negative 0.25 0 0 1 1 negative 0.5 0 0 1 1 negative 0.125 0 0 1 1"
    (tmp_path / "s.csv").write_text(
        f"id,PredictionString\ns_study,{text}\ni_image,none 0.25 0 0 1 1 none 0.75 0 0 1 1 opacity 1 1 2 3 4\n"
    )
    study_table, none_table, detections = as_tables(read_submission(tmp_path / "s.csv"))
    assert study_table.to_dict("records") == [
        {"study_id": "s", "negative": 0.5, "typical": 0, "indeterminate": 0, "atypical": 0}
    ]
    assert none_table.to_dict("records") == [{"image_id": "i", "none": 0.75}]
    assert detections.to_dict("records") == [{"image_id": "i", "score": 1, "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}]


def test_groups_of_several_labels_are_sorted_by_score_and_labels_without_a_box_have_one_pixel():
    table = boxes(("i", 0.25, 1, 2, 30, 40.06), ("i", 0.5, 0, 0, 1, 1), ("j", 1, 5, 6, 7, 8))
    assert box_groups(table.assign(label=["Mass", "No finding", "ILD"]), boxless=("No finding",)) == {
        "i": ["No finding 0.5 0 0 1 1", "Mass 0.25 1.0 2.0 30.0 40.1"],
        "j": ["ILD 1 5.0 6.0 7.0 8.0"],
    }
