"""The SIIM layout becomes tables, and everything broken in it is told."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.siim import read_label_tables, read_test, read_train, studies_from_headers
from kitlib.errors import DatasetError
from kitlib.xrays.writing import write_xray

CLASSES = ["Negative for Pneumonia", "Typical Appearance", "Indeterminate Appearance", "Atypical Appearance"]
NONE = "none 1 0 0 1 1"
BOX = "[{'x': 2.0, 'y': 3.0, 'width': 10.5, 'height': 4.0}]"


def opacity(*edges: float) -> str:
    return "opacity 1 " + " ".join(map(str, edges))


@pytest.fixture
def layout(tmp_path):
    """Three studies: s1 typical with a boxed image and an unboxed one, s2 negative, s3 atypical without a box."""
    pd.DataFrame(
        [["s1_study", 0, 1, 0, 0], ["s2_study", 1, 0, 0, 0], ["s3_study", 0, 0, 0, 1]], columns=["id", *CLASSES]
    ).to_csv(tmp_path / "train_study_level.csv", index=False)
    rows = [
        ["a_image", BOX, opacity(2, 3, 12.5, 7), "s1"],
        ["b_image", None, NONE, "s1"],
        ["c_image", None, NONE, "s2"],
        ["d_image", None, NONE, "s3"],
    ]
    pd.DataFrame(rows, columns=["id", "boxes", "label", "StudyInstanceUID"]).to_csv(
        tmp_path / "train_image_level.csv", index=False
    )
    for image, study, patient in (("a", "s1", "p1"), ("b", "s1", "p1"), ("c", "s2", "p1"), ("d", "s3", "p3")):
        xray(tmp_path / "train" / study / f"series-{image}" / f"{image}.dcm", patient)
    for image, study in (("e", "s4"), ("f", "s4"), ("g", "s5")):
        xray(tmp_path / "test" / study / f"series-{image}" / f"{image}.dcm", "p4")
    sample(tmp_path, ["s5_study", "s4_study", "g_image", "e_image", "f_image"])
    return tmp_path


def xray(path, patient: str, **ids: str) -> None:
    write_xray(path, np.zeros((16, 20), np.uint8), transfer_syntax=ExplicitVRLittleEndian, patient_id=patient, **ids)


def sample(folder, ids) -> None:
    pd.DataFrame({"id": ids, "PredictionString": NONE}).to_csv(folder / "sample_submission.csv", index=False)


def add_image_row(folder, *row) -> None:
    path = folder / "train_image_level.csv"
    table = pd.read_csv(path)
    table.loc[len(table)] = row
    table.to_csv(path, index=False)


def told(faults: pd.DataFrame, row: str) -> str:
    """The one problem told about `row`."""
    (problem,) = faults.problem[faults.row == row]
    return problem


def test_a_whole_layout_gives_the_tables(layout):
    train = read_train(layout, progress=False)
    assert list(train.faults) == ["file", "row", "problem"] and train.faults.empty
    images = train.images.set_index("image_id")
    assert images.index.tolist() == ["a", "b", "c", "d"]
    assert images.study_id.tolist() == ["s1", "s1", "s2", "s3"]
    assert images.patient_id.tolist() == ["p1", "p1", "p1", "p3"]
    assert set(images["rows"]) == {16} and set(images["columns"]) == {20}
    assert set(images.view) == {"PA"} and set(images.source) == {"siim"}
    assert images.false_none.tolist() == [False, True, False, False]
    assert images.path["a"].endswith("train/s1/series-a/a.dcm")
    labels = train.labels.set_index("id")
    assert labels.typical.to_dict() == {"s1": 1, "s2": 0, "s3": 0} and labels.atypical["s3"] == 1
    assert train.boxes.to_numpy().tolist() == [["a", "opacity", 2.0, 3.0, 12.5, 7.0]]
    # Counted in the competition's tables and DICOM headers.
    assert train.published == {"images": 6334, "studies": 6054, "patients": 3261, "boxes": 7853, "false_none": 217}


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("[{'x': 1", "not a Python literal"),
        ("__import__('os').getcwd()", "not a Python literal"),
        ("{'x': 1}", "not a list of boxes"),
        ("[]", "not a list of boxes"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 3.0}]", "needs numbers"),
        ("[{'x': 'left', 'y': 2.0, 'width': 3.0, 'height': 4.0}]", "needs numbers"),
        ("[{'x': 1.0, 'y': 2.0, 'width': -3.0, 'height': 4.0}]", "has no area"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 0.0, 'height': 4.0}]", "has no area"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 3.0, 'height': 0}]", "has no area"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 3.0, 'height': 1e999}]", "has no area"),
        ("[{'x': 900.0, 'y': 2.0, 'width': 3.0, 'height': 4.0}]", "outside the image"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 600.0, 'height': 4.0}]", "by more than 0.1 of its side"),
        ("[{'x': 1.0, 'y': 2.0, 'width': 3.0, 'height': 0.5}]", "thinner than 1 pixel"),
    ],
)
def test_an_image_with_a_broken_box_is_left_out_and_reported(layout, cell, problem):
    """Kept without its box it would pass for a healthy image."""
    xray(layout / "train/s3/series/x.dcm", "p3")
    add_image_row(layout, "x_image", cell, opacity(1, 2, 4, 6), "s3")
    train = read_train(layout, progress=False)
    assert problem in told(train.faults, "x_image") and "left out" in told(train.faults, "x_image")
    assert "x" not in set(train.images.image_id) and set(train.boxes.image_id) == {"a"}
    # Someone did mark x, so the other image of its study was not the one looked at.
    assert train.images.set_index("image_id").false_none["d"]


def rename_all(train, new) -> None:
    for path in list(train.rglob("*.dcm")):
        path.rename(new(path))


def move_deeper(train) -> None:
    train.rename(train.with_name("moved"))
    train.mkdir()
    train.with_name("moved").rename(train / "train")


MISPLACED = {
    "one folder too deep": move_deeper,
    "flat": lambda train: rename_all(train, lambda path: train / path.name),
    "without suffix": lambda train: rename_all(train, lambda path: path.with_suffix("")),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_training_files_of_the_table_are_found_wherever_they_lie_below_train(layout, name):
    expected = read_train(layout, progress=False)
    MISPLACED[name](layout / "train")
    train = read_train(layout, progress=False)
    assert train.images.drop(columns="path").equals(expected.images.drop(columns="path"))
    assert train.faults.problem.tolist() == [
        "and 3 other files are not in the form <study>/<series>/<image>.dcm; used, because a table lists their images"
    ]


def test_the_tables_study_counts_and_images_outside_train_are_told(layout):
    move(layout, "train/s2/series-a/a.dcm", "train/s1/series-a/a.dcm")
    cv2.imwrite(str(layout / "cover.png"), np.zeros((8, 8), np.uint8))
    train = read_train(layout, progress=False)
    assert train.images.study_id.tolist() == ["s1", "s1", "s2", "s3"]
    assert told(train.faults, "a_image") == "the file is below the study s2; the table's study is used"
    assert train.faults["row"].tolist() == ["a_image", "cover.png"]


@pytest.mark.parametrize("count", [0, 4])
def test_no_training_file_of_the_table_is_an_error_that_shows_one_and_the_right_place(layout, count):
    train = layout / "train"
    rename_all(train, lambda path: path.with_stem(f"{path.stem}2")) if count else shutil.rmtree(train)
    message = rf"train holds {count} files.*none of them is a <study>/<series>/<image>\.dcm.*such as train/s\d/<series>/"
    with pytest.raises(DatasetError, match=message) as error:
        read_train(layout, progress=False)
    assert not count or "the first is train/s1/series-a/a2.dcm" in str(error.value)


def test_boxes_of_resized_copies_are_scaled_by_the_original_sizes(layout, tmp_path_factory):
    """As in the copies with train/<image>.png and meta.csv, with the competition's tables in another input."""
    tables = tmp_path_factory.mktemp("tables")
    for name in ("train_study_level.csv", "train_image_level.csv"):
        (layout / name).rename(tables / name)
    shutil.rmtree(layout / "train")
    (layout / "train").mkdir()
    for name in "abc":
        cv2.imwrite(str(layout / "train" / f"{name}.png"), np.zeros((8, 8), np.uint8))
    with pytest.raises(DatasetError, match=r"train_study_level\.csv is missing, also in subfolders and additional folders"):
        read_train(layout, progress=False)
    with pytest.raises(DatasetError, match=r"meta\.csv is missing.*dim0 and dim1"):
        read_train(DataFolder(layout, [tables]), progress=False)
    rows = ["image_id,dim0,dim1,split", "a,16,20,train", "b,16,20,train", "c,0,20,train", "e,16,20,test"]
    (layout / "meta.csv").write_text("\n".join(rows))
    train = read_train(DataFolder(layout, [tables]), progress=False)
    # An input beside serves only with what is missing: its own images, at full size, are not used.
    xray(tables / "train" / "s1" / "series" / "a.dcm", "p1")
    (tables / "train" / "s1" / "series" / "b.dcm").write_bytes(b"broken")
    again = read_train(DataFolder(layout, [tables]), progress=False)
    assert again.images.equals(train.images) and again.boxes.equals(train.boxes) and again.faults.equals(train.faults)
    shutil.rmtree(tables / "train")
    (layout / "train" / "b.png").write_bytes(b"broken")
    beside = read_train(DataFolder(tables, [layout]), progress=False)
    assert beside.images.image_id.tolist() == ["a"] and "header cannot be read" in told(beside.faults, "b")
    # The box 2, 3, 12.5, 7 of an image of 20 x 16 pixels, which became 8 x 8.
    assert train.boxes.to_numpy().tolist() == [["a", "opacity", 0.8, 1.5, 5.0, 3.5]]
    assert train.images.image_id.tolist() == ["a", "b"] and train.images.patient_id.tolist() == ["s1", "s1"]
    problems = " | ".join(train.faults["row"] + " " + train.faults.problem)
    assert "c and 0 other images have no valid size; left out" in problems
    assert "with boxes are resized, such as the first from 20 x 16 to 8 x 8 pixels; the boxes are scaled" in problems


def test_boxes_beyond_the_edges_are_cut_and_reported(layout):
    xray(layout / "train/s3/series/x.dcm", "p3")
    add_image_row(
        layout, "x_image", "[{'x': -1.5, 'y': 2.0, 'width': 23.0, 'height': 4.0}]", opacity(-1.5, 2, 21.5, 6), "s3"
    )
    train = read_train(layout, progress=False)
    assert train.boxes[train.boxes.image_id == "x"].to_numpy().tolist() == [["x", "opacity", 0.0, 2.0, 20.0, 6.0]]
    assert train.faults.row.tolist() == ["x_image"] and "1.5 pixels" in train.faults.problem[0]


def test_rows_files_and_studies_that_do_not_match_are_reported(layout):
    xray(layout / "train/s9/series/extra.dcm", "p9")
    (layout / "train/s9/notes.txt").write_text("?")
    add_image_row(layout, "gone_image", None, NONE, "s2")
    add_image_row(layout, "orphan_image", None, NONE, "s8")
    add_image_row(layout, "wrong", None, NONE, "s2")
    add_image_row(layout, "c_image", None, NONE, "s2")
    add_image_row(layout, "liar_image", None, opacity(1, 2, 3, 4), "s2")
    studies = pd.read_csv(layout / "train_study_level.csv")
    studies.loc[len(studies)] = ["s7_study", 1, 1, 0, 0]
    studies.loc[len(studies)] = ["s6_study", 1, 0, 0, 0]
    studies.to_csv(layout / "train_study_level.csv", index=False)
    train = read_train(layout, progress=False)
    assert train.images.image_id.tolist() == ["a", "b", "c", "d"]
    assert train.labels.id.tolist() == ["s1", "s2", "s3", "s6"]
    for row, problem in {
        "train/s9/series/extra.dcm": "no usable row",
        "notes": "is not in the form <study>/<series>/<image>.dcm",
        "gone": "no file",
        "orphan_image": "study 's8' has no usable row",
        "wrong": "does not end in _image",
        "c_image": "occurs again",
        "liar_image": "contradicts the column 'boxes'",
        "s7_study": "1 for exactly one class",
        "s6_study": "no usable image",
    }.items():
        assert problem in told(train.faults, row)
    assert len(train.faults) == 9


def test_an_unreadable_training_file_is_left_out_and_reported(layout):
    (layout / "train/s1/series-a/a.dcm").write_bytes(b"garbage")
    train = read_train(layout, progress=False)
    assert train.images.image_id.tolist() == ["b", "c", "d"] and train.boxes.empty
    assert "header cannot be read" in told(train.faults, "a")
    assert train.images.false_none.tolist() == [True, False, False]  # b's study still has a boxed image


@pytest.mark.parametrize("name", ["train_study_level.csv", "train_image_level.csv"])
def test_a_missing_table_or_column_names_the_file_and_the_remedy(layout, name):
    table = pd.read_csv(layout / name)
    table.drop(columns=table.columns[1]).to_csv(layout / name, index=False)
    with pytest.raises(DatasetError, match=rf"{name} lacks.*{table.columns[1]}"):
        read_train(layout, progress=False)
    (layout / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=f"{name} is not a CSV file"):
        read_train(layout, progress=False)
    (layout / name).unlink()
    with pytest.raises(DatasetError, match=rf"{name} is missing.*inputs/README.md"):
        read_train(layout, progress=False)


def test_a_test_set_follows_the_samples_order(layout):
    test = read_test(layout, progress=False)
    assert test.faults.empty
    assert test.study_ids == ("s5", "s4") and test.image_ids == ("g", "e", "f")
    assert test.images.image_id.tolist() == ["e", "f", "g"] and set(test.images.patient_id) == {"p4"}


def test_a_test_set_of_another_size_than_the_sample_keeps_both(layout):
    sample(layout, ["s4_study", "s0_study", "e_image", "z_image", "e_image", "odd"])
    test = read_test(layout, progress=False)
    assert test.study_ids == ("s4", "s0", "s5") and test.image_ids == ("e", "z", "f", "g")
    assert test.sample_ids == ("s4_study", "s0_study", "e_image", "z_image")
    assert sorted(test.faults.row) == ["e_image", "f", "g", "odd", "s0_study", "s5", "z_image"]


@pytest.mark.parametrize("odd", ["", "_study", "_image", "s4", "s4_patient"])
def test_the_samples_own_ids_are_as_written_in_its_order_without_odd_ones(layout, odd):
    sample(layout, ["g_image", odd, "s4_study", "a_b_study", "g_image"])
    test = read_test(layout, progress=False)
    assert test.sample_ids == ("g_image", "s4_study", "a_b_study")
    assert test.study_ids == ("s4", "a_b", "s5") and test.image_ids == ("g", "e", "f")
    assert "left out" in told(test.faults, odd) and "one row" in told(test.faults, "g_image")


def test_an_empty_or_missing_sample_has_no_ids(layout):
    sample(layout, [])
    assert read_test(layout, progress=False).sample_ids == ()
    (layout / "sample_submission.csv").unlink()
    assert read_test(layout, progress=False).sample_ids == ()


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_test_files_that_cannot_be_read_keep_their_row(layout, content):
    (layout / "test/s4/series-e/e.dcm").write_bytes(content)
    test = read_test(layout, progress=False)
    row = test.images.set_index("image_id").loc["e"]
    assert (row.study_id, row.patient_id, row["rows"], row["columns"]) == ("s4", "s4", 0, 0)
    assert test.image_ids == ("g", "e", "f") and "included" in told(test.faults, "e")


@pytest.mark.parametrize("kind", ["study", "image"])
def test_a_sample_without_one_kind_is_filled_from_the_files(layout, kind):
    sample(layout, [name for name in ("s4_study", "s5_study", "e_image", "f_image", "g_image") if not name.endswith(kind)])
    test = read_test(layout, progress=False)
    assert test.study_ids == ("s4", "s5") and test.image_ids == ("e", "f", "g")


def test_a_test_set_without_images_sample_or_folder_is_read_from_what_remains(layout):
    (layout / "test/s6").mkdir()  # a study without an image
    assert read_test(layout, progress=False).study_ids == ("s5", "s4", "s6")
    (layout / "sample_submission.csv").unlink()
    assert read_test(layout, progress=False).image_ids == ("e", "f", "g")
    sample(layout, ["s4_study", "e_image"])
    (layout / "test").rename(layout / "elsewhere")
    test = read_test(layout, progress=False)
    assert test.images.empty and test.study_ids == ("s4",) and test.image_ids == ("e",)
    assert "folder is missing" in told(test.faults, "")
    (layout / "sample_submission.csv").unlink()
    with pytest.raises(DatasetError, match="neither ids in sample_submission"):
        read_test(layout, progress=False)


def move(layout, target, source="test/s4/series-e/e.dcm") -> None:
    (layout / target).parent.mkdir(parents=True, exist_ok=True)
    (layout / source).rename(layout / target)


def link(layout, path, target) -> None:
    (layout / path).symlink_to(target)


LAYOUTS = {
    "flat in the study": lambda layout: move(layout, "test/s4/e.dcm"),
    "one folder deeper": lambda layout: move(layout, "test/s4/series-e/more/e.dcm"),
    "study one folder deeper": lambda layout: move(layout, "test/archive/s4/series-e/e.dcm"),
    "study two folders deep": lambda layout: move(layout, "test/archive/s4/e.dcm"),
    "no suffix": lambda layout: move(layout, "test/s4/series-e/e"),
    "another suffix": lambda layout: move(layout, "test/s4/series-e/e.dicom"),
    "linked study": lambda layout: (move(layout, "elsewhere", "test/s4"), link(layout, "test/s4", layout / "elsewhere")),
    "linked series": lambda layout: (
        move(layout, "elsewhere", "test/s4/series-e"),
        link(layout, "test/s4/series-e", layout / "elsewhere"),
    ),
    "circle of links": lambda layout: (link(layout, "test/s4/up", ".."), link(layout, "test/s4/series-e/up", "../..")),
    "link to a study": lambda layout: link(layout, "test/a0", "s4"),
    "copy elsewhere": lambda layout: shutil.copytree(layout / "test/s4/series-e", layout / "test/a0/series-e"),
    "header beside a PNG": lambda layout: (
        move(layout, "test/s4/e.png"),
        (layout / "test/s4/e.json").write_text("{}"),
    ),
    "table beside": lambda layout: (layout / "test/s4/series-e/e.csv").write_text("x"),
    "PNG beside": lambda layout: (move(layout, "test/s4/e.dcm"), (layout / "test/s4/e.png").write_bytes(b"")),
    "link upwards": lambda layout: link(layout, "test/up", ".."),
    "copy beside": lambda layout: shutil.copy(layout / "test/s4/series-e/e.dcm", layout / "test/s4/e.dcm"),
}
# Number of faults; 1 for all others.
TOLD = {
    **{"study two folders deep": 0, "linked study": 0, "linked series": 0, "circle of links": 0, "copy beside": 1},
    **{"header beside a PNG": 2, "PNG beside": 2, "link upwards": 0},
}


@pytest.mark.parametrize("headers", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_image_of_the_sample_is_found_wherever_it_lies(layout, name, headers):
    LAYOUTS[name](layout)
    test = read_test(layout, progress=False, headers=headers)
    assert test.images[["image_id", "study_id"]].to_numpy().tolist() == [["e", "s4"], ["f", "s4"], ["g", "s5"]]
    assert all(Path(path).is_file() for path in test.images.path)
    assert "a0" not in test.images.path[0]  # of two files, the one below the sample's study
    assert Path(test.images.path[0]).suffix in ("", ".dcm", ".dicom", ".png")
    assert name != "PNG beside" or test.images.path[0].endswith("e.dcm")
    faults = test.faults[~test.faults.problem.str.startswith("the study is not in")]
    assert len(faults) == TOLD.get(name, 1)
    assert read_test(layout, progress=False, headers=headers).faults.equals(test.faults)


def test_no_sample_and_no_usable_test_file_are_an_error_that_shows_one(layout):
    rename_all(layout / "test", lambda path: layout / "test" / path.name)
    (layout / "sample_submission.csv").unlink()
    message = (
        r"no file of the form <study>/<series>/<image>\.dcm.*The first of 4 faults: .*test/e\.dcm e: is not in the form"
    )
    with pytest.raises(DatasetError, match=message):
        read_test(layout, progress=False)


def test_the_study_of_a_file_without_a_folder_is_in_its_header(layout):
    (layout / "test/s4/series-e/e.dcm").unlink()
    (layout / "test/s4/series-f/f.dcm").unlink()
    xray(layout / "test/e.dcm", "p4", study_id="s4")
    xray(layout / "test/f", "p4", study_id="of no row")
    xray(layout / "test/s5/series-g/g.dcm", "p4", study_id="s4")  # its path states another study, which counts
    test = read_test(layout, progress=False, headers=False)
    assert test.images.study_id.tolist() == ["e", "f", "s5"] and (test.images[["rows", "columns"]] == 0).all(axis=None)
    assert studies_from_headers(test.images, test.study_ids).study_id.tolist() == ["s4", "f", "s5"]
    assert read_test(layout, progress=False).images.study_id.tolist() == ["s4", "f", "s5"]


def test_without_a_sample_only_files_in_the_usual_form_are_test_images(layout):
    (layout / "sample_submission.csv").write_bytes(b"")
    move(layout, "test/s4/series-e/Thumbs.db")
    move(layout, "test/flat.dcm", "test/s4/series-f/f.dcm")
    move(layout, "test/s5/series-g/g,h.dcm", "test/s5/series-g/g.dcm")
    xray(layout / "test/s5/series-i/i.dcm", "p5")
    test = read_test(layout, progress=False)
    assert test.submission_ids == ("s4_study", "s5_study", "i_image")
    assert test.faults.problem.str.endswith("left out").tolist() == [False, True, True]
    assert "no id that ends in _study" in told(test.faults, "") and "form <study>" in told(test.faults, "flat")
    assert "characters" in told(test.faults, "g,h")


boxes_drawn = st.lists(
    st.tuples(*[st.floats(0, 4000), st.floats(0, 4000), st.floats(1.5, 2000), st.floats(1.5, 2000)]), min_size=1, max_size=6
)


@settings(max_examples=15, deadline=None)
@given(boxes_drawn)
def test_boxes_come_back_as_they_were_written(tmp_path_factory, boxes):
    folder = tmp_path_factory.mktemp("tables")
    cell = str([dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in boxes])
    (folder / "train_study_level.csv").write_text(",".join(["id", *CLASSES]) + "\ns_study,0,1,0,0\n")
    pd.DataFrame([["i_image", cell, opacity(0, 0, 1, 1), "s"]], columns=["id", "boxes", "label", "StudyInstanceUID"]).to_csv(
        folder / "train_image_level.csv", index=False
    )
    _, read, images = read_label_tables(folder)
    expected = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    np.testing.assert_allclose(read[["xmin", "ymin", "xmax", "ymax"]], expected)
    assert images.to_numpy().tolist() == [["i", "s", False]]


@pytest.mark.real_data
def test_the_real_tables(real_data):
    """Counts of shared/facts/siim-competition.md, sections 3 and 4."""
    labels, boxes, images = read_label_tables(real_data / "siim_csv")
    assert (len(labels), len(images), len(boxes)) == (6054, 6334, 7853)
    assert labels[["typical", "negative", "indeterminate", "atypical"]].sum().tolist() == [2855, 1676, 1049, 474]
    assert images.false_none.sum() == 217 and images[images.false_none].study_id.nunique() == 177
    assert (boxes.xmin < 0).sum() == 1  # cut when the sizes are known
    per_image = boxes.groupby("image_id").size().value_counts().to_dict()
    assert per_image == {1: 973, 2: 3113, 3: 183, 4: 23, 5: 1, 8: 1}
