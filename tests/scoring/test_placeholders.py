import pytest

from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.scoring.placeholders import format_confidence, placeholder
from kitlib.scoring.submission_csv import write_submission

IDS = ["a_study", "b_study", "c_image"]


@pytest.mark.parametrize(
    "sample",
    [
        "id,PredictionString\na_study,x\nb_study,x\nc_image,x\n",
        "\ufeffid\r\na_study\r\nb_study\r\n\r\nc_image",
        "id\na_study\na_study\nneither\n_image\nb_study\nc_image\n",  # repeated and invalid ids
    ],
)
def test_the_file_equals_that_of_a_submission_without_predictions(tmp_path, sample):
    (tmp_path / "sample_submission.csv").write_bytes(sample.encode())
    assert SIIM_COVID19.write_first(tmp_path, tmp_path / "new" / "first.csv") == 3
    write_submission(tmp_path / "second.csv", IDS)
    assert (tmp_path / "new" / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()


@pytest.mark.parametrize("sample", [None, b"", b"id\n", b"\xff\x00\n", b"id\n" + b"x" * 200_000])
def test_without_a_usable_sample_an_earlier_file_remains(tmp_path, sample):
    if sample is not None:
        (tmp_path / "sample_submission.csv").write_bytes(sample)
    (tmp_path / "first.csv").write_text("earlier")
    assert SIIM_COVID19.write_first(tmp_path, tmp_path / "first.csv") == 0
    assert (tmp_path / "first.csv").read_text() == "earlier"


def test_placeholders_are_the_frequencies_in_the_train_tables():
    # Of 6,054 studies 1,676, 2,855, 1,049 and 474 have the four classes; 2,040 of 6,334 images have no box.
    assert placeholder("a_study") == (
        "negative 0.2768418 0 0 1 1 typical 0.471589 0 0 1 1 indeterminate 0.1732739 0 0 1 1 atypical 0.07829534 0 0 1 1"
    )
    assert placeholder("b_c_image") == "none 0.3220714 0 0 1 1"


@pytest.mark.parametrize(
    ("confidence", "text"), [(1.0, "1"), (0.0, "0"), (0.12345678, "0.1234568"), (1e-5, "0.00001"), (1e-16, "0")]
)
def test_confidences_have_no_exponent(confidence, text):
    assert format_confidence(confidence) == text
