import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.errors import SubmissionError
from kitlib.scoring.submission_csv import write_all_negative, write_submission
from kitlib.scoring.validate import Fault, prediction_faults, validate

STUDY = "negative 0.61 0 0 1 1 typical 0.22 0 0 1 1 indeterminate 0.11 0 0 1 1 atypical 0.06 0 0 1 1"
IMAGE = "opacity 0.62 789.3 582.4 1815.9 2499.7 opacity 0.03 10 10 400 900 none 0.27 0 0 1 1"
IDS = ["s1_study", "s2_study", "i1_image", "i2_image"]
GOOD = {"s1_study": STUDY, "s2_study": STUDY, "i1_image": IMAGE, "i2_image": "none 1 0 0 1 1"}


@pytest.fixture
def sample(tmp_path):
    write_all_negative(tmp_path / "sample.csv", IDS)
    return tmp_path / "sample.csv"


def faults_of(sample, rows, header="id,PredictionString"):
    path = sample.parent / "submission.csv"
    path.write_text("\n".join([header, *(f"{name},{text}" for name, text in rows)]) + "\n")
    return [(fault.row, fault.id, fault.problem) for fault in validate(sample, path)]


def test_good_files_are_accepted(sample):
    assert faults_of(sample, GOOD.items()) == []
    assert faults_of(sample, reversed(GOOD.items())) == []
    assert validate(sample, sample) == []
    write_submission(sample.parent / "priors.csv", IDS)
    assert validate(sample, sample.parent / "priors.csv") == []


@pytest.mark.parametrize("change", ["\r\n", "\ufeff", "quotes"])
def test_text_formats_that_pandas_accepts_are_valid(sample, change):
    path = sample.parent / "submission.csv"
    text = "id,PredictionString\n" + "".join(f"{name},{row}\n" for name, row in GOOD.items())
    text = {"\r\n": text.replace("\n", "\r\n"), "\ufeff": "\ufeff" + text, "quotes": text.replace(STUDY, f'"{STUDY}"')}[
        change
    ]
    path.write_bytes(text.encode())
    assert validate(sample, path) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("nan", "NaN"),
        ("NaN", "NaN"),
        ("NULL", "NaN"),
        ("none 1 0 0 1", "5 words are not groups of six"),
        ("none 1 0 0 1 1 0.5", "7 words are not groups of six"),
        ("None 1 0 0 1 1", "label 'None'"),
        ("covid 1 0 0 1 1", "label 'covid'"),
        ("negative 1 0 0 1 1", "label 'negative' is not one of none, opacity"),
        ("none 1.01 0 0 1 1", "confidence 1.01 is not in 0..1"),
        ("none -0.1 0 0 1 1", "confidence -0.1 is not in 0..1"),
        ("none nan 0 0 1 1", "confidence nan is not in 0..1"),
        ("none inf 0 0 1 1", "confidence inf is not in 0..1"),
        ("none x 0 0 1 1", "is not five numbers"),
        ("none 0_5 0 0 1 1", "is not five numbers"),
        ("none 0.5 0 0 2 2", "must have the box 0 0 1 1"),
        ("opacity 0.5 10 10 5 20", "inverted"),
        ("opacity 0.5 10 20 15 10", "inverted"),
        ("opacity 0.5 10 10 10 20", "no area"),
        ("opacity 0.5 10 20 15 20", "no area"),
        ("opacity 0.5 10 10 nan 20", "not finite"),
        ("opacity 0.5 10 10 inf 20", "not finite"),
    ],
)
def test_an_invalid_string_is_one_fault_with_its_row(sample, bad, words):
    ((row, name, problem),) = faults_of(sample, (GOOD | {"i1_image": bad}).items())
    assert (row, name) == (4, "i1_image")
    assert words in problem


def test_every_invalid_group_of_a_string_is_named():
    text = "opacity 2 5 5 1 9 opacity 0.5 1 1 2 2 nothing 0.1 0 0 1 1 none 1 0 0 x 1"
    assert [problem.split(":")[0] for problem in prediction_faults(text, "image")] == [
        "group 1",
        "group 1",
        "group 3",
        "group 4",
    ]


def test_image_labels_are_invalid_for_studies():
    assert "'opacity' is not one of negative" in prediction_faults("opacity 0.5 0 0 9 9", "study")[0]


def test_every_wrong_id_is_named(sample):
    rows = [("s1_study", STUDY), ("s1_study", STUDY), ("x_image", IMAGE), ("i2_image", IMAGE), ("", IMAGE)]
    assert faults_of(sample, rows) == [
        (3, "s1_study", "duplicate id: row 2 has the same id"),
        (4, "x_image", "extra id: it is not in the sample submission"),
        (6, "", "extra id: it is not in the sample submission"),
        (None, "s2_study", "missing id: it is in the sample submission"),
        (None, "i1_image", "missing id: it is in the sample submission"),
    ]


@pytest.mark.parametrize(
    "header", ["ID,PredictionString", "id,predictionstring", "id,PredictionString,more", ",id,PredictionString"]
)
def test_a_wrong_header_is_a_fault_of_row_one(sample, header):
    ((row, _, problem),) = faults_of(sample, GOOD.items(), header)
    assert row == 1 and "header" in problem


def test_additional_cells_are_a_fault(sample):
    ((row, _, problem),) = faults_of(sample, (GOOD | {"i2_image": "none 1 0 0 1 1,"}).items())
    assert (row, problem) == (5, "the row has 3 cells, but must have 2")


def test_a_missing_cell_is_a_fault_and_a_fault_names_its_row_and_id(sample):
    path = sample.parent / "submission.csv"
    path.write_text(sample.read_text().replace("i2_image,none 1 0 0 1 1", "i2_image"))
    assert list(map(str, validate(sample, path))) == ["row 5, i2_image: the row has 1 cells, but must have 2"]
    assert str(Fault(1, None, "wrong")) == "row 1: wrong" and str(Fault(None, "a", "wrong")) == "no row, a: wrong"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", "folder"])
def test_a_file_that_cannot_be_read_is_a_fault(sample, content):
    path = sample.parent / "submission.csv"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    (fault,) = validate(sample, path)
    assert fault.row is None and str(path) in str(fault)


def test_a_sample_that_cannot_be_read_is_an_error(sample):
    with pytest.raises(SubmissionError, match="absent"):
        validate(sample.parent / "absent.csv", sample)


def test_oddities_of_the_sample_are_no_faults_of_a_submission(sample):
    sample.write_text("PredictionString;ID\n" + "".join(f"x; {name}\n" for name in [*GOOD, "s1_study", "total"]))
    assert faults_of(sample, GOOD.items()) == []
    assert [fault[1] for fault in faults_of(sample, list(GOOD.items())[1:])] == ["s1_study"]


word = st.sampled_from(["opacity", "none", "0.5", "0", "1", "2", "-1", "nan", "1e3", "x", "negative", "1_0", "é"])


@given(st.lists(word, max_size=18).map(" ".join), st.sampled_from(["study", "image"]))
def test_a_string_is_valid_only_if_each_of_its_groups_is(text, level):
    words = text.split()
    groups = [" ".join(words[k : k + 6]) for k in range(0, len(words), 6)]
    alone = [not prediction_faults(group, level) for group in groups]
    assert (not prediction_faults(text, level)) == (bool(groups) and all(alone))
