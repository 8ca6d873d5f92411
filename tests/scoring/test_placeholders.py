import pytest

from kitlib.competitions.siim_covid19 import SIIM_COVID19
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
