"""Own images: every kind of broken row is a fault or an error that says what to change, and nothing is lost silently."""

import codecs
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitlib.datasets.faults import Faults
from kitlib.datasets.folds import make_folds
from kitlib.datasets.pool import read_mask_pool, read_pool
from kitlib.datasets.registry import compare_with_published, read_dataset
from kitlib.datasets.table_file import read_table_file
from kitlib.datasets.table_reader import read_own
from kitlib.errors import DatasetError, KitError, SettingsError
from kitlib.phantoms.diagnoses import write_diagnoses
from tests.small_own_images import COLUMNS, six_images, write_image

NAMED = {"file": "Image", "label": "Class"}
BOXES = "Image,x,y,w,h,what\nx0,1,2,10,10,Mass\nx0,20,20,10,10,Nodule\nx1,,,,,\n"
BOX_COLUMNS = {"file": "Image", "xmin": "x", "ymin": "y", "width": "w", "height": "h", "finding": "what"}


@pytest.fixture
def folder(tmp_path):
    """The data set `mine`: six images, x0 to x5, in its folder `images`."""
    return six_images(tmp_path / "mine")


def read(folder, text="", columns=NAMED, **parameters):
    if text:
        (folder / "t.csv").write_text(text, encoding="utf-8")
        parameters |= {"table": "t.csv", "columns": columns}
    return read_own(folder, False, **parameters)


def problems(data) -> list[tuple[str, str]]:
    return list(zip(data.faults.row, data.faults.problem, strict=True))


def test_a_table_gives_images_patients_and_classes(folder):
    lines = "".join(f"x{number}.png,{'AB'[number % 2]},p{number // 2}\n" for number in range(6))
    data = read(folder, "Image,Class,Patient\n" + lines, {**NAMED, "patient": "Patient"})
    assert data.faults.empty
    assert data.images.image_id.tolist() == data.images.study_id.tolist() == [f"x{number}" for number in range(6)]
    assert data.images.patient_id.tolist() == ["mine-p0", "mine-p0", "mine-p1", "mine-p1", "mine-p2", "mine-p2"]
    assert set(data.images.source) == {"mine"} and set(zip(data.images["rows"], data.images["columns"], strict=True)) == {
        (40, 50)
    }
    assert data.labels.to_dict("list") == {
        "id": [f"x{n}" for n in range(6)],
        "A": [1, 0, 1, 0, 1, 0],
        "B": [0, 1, 0, 1, 0, 1],
    }
    assert data.boxes.empty and data.masks is None and "diagnosis" not in data.images


# Each row is added to four good ones. What the fault says, and how many of the images x0 to x5 remain.
@pytest.mark.parametrize(
    ("row", "problem", "left"),
    [
        ("nope.png,A", "have no file; left out", 4),
        (",A", "have no file name in Image; left out", 4),
        ("x4.png,", "have no class; left out", 4),
        ("x3.png,B", "repeat an earlier row; left out", 4),
        ("x3.png,A", "the rows of this image differ in label: 'A', 'B'; the image is left out", 3),
        ("damaged.png,A", "left out", 4),
        ("twice.png,A", "2 files have this name, such as a/twice.png, b/twice.png; left out. Write the folder, too", 4),
    ],
)
def test_a_broken_row_is_a_fault(folder, row, problem, left):
    told = {",A": "row 5", "damaged.png,A": "damaged"}.get(row, row.split(",")[0])
    (folder / "images" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no image")
    for name in "ab":
        write_image(folder / name / "twice.png")
    text = f"Image,Class,Patient\nx0.png,A\nx1.png,B\nx2.png,A\nx3.png,B\n{row}\n"
    data = read(folder, text, {**NAMED, "patient": "Patient"})
    assert len(data.images) == len(data.labels) == left
    assert [name for name, text in problems(data) if text.endswith(problem)] == [told]
    unread = data.faults.problem.iloc[-1]
    assert "by folder: images" in unread
    # Files whose name is unclear have a fault already, so they do not count as unread.
    is_unclear = row == "twice.png,A"
    assert ("a 1, b 1" in unread) == (not is_unclear)


def test_files_without_a_row_are_counted_by_folder(folder):
    # The row of x2 and its lack of a class are told, so its file is not forgotten.
    data = read(folder, "Image,Class\nx0.png,A\nx1.png,B\nx2.png,\n")
    assert data.faults.problem.iloc[-1].endswith("by folder: images 3")


def test_sexes_and_ages_that_are_unknown_are_counted(folder):
    text = "Image,Class,s,y\nx0,A,male,40\nx1,B,F,0\nx2,A,x,131\nx3,B,,old\nx4,A,m,\nx5,B,f,130\n"
    data = read(folder, text, {**NAMED, "sex": "s", "age": "y"})
    assert data.images.sex.tolist() == ["M", "F", "", "", "M", "F"]
    np.testing.assert_array_equal(data.images.age, [40, 0, np.nan, np.nan, np.nan, 130])
    # A blank cell is no fault. The text counts the others: x2 alone for the sex; x2 and x3 for the age.
    sex, age = (pair for pair in problems(data) if "is unknown" in pair[1])
    assert sex[0] == "x2" and "and 0 others" in sex[1] and "the sex is unknown" in sex[1]
    assert age[0] == "x2" and "and 1 others" in age[1] and "the age is unknown" in age[1]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (codecs.BOM_UTF8 + "Image;Class\r\nx0;Kühn\r\nx1;B\r\n".encode(), ""),
        ("Image;Class\nx0;Kühn\nx1;B\n".encode("latin-1"), "and 0 other lines are not UTF-8"),
        ("Image\tClass\nx0\tKühn\nx1\tB\n".encode("utf-16"), ""),
        ("sep=;\n Image ;Class\nx0; Kühn\nx1;B\n".encode(), ""),
        ('"Image, old";Image;Class\n1;x0;Kühn\n2;x1;B\n'.encode(), ""),
        ("Image;Class;c\nx0;Kühn;\x81\nx1;B;\n".encode("latin-1"), "and 0 other lines are not UTF-8"),
        (f"Image,Class,{'c' * 200_000}\nx0,Kühn,\nx1,B,\n".encode(), ""),
    ],
    ids=[
        "Excel's UTF-8",
        "Latin-1",
        "UTF-16 with tabs",
        "Excel's separator line",
        "a comma in a name",
        "not Windows-1252",
        "a name of more than 128 KB",
    ],
)
def test_a_csv_file_is_read_as_excel_saves_it(folder, content, fault):
    (folder / "t.csv").write_bytes(content)
    data = read_own(folder, False, table="t.csv", columns=NAMED)
    assert list(data.labels) == ["id", "B", "Kühn"] and data.labels["Kühn"].tolist() == [1, 0]
    assert [row for row, text in problems(data) if fault and text.startswith(fault)] == (["line 2"] if fault else [])


def test_a_file_that_is_no_text_is_refused(folder):
    (folder / "t.csv").write_bytes(b"Image,Class\nx0,\xff\0\n")
    with pytest.raises(DatasetError, match=r"t\.csv is not a text file"):
        read_own(folder, False, table="t.csv", columns=NAMED)
    with pytest.raises(DatasetError, match=r"gone\.csv cannot be read: "):
        read_table_file(folder / "gone.csv", (), Faults())


@pytest.mark.parametrize("is_index", [False, True])
def test_names_of_files_may_be_a_parquet_files_index(folder, is_index):
    table = pd.DataFrame({"Image": ["x0", "x1"], "Class": ["A", "B"]})
    (table.set_index("Image") if is_index else table).to_parquet(folder / "t.parquet")
    assert read_own(folder, False, table="t.parquet", columns=NAMED).images.image_id.tolist() == ["x0", "x1"]


def test_a_parquet_file_keeps_whole_numbers(folder):
    table = pd.DataFrame({"Image": ["x0", "x1"], "Patient": [3.0, np.nan], "Mass": [True, False]})
    table.to_parquet(folder / "t.parquet")
    columns = {"file": "Image", "patient": "Patient", "labels": ["Mass"]}
    data = read_own(folder, False, table="t.parquet", columns=columns)
    assert data.images.patient_id.tolist() == ["mine-3", "mine-x1"] and data.labels.Mass.tolist() == [1, 0]


# What a user meets first: the message says what there is, and which parameter to set.
@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        ("Image,Class\nx0,A\n", {"columns": {}}, r"the column 'Image' names 1 files .*columns: \{file: 'Image'\}"),
        ("Image,Class\nx0,A\n", {"columns": {"file": "Class"}}, "the column 'Image' names 1 files"),
        (
            "Image,Class\nx0,A\n",
            {"columns": {"file": "image"}},
            "has no column 'image', which .* `columns` gives for the key 'file'; the clo",
        ),
        ("Image,Class\nx0,A\n", {"columns": {"fiel": "Image"}}, "Columns has no field 'fiel'; it has: file, patient"),
        ("Image,Class\nx0,A\n", {"columns": {"file": 5}}, "file is 5; expected a string"),
        ("Image,Image\nx0,A\n", {"columns": {"file": "Image"}}, "has 2 columns 'Image'"),
        ("Image,Class\nx0,A,B\n", {}, "a line has more cells than the first"),
        ("Image,Class\n", {}, "has no row below its first line"),
        ("", {"table": "labels.csv", "columns": NAMED}, "has no file 'labels.csv' .*; available tables: book.xlsx"),
        ("", {"table": "book.xlsx", "columns": NAMED}, "save its sheet as `CSV UTF-8`"),
        ("", {"columns": NAMED}, r"`columns` has the keys \['file', 'label'\], but `table` is not set"),
        (
            "Image,Mass\nx0,yes\n",
            {"columns": {"file": "Image", "labels": ["Mass"]}},
            "has neither 0 nor 1, but 'yes'.* `label`",
        ),
        ("Image,view\nx0,1\n", {"columns": {"file": "Image", "labels": ["view"]}}, "has the name of a column of the kit"),
        ("Image,Class\nx0,A\n", {"columns": {**NAMED, "labels": ["Class"]}}, "names 'Class' twice"),
        (
            "Image,Class,Mass\nx0,A,1\n",
            {"columns": {**NAMED, "labels": ["Mass"]}},
            "`label` .'Class'. and `labels` .*'Mass'.*; keep `label`",
        ),
        (
            "Image,Mass\nx0,0\nnope,1\n",
            {"columns": {"file": "Image", "labels": ["Mass"]}},
            "class 'Mass', but none of its images",
        ),
        ("Image,Class,x\nx0,A,1\n", {"columns": {**NAMED, "xmin": "x"}}, "the box keys 'xmin'; set exactly 'xmin', 'ymin'"),
        ("Image,Class\nx0,A\n", {"class_folders": True}, "class_folders is set, and `columns` has label or labels"),
        ("Image,Class\nx0,A\n", {"class_names": {"C": "D"}}, "class_names renames 'C', but the classes are 'A'"),
        ("Image,Class\nx0,A\n", {"class_names": {"A": " "}}, "renames a class to ' '; the new name must be text"),
        ("Image,Class\nx0,A\n", {"columns": {"file": "Image"}, "class_names": {"A": "B"}}, "there are no classes to rename"),
        ("Image,Class\nx0,A\n", {"columns": {**NAMED, "finding": "x"}}, "`columns` has `finding`, but no box"),
        ("Image,Class\nx0,A\n", {"columns": {**NAMED, "box_file": "x"}}, "`box_file`, but `boxes_table` is not set"),
        ("Image,Class\nx0,\n", {}, "no image can be used; there are 1 faults, the first: .* have no class; left out"),
        ("Image,Class\nx0,patients\n", {}, "the class 'patients' has the name of a column of the kit"),
        ("Image,Class\nx0,A\n", {"mask_folder": "masks"}, "or a folder and one of lung_fields, with_heart"),
        (
            "Image,Class\nx0,A\n",
            {"mask_folder": "m", "mask_convention": "x"},
            "or a folder and one of lung_fields, with_heart",
        ),
        ("Image,Class\nx0,A\n", {"mask_folder": "m", "mask_convention": "with_heart"}, "no folder 'm' .* files: images"),
        ("Image,Class\nx0,A\n", {"boxes_table": "b.csv"}, "`boxes_table` is set, but `columns` lacks the boxes"),
        ("Image,Class,s\nx0,A,test\n", {"columns": {**NAMED, "split": "s"}}, "no image to training; leave `split` out"),
        ("Image,Class\nx0,A\nnope,B\n", {}, "class 'B', but none of its images .* have no file; left out"),
        ("", {"class_folders": True}, "all 6 images lie in the folder 'images'"),
        (
            "Image,x,y,w,h\nx0,,,,\n",
            {"columns": {**BOX_COLUMNS, "finding": ""}},
            "the box columns are blank for all usable images",
        ),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_what_to_change(folder, text, parameters, message):
    (folder / "book.xlsx").write_bytes(b"PK")
    parameters = {"columns": NAMED} | parameters if text else parameters
    if text:
        (folder / "t.csv").write_text(text)
        parameters |= {"table": "t.csv"}
    with pytest.raises(KitError, match=f"(?s){message}"):
        read_own(folder, False, **parameters)


def test_several_labels_may_be_unknown(folder):
    text = "Image,Mass,Nodule,study\nx0,1,0,a\nx1,0,,a\nx2,,1,b\nx3,-1,0,c\nx4,1.0,True,\n"
    data = read(folder, text, {"file": "Image", "labels": ["Mass", "Nodule"], "study": "study"})
    labels = data.labels.set_index("id").astype(object).where(lambda table: table.notna(), None)
    # The images of study a disagree on Mass; only one states Nodule. -1 is no label.
    assert labels.T.to_dict("list") == {"a": [None, 0], "b": [None, 1], "c": [None, 0], "x4": [1, 1]}
    texts = " ".join(data.faults.problem)
    assert "have in Mass another value than 0, 1 and blank ('-1'); their label is unknown" in texts
    disagreeing = [pair for pair in problems(data) if "disagree" in pair[1]]
    assert disagreeing == [("a", "and 0 other rows are studies whose images disagree on Mass; their label is unknown")]
    assert "have no study; each is a study of its own" in texts


def test_a_class_that_no_row_has_is_no_lost_class(folder):
    data = read(folder, "Image,Mass,Nodule\nx0,1,0\nx1,0,\n", {"file": "Image", "labels": ["Mass", "Nodule"]})
    np.testing.assert_array_equal(data.labels[["Mass", "Nodule"]], [[1, 0], [0, np.nan]])


@pytest.mark.parametrize(
    ("text", "columns", "is_told"),
    [
        ("Image,Class\nx0,A\nx1,A\n", NAMED, True),
        ("Image,Class\nx0,A\nx1,B\n", NAMED, False),
        ("Image,A\nx0,1\nx1,1\n", {"file": "Image", "labels": ["A"]}, True),
        ("Image,A\nx0,1\nx1,0\n", {"file": "Image", "labels": ["A"]}, False),
        ("Image,A\nx0,1\nx1,\n", {"file": "Image", "labels": ["A"]}, False),
        ("Image,A,B\nx0,1,0\nx1,1,0\n", {"file": "Image", "labels": ["A", "B"]}, False),
    ],
)
def test_one_class_of_all_images_is_told(folder, text, columns, is_told):
    data = read(folder, text, columns)
    assert [row for row, problem in problems(data) if "is the class of all images" in problem] == ["A"] * is_told


def test_a_study_of_two_classes_is_left_out(folder):
    data = read(folder, "Image,Class,s\nx0,A,1\nx1,B,1\nx2,A,2\nx3,B,3\n", {**NAMED, "study": "s"})
    assert data.images.image_id.tolist() == ["x2", "x3"]
    assert ("1", "the study's images have the classes A, B; all are left out") in [
        (r, p.split(". If")[0]) for r, p in problems(data)
    ]


def test_the_split_is_train_or_test(folder):
    text = "Image,Class,s\nx0,A,Train\nx1,B,TEST\nx2,A,val\nx3,B,\nx4,A,foo\n"
    data = read(folder, text, {**NAMED, "split": "s"})
    assert dict(zip(data.images.image_id, data.images["split"], strict=True)) == dict(
        x0="train", x1="test", x2="train", x3="train"
    )
    assert {row for row, text in problems(data) if "split" in text or "validation" in text} == {"x2", "x3", "x4"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            "x2,1,1,0,5,",
            "the box 1, 1, 0, 5 (xmin, ymin, width, height) is not four numbers with an area; the image is left out",
        ),
        (
            "x2,1,,4,5,",
            "the box 1, , 4, 5 (xmin, ymin, width, height) is not four numbers with an area; the image is left out",
        ),
        ("x2,100,100,5,5,Mass", "a box lies outside the image; the image is left out"),
        ("x2,1,1,5,5,", "a box has no finding; the image is left out"),
        ("x2,1,1,inf,5,", "is not four numbers with an area; the image is left out"),
    ],
)
def test_an_image_with_a_box_that_cannot_be_used_is_left_out(folder, row, problem):
    data = read(folder, f"{BOXES}{row}\n", BOX_COLUMNS)
    assert data.images.image_id.tolist() == ["x0", "x1"]
    assert [text.endswith(problem) for _, text in problems(data) if "the image is left out" in text] == [True]
    assert data.boxes.drop(columns="image_id").to_numpy().tolist() == [["Mass", 1, 2, 11, 12], ["Nodule", 20, 20, 30, 30]]


def test_boxes_may_be_in_a_file_of_their_own(folder):
    (folder / "boxes.csv").write_text("name,a,b,c,d\nx0.png,45,5,52,10\nX0,45,5,52,10\nx5.png,1,1,4,4\n")
    columns = {**NAMED, "box_file": "name", "xmin": "a", "ymin": "b", "xmax": "c", "ymax": "d"}
    data = read(folder, "Image,Class\nx0,A\nx1,B\n", columns, boxes_table="boxes.csv")
    assert data.boxes.to_numpy().tolist() == [["x0", "opacity", 45, 5, COLUMNS, 10]]
    texts = " ".join(data.faults.problem)
    assert "a box reaches 2.0 pixels beyond the image; cut at its edge" in texts
    assert "are boxes of images that are not listed, or left out" in texts
    assert "have no row; they count as images without a box" in texts
    # All images, of which some have boxes.
    columns = {"file": "name", "xmin": "a", "ymin": "b", "xmax": "c", "ymax": "d"}
    data = read_own(folder, False, boxes_table="boxes.csv", columns=columns)
    assert len(data.images) == 6 and data.boxes.image_id.tolist() == ["x0", "x5"]


def test_unlabelled_images_are_a_data_set_with_folds(folder):
    (folder / "notes.csv").write_text("a,b\n")
    shutil.copy(folder / "images" / "x0.png", os.fsencode(folder) + b"/\xff.png")
    data = read_own(folder, False)
    assert len(data.images) == 6 and list(data.labels) == ["id"] and data.boxes.empty
    assert data.faults.row.tolist() == ["\\udcff.png", "notes.csv", "x0"]
    folds = make_folds(data.images, data.labels, data.boxes, 3)
    assert folds.fold.value_counts().tolist() == [2, 2, 2]
    assert compare_with_published(data).set_index("what").here[["images", "faults"]].tolist() == [6, 3]


def radiography(folder: Path) -> Path:
    """Laid out like the COVID-19 radiography database."""
    for name in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        for number in (1, 2):
            write_image(folder / name / "images" / f"{name}-{number}.png")
            write_image(folder / name / "masks" / f"{name}-{number}.png")
    return folder


RENAMED = {"COVID": "COVID-19", "Normal": "normal", "Viral Pneumonia": "viral", "Lung_Opacity": "other"}
WITH_MASKS = {"class_folders": True, "mask_folder": "masks", "mask_convention": "with_heart"}


def test_the_radiography_database_is_read_by_parameters(tmp_path):
    folder = radiography(tmp_path / "radiography")
    data = read_dataset("table", folder, False, **WITH_MASKS)
    assert list(data.labels) == ["id", "COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    assert len(data.images) == 8 and (data.labels.drop(columns="id").sum() == 2).all()
    paths = data.images.set_index("image_id").path
    assert all(
        path.replace("masks", "images") == paths[name]
        for name, path in zip(data.masks.image_id, data.masks.path, strict=True)
    )
    assert len(data.masks) == 8 and set(data.images.convention) == {"with_heart"}
    # Without the parameter, masks are no images, and not forgotten.
    data = read_own(folder, False, class_folders=True)
    assert len(data.images) == 8 and data.faults.problem[0].startswith("and 7 other image files lie in a folder of masks")


def test_own_images_are_pooled_with_published_ones(tmp_path):
    folder = radiography(tmp_path / "radiography")
    parts = {
        "table": folder,
        "kermany": write_diagnoses(tmp_path, "kermany", images=24, side=48, seed=1, workers=1, progress=False),
    }
    own = WITH_MASKS | {"class_names": RENAMED}
    pool = read_pool(parts, "three", False, **own)
    assert pool.images[pool.images.source == "radiography"].diagnosis.value_counts().to_dict() == {
        "COVID-19": 2, "normal": 2, "viral": 2
    }  # fmt: skip
    assert pool.images.patient_id.str.startswith(("radiography-", "kermany-")).all()
    # The masks of the images of these classes.
    assert list(pool.masks) == ["image_id", "structure", "path"]
    assert pool.masks.image_id.tolist() == [
        f"{name}-{number}" for name in ("COVID", "Normal", "Viral Pneumonia") for number in (1, 2)
    ]
    with pytest.raises(ValueError, match="rename your classes to diagnoses by `class_names`"):
        read_pool(parts, "three", False, **WITH_MASKS)
    with pytest.raises(SettingsError, match=r"class_folders, .* can only be set for your own images\. To read"):
        read_pool({"kermany": parts["kermany"]}, "three", False, **own)
    assert len(read_mask_pool({"table": folder}, False, **own).masks) == 8


cells = st.sampled_from(
    ["x0.png", "X1.PNG", "x2", "nope.png", "", "A", "B", "0", "1", "-1", "é", "train", "5", 'a"b', "a;b"]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(cells, min_size=4, max_size=4), max_size=6),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16"]),
    separator=st.sampled_from([",", ";", "\t"]),
    keys=st.dictionaries(
        st.sampled_from(["file", "patient", "study", "split", "label", "age", "sex", "view"]), st.sampled_from(list("abcdx"))
    ),
    labels=st.lists(st.sampled_from(list("abcd")), max_size=2),
)
def test_any_table_is_read_or_refused_in_words_and_every_row_is_accounted_for(
    folder, rows, encoding, separator, keys, labels
):
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in [list("abcd"), *rows]]
    (folder / "t.csv").write_bytes("\n".join(separator.join(row) for row in quoted).encode(encoding))
    try:
        data = read_own(folder, False, table="t.csv", columns=keys | ({"labels": labels} if labels else {}))
    except KitError as error:
        assert len(str(error)) > 20
        return
    files = [row["abcd".index(keys["file"])] for row in rows]
    images = {f"x{number}" for number in range(6)}
    named, used = {Path(file).stem.lower() for file in files} & images, set(data.images.image_id)
    with_file = [tuple(row) for row, file in zip(rows, files, strict=True) if Path(file).stem.lower() in images]
    mentioned = " ".join(data.faults.problem)
    assert used <= named and set(data.labels.id) == set(data.images.study_id)
    assert f"by folder: images {6 - len(named)}" in mentioned  # no table of three names lists all six
    assert used == named or "left out" in mentioned
    for missing, problem in (
        (files.count(""), "rows have no file name"),
        (sum(file != "" and Path(file).stem.lower() not in images for file in files), "rows have no file;"),
        (len(set(with_file)) < len(with_file), "repeat an earlier row" if used == named else ""),
    ):
        assert (f"and {missing - 1} other {problem}" if "rows have" in problem else problem) in mentioned or not missing
