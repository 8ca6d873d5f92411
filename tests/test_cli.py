import json
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.classes import SCORED_CLASSES, STUDY_LABEL_COLUMNS
from kitlib.datasets.registry import read_dataset
from kitlib.scoring.submission_csv import write_all_negative

IDS = ["s1_study", "s2_study", "i1_image", "i2_image"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path):
    table = pd.DataFrame(0, index=range(2), columns=list(STUDY_LABEL_COLUMNS))
    table.iloc[0, 0] = table.iloc[1, 1] = 1
    table.insert(0, "id", IDS[:2])
    table.to_csv(tmp_path / "train_study_level.csv", index=False)
    (tmp_path / "train_image_level.csv").write_text(
        "id,boxes,label,StudyInstanceUID\ni1_image,,none 1 0 0 1 1,s1\n"
        "i2_image,\"[{'x': 1, 'y': 2, 'width': 3, 'height': 4}]\",opacity 1 1 2 4 6,s2\n"
    )
    write_all_negative(tmp_path / "submission.csv", IDS)
    return tmp_path


def test_score_prints_one_json_object(folder):
    result = subprocess.run(
        [sys.executable, "-m", "kitlib", "score", "--truth", folder, "--submission", folder / "submission.csv", "--json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    output = json.loads(result.stdout)
    assert set(output) == {"score", *SCORED_CLASSES, "opacity_boxed"}
    # AP 1/2 for negative and none, 0 for typical and opacity; the other two classes are not in the ground truth.
    assert output == {
        **{"score": 0.25, "negative": 0.5, "typical": 0, "indeterminate": None, "atypical": None},
        **{"none": 0.5, "opacity": 0, "opacity_boxed": 0},
    }
    assert "lacks the classes indeterminate" in result.stderr


def test_score_prints_a_table(folder):
    result = run("score", "--truth", folder, "--submission", folder / "submission.csv")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["score", "0.2500"]
    assert len(result.stdout.splitlines()) == 8


def test_score_of_an_incomplete_file_fails_with_the_ids(folder):
    write_all_negative(folder / "submission.csv", IDS[1:])
    result = run("score", "--truth", folder, "--submission", folder / "submission.csv", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "s1_study" in result.stderr


def test_validate_accepts(folder):
    result = run("validate", "--sample", folder / "submission.csv", "--submission", folder / "submission.csv", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"valid": True, "faults": []}


def test_validate_lists_the_faults(folder):
    write_all_negative(folder / "sample.csv", ["s0_study", *IDS])
    with open(folder / "submission.csv", "a") as file:
        file.write("s1_study,negative 2 0 0 1 1\n")
    call = ("validate", "--sample", folder / "sample.csv", "--submission", folder / "submission.csv")
    result = run(*call, "--json")
    assert result.exit_code == 1
    output = json.loads(result.stdout)
    assert output["valid"] is False
    assert [(fault["row"], fault["id"]) for fault in output["faults"]] == [
        (6, "s1_study"),
        (6, "s1_study"),
        (None, "s0_study"),
    ]
    result = run(*call)
    assert result.exit_code == 1
    assert "row 6, s1_study: duplicate id" in result.stdout and "3 faults" in result.stdout


def test_validate_lists_twenty_faults_and_counts_the_others(folder):
    write_all_negative(folder / "sample.csv", [*IDS, *(f"s{number}_study" for number in range(100, 123))])
    call = ("validate", "--sample", folder / "sample.csv", "--submission", folder / "submission.csv")
    *listed, more, verdict = run(*call).stdout.splitlines()
    assert len(listed) == 20 and all("no row, s1" in line for line in listed)
    assert more == "... and 3 more, which --json lists" and verdict.endswith("23 faults")
    assert len(json.loads(run(*call, "--json").stdout)["faults"]) == 23


def test_score_and_validate_know_other_competitions(tmp_path):
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\na, -1\nb, 0 4\n")
    (tmp_path / "submission.csv").write_text("ImageId,EncodedPixels\na,-1\nb,2 4\n")
    call = ("--competition", "siim-acr", "--submission", tmp_path / "submission.csv")
    for truth in (tmp_path, tmp_path / "train-rle.csv"):
        result = run("score", *call, "--truth", truth, "--json")
        assert json.loads(result.stdout) == {"score": 0.75, "with_pneumothorax": 0.5, "without": 1.0}
    table = run("score", *call, "--truth", tmp_path).stdout.splitlines()
    assert table[0] == "score              0.7500" and len(table) == 3
    assert run("validate", *call, "--truth", tmp_path).exit_code == 0
    assert run("validate", *call, "--sample", tmp_path / "submission.csv").exit_code == 0
    for sources in ((), ("--truth", tmp_path, "--sample", tmp_path / "submission.csv")):
        result = run("validate", *call, *sources)
        assert result.exit_code == 2 and "either --sample or --truth is required" in result.stderr
    unknown = run("score", "--competition", "siim", "--submission", tmp_path / "submission.csv", "--truth", tmp_path)
    assert unknown.exit_code == 1 and "available: siim-covid19, vinbigdata, rsna-pneumonia, ranzcr-clip" in unknown.stderr


def test_a_faulty_submission_has_no_score(tmp_path):
    (tmp_path / "train.csv").write_text("image_id,class_id,x_min,y_min,x_max,y_max\na,3,0,0,9,9\nb,14,,,,\n")
    (tmp_path / "submission.csv").write_text("image_id,PredictionString\na,3 0.5 0 0 9 9\nb,\n")
    call = ("--competition", "vinbigdata", "--submission", tmp_path / "submission.csv", "--truth", tmp_path, "--json")
    scored, validated = run("score", *call), run("validate", *call)
    assert scored.exit_code == validated.exit_code == 1 and scored.stdout == "" and "row 3, b: empty" in scored.stderr
    (fault,) = json.loads(validated.stdout)["faults"]
    assert (fault["row"], fault["id"]) == (3, "b")


def test_a_missing_submission_is_a_fault_and_a_missing_sample_a_wrong_call(folder):
    assert run("validate", "--sample", folder / "submission.csv", "--submission", folder / "no.csv").exit_code == 1
    assert run("validate", "--sample", folder / "no.csv", "--submission", folder / "submission.csv").exit_code == 2
    assert run("score", "--truth", folder).exit_code == 2
    assert run("score", "--truth", folder, "--submission", folder / "no.csv").exit_code == 1


def test_phantoms_of_every_layout_can_be_read(tmp_path):
    sizes = {"nih": ("--images", 16), "rsna": ("--images", 6), "siim": ("--train-studies", 4, "--test-studies", 4)}
    for layout, size in sizes.items():
        truth = ("--truth", tmp_path / "truth") if layout == "siim" else ()
        result = run("phantom", "--folder", tmp_path, "--layout", layout, *truth, *size, "--side", 32)
        assert result.exit_code == 0, result.stderr
        data = read_dataset(layout, result.stdout.strip().splitlines()[-1], progress=False)
        assert len(data.images) >= size[1] and len(data.boxes)
    for name, dataset in {"ranzcr-clip": "ranzcr", "siim-acr": "siim_acr"}.items():
        size = ("--images", 5, "--test-images", 5) + (("--side", 32) if dataset == "ranzcr" else ())
        result = run("phantom", "--folder", tmp_path, "--competition", name, "--truth", tmp_path / name, *size)
        assert result.exit_code == 0, result.stderr
        assert len(read_dataset(dataset, result.stdout.strip().splitlines()[-1], progress=False).images) == 5
        assert len(list((tmp_path / name).iterdir())) == 1
    for layout, size in {"jsrt": (), "montgomery": ("--side", 32), "shenzhen": ("--side", 32), "darwin": ()}.items():
        result = run("phantom", "--folder", tmp_path, "--layout", layout, "--images", 4, *size)
        assert result.exit_code == 0, result.stderr
        data = read_dataset(layout, result.stdout.strip().splitlines()[-1], progress=False)
        # One image of Darwin is tagged as lateral, one of Shenzhen has no mask.
        assert len(data.images) == 4 - (layout == "darwin")
        assert data.masks.image_id.nunique() == 4 - (layout in ("darwin", "shenzhen"))


def test_phantoms_refuse_invalid_options(tmp_path):
    for words in (("--layout", "padchest"), ("--layout", "nih", "--truth", "x"), ("--images", 4, "--truth", "x"), ()):
        assert run("phantom", "--folder", tmp_path, *words).exit_code == 2
    assert run("phantom", "--folder", tmp_path, "--layout", "jsrt", "--side", 512).exit_code == 2
    both = ("--layout", "rsna", "--competition", "rsna-pneumonia", "--truth", "x")
    for words in (("--competition", "vinbigdata"), ("--competition", "siim-acr", "--truth", "x", "--side", 320), both):
        assert run("phantom", "--folder", tmp_path, *words).exit_code == 2
    few = run("phantom", "--folder", tmp_path, "--layout", "rsna", "--images", 0)
    assert few.exit_code == 1 and "images >= 3 and side >= 32" in few.stderr
    assert not list(tmp_path.iterdir())


def test_score_and_validate_load_neither_torch_nor_a_decoder(folder):
    code = (
        "import sys; from kitlib.scoring.score import score_files; from kitlib.scoring.validate import validate\n"
        "import kitlib.competitions.registry\n"
        "import kitlib.__main__\n"
        "print([name for name in ('torch', 'pydicom', 'cv2', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
