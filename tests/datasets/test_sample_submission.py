"""The ids of a sample submission are read however the file is written, and every repair is told."""

import pytest

from kitlib.datasets.sample_submission import read_sample
from kitlib.errors import SubmissionError

IDS = ("b_study", "a b_study", "i_image")
PLAIN = "id,PredictionString\nb_study,negative 1 0 0 1 1\na b_study,negative 1 0 0 1 1\ni_image,none 1 0 0 1 1\n"
ONLY_IDS = "b_study\na b_study\ni_image\n"


@pytest.mark.parametrize(
    ("content", "repairs"),
    [
        (PLAIN, []),
        ("\ufeff" + PLAIN, []),
        (PLAIN.replace("\n", "\r\n"), []),
        (PLAIN.replace("\n", "\r"), []),
        (PLAIN.replace("\n", "\n\n"), []),
        (PLAIN.replace("\nb_study,", '\n"b_study",'), []),
        (PLAIN.encode("utf-16"), ["read as UTF-16"]),
        (PLAIN.encode("utf-16")[:-1], ["read as UTF-16"]),
        (PLAIN.replace("String", "Stríng").encode("latin-1"), ["read as Latin-1", "Stríng' instead of"]),
        (PLAIN.replace(",", ";"), ["separated by ';'"]),
        (PLAIN.replace(",", "\t"), ["separated by '\\t'"]),
        (PLAIN.replace("id,", "ID,"), ["'ID,PredictionString' instead of"]),
        (PLAIN.split("\n", 1)[1], ["the header is missing"]),
        (ONLY_IDS, ["the header is missing"]),
        ("id\n" + ONLY_IDS, ["the header is 'id' instead of"]),
        ("PredictionString,id\nx,b_study\nx,a b_study\nx,i_image", ["'PredictionString,id' instead of"]),
        ("n,id,PredictionString\n0,b_study,x\n1,a b_study,x\n2,i_image,x", ["'n,id,PredictionString' instead of"]),
        (PLAIN.replace("b_study,", "b_study ,").replace("i_", "\ti_"), ["blanks around it; they are removed (and 2 more)"]),
        (PLAIN + "i_image,x\ni_image ,x\nb_study,x\n", ["blanks", "occurs again; it gets one row (and 1 more)"]),
        (PLAIN + "total,3\n,\n_image,x\n", ["neither in _study nor in _image; left out (and 2 more)"]),
        (PLAIN.replace("a b_study,", '"a b_study,'), []),  # a quote that never ends
    ],
)
def test_a_sample_keeps_its_ids_and_its_order(tmp_path, caplog, content, repairs):
    path = tmp_path / "sample.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sample = read_sample(path)
    assert sample.ids == IDS
    assert len(sample.repairs) == len(repairs)
    assert all(words in problem for (_, problem), words in zip(sample.repairs, repairs, strict=True))
    assert len(caplog.records) == len(repairs) and all(str(path) in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"id,PredictionString\n", b"\xff\xfe\x00", b"\x89PNG\0\xff", b"id\ns4\n"]
)
def test_a_sample_without_ids_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "sample.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SubmissionError, match=r"sample\.csv"):
        read_sample(path)


def test_an_odd_row_is_named(tmp_path):
    (tmp_path / "sample.csv").write_text(PLAIN + "total,3\n")
    problem = "the id ends neither in _study nor in _image; left out"
    assert read_sample(tmp_path / "sample.csv").repairs == (("total", problem),)
