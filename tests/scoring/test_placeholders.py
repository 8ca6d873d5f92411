import subprocess
import sys

import pytest

from kitlib.scoring.placeholders import write_placeholders
from kitlib.scoring.submission_csv import write_submission
from tests import PROJECT

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
    (tmp_path / "sample.csv").write_bytes(sample.encode())
    assert write_placeholders(tmp_path / "sample.csv", tmp_path / "new" / "first.csv") == 3
    write_submission(tmp_path / "second.csv", IDS)
    assert (tmp_path / "new" / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()


@pytest.mark.parametrize("sample", [None, b"", b"id\n", b"\xff\x00\n", b"id\n" + b"x" * 200_000])
def test_without_a_usable_sample_an_earlier_file_remains(tmp_path, sample):
    if sample is not None:
        (tmp_path / "sample.csv").write_bytes(sample)
    (tmp_path / "first.csv").write_text("earlier")
    assert write_placeholders(tmp_path / "sample.csv", tmp_path / "first.csv") == 0
    assert (tmp_path / "first.csv").read_text() == "earlier"


def test_only_the_standard_library_is_imported():
    script = "import sys, kitlib.scoring.placeholders, kitlib.paths; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    loaded = set(done.stdout.split()) - {name.split(".")[0] for name in bare.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"kitlib"}
