"""What holds for every competition."""

import dataclasses
import os
import subprocess
import sys

import pytest

from kitlib.classes import RSNA_CLASSES
from kitlib.competitions.csv_files import SAMPLE, find_sample
from kitlib.competitions.registry import COMPETITIONS, choose_competition, find_competition, find_data
from kitlib.datasets.registry import READERS
from kitlib.datasets.vinbigdata import CORNERS
from kitlib.errors import KitError, ScoringError, SettingsError, SubmissionError

STAGE_2 = "stage_2_sample_submission.csv"
NEW = [competition for name, competition in COMPETITIONS.items() if name != "siim-covid19"]
every_competition = pytest.mark.parametrize("competition", COMPETITIONS.values(), ids=lambda competition: competition.name)
every_new = pytest.mark.parametrize("competition", NEW, ids=lambda competition: competition.name)


def sample_of(competition, folder, ids):
    competition_rows = competition.baseline_rows(list(ids))
    path = folder / "sample.csv"
    path.write_text("\n".join([",".join(competition.header), *(",".join(row) for row in competition_rows)]) + "\n")
    return path


def test_names_and_limits():
    assert list(COMPETITIONS) == ["siim-covid19", "vinbigdata", "rsna-pneumonia", "ranzcr-clip", "siim-acr"]
    limits = {name: competition.time_limit_hours for name, competition in COMPETITIONS.items() if competition.is_notebook}
    assert limits == {"siim-covid19": 9, "ranzcr-clip": 9}
    answers = {name: {kind: len(classes) for kind, classes in c.answers.items()} for name, c in COMPETITIONS.items()}
    assert answers == {
        "siim-covid19": {"study_classes": 4, "image_classes": 1, "box_classes": 1},
        "vinbigdata": {"image_classes": 1, "box_classes": 14},
        "rsna-pneumonia": {"box_classes": 1},
        "ranzcr-clip": {"image_classes": 11},
        "siim-acr": {"mask_classes": 1},
    }
    # The rules of the competitions: IoU of a hit, size of the published images.
    hit_ious = {name: c.hit_iou for name, c in COMPETITIONS.items() if c.box_classes}
    assert hit_ious == {"siim-covid19": 0.5, "vinbigdata": 0.4, "rsna-pneumonia": 0.5}
    sides = {name: c.side for name, c in COMPETITIONS.items() if c.side is not None}
    assert sides == {"rsna-pneumonia": 1024, "siim-acr": 1024}
    helping = {name: c.helping_classes for name, c in COMPETITIONS.items() if c.helping_classes}
    assert helping == {"rsna-pneumonia": RSNA_CLASSES}


def test_tuning_is_quick_where_the_metric_is_slow():
    assert {name for name, c in COMPETITIONS.items() if c.judge} == {"siim-covid19", "vinbigdata", "siim-acr"}
    assert {name for name, c in COMPETITIONS.items() if c.compare} == {"siim-acr"}


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(
        SettingsError, match="unknown competition 'siim'; available: siim-covid19, vinbigdata, rsna-pneumonia"
    ):
        find_competition("siim")
    assert find_competition("siim-acr").slug == "siim-acr-pneumothorax-segmentation"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "SIIM ACR"}, "Competition.name is 'SIIM ACR'; expected a string of lower-case words"),
        ({"name": "Siim-acr"}, "Competition.name is 'Siim-acr'; expected a string of lower-case words"),
        ({"slug": "siim-acr_2019"}, "Competition.slug is 'siim-acr_2019'; expected a string of lower-case words"),
        ({"metric": 0.5}, "Competition.metric is 0.5; expected a function"),
        ({"time_limit_hours": 0}, "Competition.time_limit_hours is 0; expected a finite number above 0 or null"),
        ({"mask_classes": ()}, "siim-acr has no classes; set study_classes"),
        ({"box_classes": ("a", "b", "a")}, "box_classes of siim-acr contains 'a' more than once"),
    ],
)
def test_an_invalid_competition_is_refused(change, problem):
    with pytest.raises(SettingsError, match=problem):
        dataclasses.replace(find_competition("siim-acr"), **change)


@every_competition
def test_the_baseline_is_valid_in_any_order(competition, tmp_path):
    ids = ["a_study", "b_study", "b_image", "a_image"]
    sample = sample_of(competition, tmp_path, ids)
    assert competition.write_baseline(sample, tmp_path / "baseline.csv") == 4
    assert (tmp_path / "baseline.csv").read_text() == sample.read_text()
    sample_of(competition, tmp_path, ids[::-1])
    assert competition.validate_file(tmp_path / "baseline.csv", sample) == []


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("vinbigdata", "14 0.7070667 0 0 1 1"),  # 10,606 of 15,000 images have no finding
        ("rsna-pneumonia", ""),
        ("siim-acr", "-1"),
        # The labels' numbers of images, of 30,083: 79, 1138, 7240, 279, 529, 2748, 4797, 3195, 8460, 21324 and 830.
        (
            "ranzcr-clip",
            "0.002626068,0.03782867,0.2406675,0.009274341,0.01758468,0.09134727,0.1594588,0.1062062,0.281222,0.7088389,"
            "0.02759033",
        ),
    ],
)
def test_the_baseline_has_the_frequencies_of_the_training_data(name, cells):
    assert [",".join(row) for row in COMPETITIONS[name].baseline_rows(["a", "b"])] == [f"a,{cells}", f"b,{cells}"]


@every_competition
def test_every_fault_of_ids_and_header_has_its_row(competition, tmp_path):
    sample = sample_of(competition, tmp_path, ["a_image", "b_image", "c_image"])
    header, first, second, _ = sample.read_text().splitlines()
    path = tmp_path / "submission.csv"
    path.write_text("\n".join([f"{header},", first, second, first, f"x{second}", "", "b_image"]) + "\n")
    faults = [(fault.row, fault.id, fault.problem.split(":")[0]) for fault in competition.validate_file(path, sample)]
    width = len(competition.header)
    assert faults == [
        (1, None, f"the header is '{header},', but must be '{header}'"),
        (4, "a_image", "duplicate id"),
        (5, "xb_image", "extra id"),
        (7, "b_image", f"the row has 1 cells, but must have {width}"),
        (7, "b_image", "duplicate id"),
        (None, "c_image", "missing id"),
    ]


@every_competition
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_submission_that_cannot_be_read_is_a_fault(competition, content, tmp_path):
    sample, path = sample_of(competition, tmp_path, ["a_image"]), tmp_path / "submission.csv"
    if content is not None:
        path.write_bytes(content)
    (fault,) = competition.validate_file(path, sample)
    assert fault.row is None and str(path) in str(fault)


@every_competition
def test_a_bad_sample_or_truth_is_an_error_that_names_the_file(competition, tmp_path):
    sample = sample_of(competition, tmp_path, ["a_image"])
    (tmp_path / "other.csv").write_text("some,thing\n1,2\n")
    for path in (tmp_path / "other.csv", tmp_path / "absent.csv"):
        with pytest.raises(KitError, match=path.name):
            competition.validate_file(sample, path)
        with pytest.raises(KitError, match=path.name):
            competition.score_files(path, sample)
    with pytest.raises(ScoringError, match=str(tmp_path)):
        competition.score_files(tmp_path, sample)
    for arguments in ({}, {"sample": sample, "truth": tmp_path}):
        with pytest.raises(ValueError, match="either `sample` or `truth` is required"):
            competition.validate_file(sample, **arguments)


@every_new
def test_a_sample_without_rows_or_ids_is_an_error(competition, tmp_path):
    path = sample_of(competition, tmp_path, [])
    with pytest.raises(SubmissionError, match="at least one row"):
        competition.write_baseline(path, tmp_path / "baseline.csv")
    sample_of(competition, tmp_path, ["a", ""])
    with pytest.raises(SubmissionError, match="an id in each row"):
        competition.validate_file(path, path)
    assert not (tmp_path / "baseline.csv").exists()


@every_new
def test_a_sample_needs_only_the_ids_of_which_each_counts_once(competition, tmp_path):
    path = tmp_path / competition.sample
    path.write_text(f"{competition.header[0]}\nb\na\nb\n")
    assert competition.read_sample(path) == ["b", "a"]
    assert competition.write_first(tmp_path, tmp_path / "first.csv") == 2
    assert [line.split(",")[0] for line in (tmp_path / "first.csv").read_text().splitlines()[1:]] == ["b", "a"]


@every_new
def test_a_truth_without_rows_is_an_error(competition, tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text(",".join((*competition.header, *CORNERS, "class_id", "x", "y", "width", "height", "Target")) + "\n")
    with pytest.raises(ScoringError, match=r"truth\.csv has no rows"):
        competition.read_truth(path)


@pytest.mark.parametrize(
    ("dataset", "folder", "expected"),
    [
        ("siim-acr", "", ("siim_acr", "siim-acr-pneumothorax-segmentation")),
        ("ranzcr-clip-catheter-line-classification", "", ("ranzcr", "ranzcr-clip-catheter-line-classification")),
        ("rsna", "", ("rsna", "rsna-pneumonia-detection-challenge")),
        ("siim-covid19", "mine", ("siim", "mine")),
        ("vinbigdata", "vinbigdata", ("vinbigdata", "vinbigdata-chest-xray-abnormalities-detection")),
        ("nih", "nih-chest-xrays", ("nih", "nih-chest-xrays")),
    ],
)
def test_a_data_set_is_named_by_its_reader_or_competition(dataset, folder, expected):
    assert find_data(dataset, folder) == expected


def test_every_competitions_data_set_has_a_reader_and_others_need_a_folder():
    assert {competition.dataset for competition in COMPETITIONS.values()} <= set(READERS)
    with pytest.raises(SettingsError, match="'nih' is not a competition, so also give the folder of its files"):
        find_data("nih")


def test_a_first_file_needs_no_package_for_images_or_models():
    code = "import sys, kitlib.competitions.registry; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "pandas" in loaded and not loaded & {
        "torch",
        "cv2",
        "pydicom",
        "pebble",
        "sklearn",
        "safetensors",
        "ensemble_boxes",
    }


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        ({"stage_1_sample_submission.csv": "a", "stage_2_sample_submission.csv": "b"}, STAGE_2, STAGE_2),
        ({"sample_submission.csv": "a", "x/y/stage_2_sample_submission.csv": "b"}, STAGE_2, f"x/y/{STAGE_2}"),
        ({"x/sample_submission.csv": "a", "x/y/sample_submission.csv": "b"}, SAMPLE, "x/sample_submission.csv"),
        ({"x/sample_submission.csv": "a", "y/sample_submission.csv": "a"}, SAMPLE, "x/sample_submission.csv"),
        ({"new_sample_submission.csv": "a", "x/stage_2_sample_submission.csv": "b"}, SAMPLE, f"x/{STAGE_2}"),
        ({"my_sample_submission.csv": "a", "x/a_sample_submission.csv": "b"}, STAGE_2, "my_sample_submission.csv"),
        ({"x/sample_submission.csv": "a", "y/sample_submission.csv": "b"}, SAMPLE, None),
        ({"a_sample_submission.csv": "a", "b_sample_submission.csv": "b"}, SAMPLE, None),
        ({f"{number:03}/sample_submission.csv": "a" for number in range(101)}, SAMPLE, ""),  # folders of 101 studies
        ({f"{number:03}/sample_submission.csv": "a" for number in range(100)}, SAMPLE, "000/sample_submission.csv"),
        ({"sample_submission.csv/sample_submission.csv": "a"}, SAMPLE, "sample_submission.csv/sample_submission.csv"),
        ({"train.csv": "a", "sample_submission.zip": "a", "x/a_sample_submission.csv": "b"}, SAMPLE, "x/a_" + SAMPLE),
    ],
)
def test_the_sample_of_the_competition_is_found(files, name, found, tmp_path):
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
        os.utime(tmp_path / path, (0, 0))  # files of equal size and time may still differ
    if found:
        assert find_sample(tmp_path, name) == tmp_path / found
    else:
        with pytest.raises(SubmissionError, match="no sample submission" if found == "" else "2 sample submissions differ"):
            find_sample(tmp_path, name)


def test_no_sample_is_found_behind_a_link_or_in_a_folder_that_is_missing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / SAMPLE).write_text("a")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "other")
    for folder in ("data", "absent"):
        with pytest.raises(SubmissionError, match=f"found no sample submission .* in {tmp_path / folder}"):
            find_sample(tmp_path / folder)
        assert COMPETITIONS["siim-acr"].write_first(tmp_path / folder, tmp_path / "first.csv") == 0
    assert not (tmp_path / "first.csv").exists()


@every_competition
def test_the_header_of_the_sample_determines_the_competition(competition, tmp_path):
    sample_of(competition, tmp_path, ["a_image"]).rename(tmp_path / "my_sample_submission.csv")
    assert choose_competition(f"{tmp_path}") == (competition, str(tmp_path))
    assert choose_competition(f"{tmp_path}", "siim-acr")[0].name == "siim-acr"


def test_rules_decide_unless_data_names_another_competition(tmp_path):
    acr, clip = COMPETITIONS["siim-acr"], COMPETITIONS["ranzcr-clip"]
    folder = str(tmp_path / acr.slug)
    assert choose_competition(folder) == (acr, folder)
    assert choose_competition(folder, "ranzcr-clip") == (clip, folder)
    assert choose_competition("siim-acr") == (acr, acr.slug)
    assert choose_competition(acr.slug, "siim-acr") == (acr, acr.slug)
    with pytest.raises(SettingsError, match=r"'rules' is 'ranzcr-clip', but 'data' \('siim-acr'\) belongs to 'siim-acr'"):
        choose_competition("siim-acr", "ranzcr-clip")


def test_data_without_a_known_sample_are_siims_or_an_error(tmp_path, caplog):
    assert choose_competition(f"{tmp_path}/absent")[0].name == "siim-covid19" and "no sample submission" in caplog.text
    (tmp_path / "sample_submission.csv").write_text("a_study\nb_image\n")  # a copy of SIIM's without its header
    assert choose_competition(str(tmp_path))[0].name == "siim-covid19"
    (tmp_path / "sample_submission.csv").write_text("name,value\na,1\n")
    with pytest.raises(SettingsError, match=r"has the header name,value, .* set `rules` to one of siim-covid19, vinbigdata"):
        choose_competition(str(tmp_path))


def test_an_input_called_like_a_competition_is_preferred_to_its_slug(tmp_path, monkeypatch):
    monkeypatch.setattr("kitlib.paths.inputs_root", lambda: tmp_path)
    assert choose_competition("siim-acr")[1] == "siim-acr-pneumothorax-segmentation"
    (tmp_path / "siim-acr").mkdir()
    assert choose_competition("siim-acr") == (COMPETITIONS["siim-acr"], "siim-acr")
    assert find_data("siim-acr", "siim-acr") == ("siim_acr", "siim-acr")
