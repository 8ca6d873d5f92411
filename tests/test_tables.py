import numpy as np
import pandas as pd
import pytest

from kitlib.errors import TableError
from kitlib.tables import (
    BOX,
    SCHEMAS,
    check_table,
    class_columns,
    concatenate,
    cut_boxes,
    findings_of,
    listed_name,
    read_table,
    read_text_table,
    write_table,
)

DETECTIONS = pd.DataFrame(
    {
        "image_id": ["a", "a"],
        "model": "m",
        "fold": 0,
        "score": [0.5, 0.25],
        "xmin": [1.5, 2],
        "ymin": [1, 2],
        "xmax": [10, 20],
        "ymax": [10, 20],
    }
)


def test_a_table_returns_from_its_file_unchanged(tmp_path):
    write_table(DETECTIONS.assign(extra="kept"), "detections", tmp_path / "d.parquet")
    back = read_table("detections", tmp_path / "d.parquet")
    pd.testing.assert_frame_equal(back, check_table(DETECTIONS.assign(extra="kept"), "detections"))
    assert list(back.columns) == [*SCHEMAS["detections"], "extra"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": [0.5, 1.5]}, r"column score: 1 value\(s\) are not in 0..1 or NaN; the first is 1.5 in row 1"),
        ({"xmax": [1, 20]}, "1 boxes have no area"),
        ({"ymin": [np.nan, 0]}, "not finite pixels"),
        ({"fold": ["x", 0]}, "column fold is not numeric"),
        ({"image_id": [None, "a"]}, "column image_id: the cell in row 0 is empty"),
    ],
)
def test_an_invalid_value_is_named(change, message):
    with pytest.raises(TableError, match=message):
        check_table(DETECTIONS.assign(**change), "detections")


def test_missing_columns_and_doubled_keys_are_named():
    with pytest.raises(TableError, match=r"missing column\(s\) score"):
        check_table(DETECTIONS.drop(columns="score"), "detections")
    with pytest.raises(TableError, match="2 rows are duplicates in `id`"):
        check_table(pd.DataFrame({"id": ["a", "a"], "fold": [0, 1]}), "folds")
    with pytest.raises(TableError, match="unknown table 'fold'"):
        check_table(DETECTIONS, "fold")


def test_concatenating_nothing_gives_an_empty_table_with_the_right_dtypes():
    nothing = concatenate([], "detections")
    assert len(nothing) == 0
    assert nothing.dtypes.to_dict() == check_table(DETECTIONS, "detections").dtypes.to_dict()


def test_missing_and_damaged_files_are_named(tmp_path):
    (tmp_path / "folds.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(TableError, match="cannot be read as Parquet"):
        read_table("folds", tmp_path / "folds.parquet")
    with pytest.raises(TableError, match=r"images\.parquet is missing .*folds\.parquet"):
        read_table("images", tmp_path / "images.parquet")


LUNGS = pd.DataFrame({"image_id": ["a", "b"], "verdict": ["found", "too small"], "area": [0.3, 0.0]}).assign(
    xmin=[10.0, 0.0], ymin=[5.0, 0.0], xmax=[90.0, 100.0], ymax=[70.0, 80.0]
)
MASK_SCORES = pd.DataFrame({"image_id": ["a", "a"], "model": "m", "fold": -1, "structure": ["lungs", "heart"]}).assign(
    dice=[0.9, 0.5], jaccard=[9 / 11, 1 / 3]
)


@pytest.mark.parametrize(
    ("name", "table", "change", "message"),
    [
        ("lungs", LUNGS, {}, None),
        (
            "lungs",
            LUNGS,
            {"area": [0.3, 1.2]},
            r"column area: 1 value\(s\) are not in 0..1 or NaN; the first is 1.2 in row 1",
        ),
        ("lungs", LUNGS, {"image_id": "a"}, "2 rows are duplicates in `image_id`"),
        ("lungs", LUNGS, {"xmax": [90.0, 0.0]}, "1 boxes have no area"),
        ("lungs", LUNGS, {"ymax": [np.nan, 80.0]}, "column ymax: .* not finite pixels"),
        ("mask_scores", MASK_SCORES, {}, None),
        ("mask_scores", MASK_SCORES, {"structure": "lungs"}, "2 rows .* `image_id`, `model`, `fold`, `structure`"),
        ("mask_scores", MASK_SCORES, {"dice": [90, 50]}, r"column dice: 2 value\(s\) are not in 0..1"),
    ],
)
def test_tables_of_lungs_are_checked(name, table, change, message, tmp_path):
    if message is None:
        write_table(table, name, tmp_path / "t.parquet")
        pd.testing.assert_frame_equal(read_table(name, tmp_path / "t.parquet"), check_table(table, name))
    else:
        with pytest.raises(TableError, match=message):
            check_table(table.assign(**change), name)


NESTED = pd.DataFrame({"image_id": ["a", "a"], "model": "m", "outer": [-1, 2], "fold": 0, "sick": [0.2, 0.4], "well": 0.6})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer": 2}, "2 rows are duplicates in `image_id`, `model`, `outer`, `fold`"),
        ({"outer": ["none", 2]}, "column outer is not numeric"),
        ({"well": [0.5, 1.5]}, r"column well: 1 value\(s\) are not in 0..1"),
    ],
)
def test_nested_scores_are_unique_per_outer_and_inner_fold_and_have_any_classes(change, message, tmp_path):
    write_table(NESTED, "nested_scores", tmp_path / "t.parquet")
    back = read_table("nested_scores", tmp_path / "t.parquet")
    assert class_columns(back, "nested_scores") == ["sick", "well"] and back.outer.tolist() == [-1, 2]
    with pytest.raises(TableError, match=message):
        check_table(NESTED.assign(**change), "nested_scores")


@pytest.mark.parametrize(
    ("box", "cut", "overhang", "problem"),
    [
        # An image of 100 columns and 50 rows; a box may reach beyond by a tenth of a side, and must keep one pixel.
        ((0, 0, 100, 50), (0, 0, 100, 50), 0, ""),
        ((-10, 0, 100, 50), (0, 0, 100, 50), 10, ""),
        ((-10.1, 0, 100, 50), None, 10.1, "by more than 0.1 of its side"),
        ((0, 0, 110, 55), (0, 0, 100, 50), 10, ""),
        ((0, 0, 50, 55.1), None, 5.1, "by more than 0.1 of its side"),
        ((99, 0, 105, 50), (99, 0, 100, 50), 5, ""),
        ((99.1, 0, 105, 50), None, 5, "thinner than 1 pixel"),
        ((5, 5, 5.9, 20), None, 0, "thinner than 1 pixel"),
        ((100, 0, 105, 50), None, 5, "lies outside the image"),
        ((-5, 0, 0, 50), None, 5, "lies outside the image"),
    ],
)
def test_boxes_from_outside_are_cut_or_refused_by_one_rule(box, cut, overhang, problem):
    images = pd.DataFrame({"image_id": ["other", "a"], "rows": [9, 50], "columns": [9, 100]})
    boxes = pd.DataFrame([("a", *box)], columns=["image_id", *BOX], index=[7])
    found, beyond, problems = cut_boxes(boxes, images)
    assert beyond[7] == pytest.approx(overhang) and problem in problems[7] and bool(problem) == bool(problems[7])
    if cut:
        assert tuple(found.loc[7, list(BOX)]) == cut
    assert cut_boxes(boxes[:0], images)[2].empty
    with pytest.raises(TableError, match="the image 'a' has a box, but no size in the `images` table"):
        cut_boxes(boxes, images[:1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_table_keeps_its_cells_in_any_unicode(tmp_path, encoding):
    (tmp_path / "x.csv").write_text("id,name\r\n007,NA\r\n8,\u00e4\r\n,\r\n", encoding=encoding, newline="")
    assert read_text_table(tmp_path / "x.csv", ["id"]).to_numpy().tolist() == [["007", "NA"], ["8", "\u00e4"], ["", ""]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id\n\xe4\n", r"x\.csv, line 2: the byte b'\\xe4' is not UTF-8"),
        (b"id\n\0\n", "NUL"),
        (b"", "is not a CSV file"),
        (b"id,name\na,b,c\n", "a line has more cells than the first"),
        (b"name\na\n", r"lacks the columns \['id'\]; it has \['name'\]"),
        (None, "cannot be read"),
    ],
)
def test_a_text_table_that_cannot_be_used_names_the_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(TableError, match=message):
        read_text_table(tmp_path / "x.csv", ["id"])


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("a.png", "a.png"),
        (" x/a.png ", "a.png"),
        ("C:\\x\\a b.png", "a b.png"),
        ("e\u0301.png", "\u00e9.png"),
        ("", ""),
    ],
)
def test_the_name_of_a_listed_file_has_no_folders(cell, name):
    assert listed_name(cell) == name


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("fold", [0, 2.5], "fold"),
        ("fold", [0, np.nan], "fold"),
        ("xmax", [1.5, 20], "box|xmax"),  # flat
        ("ymax", [10, 2], "box|ymax"),
        ("score", [0.5, 1.5], "score"),
        ("xmin", [0, np.inf], "xmin"),
    ],
)
def test_each_broken_value_of_a_table_is_refused(column, values, message):
    check_table(DETECTIONS, "detections")
    with pytest.raises(TableError, match=message):
        check_table(DETECTIONS.assign(**{column: values}), "detections")


def test_findings_of_several_tables_are_in_alphabetical_order():
    named = pd.DataFrame(
        {"finding": pd.Categorical(["mass", "effusion", "mass"], categories=["unused", "mass", "effusion"])}
    )
    unnamed = pd.DataFrame({"image_id": ["i0"]})
    assert findings_of(named, None, unnamed) == ("effusion", "mass", "opacity")
    assert findings_of(unnamed.iloc[:0]) == findings_of() == ()


def test_a_map_is_the_bytes_of_a_file(tmp_path):
    table = pd.DataFrame({"image_id": ["a"], "model": "m", "fold": 0, "finding": "pneumothorax", "map": [b"png"]})
    write_table(table, "mask_maps", tmp_path / "maps.parquet")
    assert read_table("mask_maps", tmp_path / "maps.parquet")["map"].tolist() == [b"png"]
    for wrong in ("png", b"", None):
        with pytest.raises(TableError, match=r"column map: 1 cell.* are empty or not of type bytes; the first is in row 0"):
            check_table(table.assign(map=[wrong]), "mask_maps")
    with pytest.raises(TableError, match=r"missing column.* finding"):
        check_table(table.drop(columns="finding"), "mask_maps")
