"""COCO files contain what the tables contain and restore them; errors name the file and the invalid entry."""

import ast
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.errors import DatasetError
from kitlib.runs.coco import annotated_images, read_coco, read_coco_boxes, write_coco
from kitlib.tables import check_table
from tests import REAL_DATA

SIIM = REAL_DATA / "siim_csv"
IMAGES = pd.DataFrame(
    {
        "image_id": ["b", "a", "c"],
        "study_id": ["s1", "s1", "s2"],
        "patient_id": "p",
        "path": ["x/b.dcm", "x/a.dcm", "x/c.dcm"],
        "rows": [3000, 2600, 100],
        "columns": [2500, 2000, 90],
        "source": "siim",
        "view": "AP",
        "false_none": [False, True, False],
        "exposure": [0.1, 0.25, 1e-7],
    }
)
BOXES = pd.DataFrame(
    {"image_id": ["a", "b", "a"], "xmin": [789.28836, 0, 1], "ymin": [582.43035, 0, 2], "xmax": [1815.94498, 5, 4.5]}
).assign(ymax=[2499.73327, 7.25, 6])
FOLDS = pd.DataFrame({"id": ["b", "c"], "fold": [1, 0]})


def same(expected: pd.DataFrame, actual: pd.DataFrame, name: str) -> None:
    pd.testing.assert_frame_equal(expected, check_table(actual, name), check_like=True, check_exact=True)


def test_the_file_has_the_entries_of_the_coco_format(tmp_path):
    write_coco(tmp_path / "annotations.json", IMAGES, BOXES, FOLDS)
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "opacity", "supercategory": "finding"}]
    image_entries = [(image["id"], image["file_name"], image["width"], image["height"]) for image in content["images"]]
    assert image_entries == [(1, "b.png", 2500, 3000), (2, "a.png", 2000, 2600), (3, "c.png", 90, 100)]
    # 1815.94498 - 789.28836 and 2499.73327 - 582.43035, computed by hand.
    first = content["annotations"][0]
    assert first["image_id"] == 2 and first["bbox"] == [789.28836, 582.43035, 1026.65662, 1917.30292]
    assert first["area"] == pytest.approx(1026.65662 * 1917.30292) and first["iscrowd"] == 0
    assert [annotation["id"] for annotation in content["annotations"]] == [1, 2, 3]


@pytest.mark.parametrize("findings", [None, ["Mass", "Effusion", "Mass"]])
@pytest.mark.parametrize("folds", [None, FOLDS])
def test_tables_come_back(tmp_path, findings, folds):
    boxes = BOXES if findings is None else BOXES.assign(finding=findings)
    write_coco(tmp_path / "annotations.json", IMAGES, boxes, folds)
    tables = read_coco(tmp_path / "annotations.json")
    same(tables["images"], IMAGES, "images")
    same(tables["boxes"], boxes, "boxes")
    assert ("folds" in tables) == (folds is not None)
    if folds is not None:
        same(tables["folds"], FOLDS, "folds")


def test_no_box_at_all_comes_back(tmp_path):
    write_coco(tmp_path / "annotations.json", IMAGES, BOXES.head(0))
    tables = read_coco(tmp_path / "annotations.json")
    assert len(tables["images"]) == 3 and len(tables["boxes"]) == 0


def corners(coordinate) -> st.SearchStrategy[list[float]]:
    """xmin, ymin, xmax, ymax."""
    edges = st.tuples(coordinate, coordinate).map(sorted).filter(lambda pair: pair[1] - pair[0] >= 1)
    return st.tuples(edges, edges).map(lambda pairs: [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)])


@settings(max_examples=15, deadline=None)
@given(st.lists(corners(st.floats(0, 2000)), min_size=1, max_size=8))
def test_any_coordinate_comes_back_bit_for_bit(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("coco") / "annotations.json"
    boxes = pd.DataFrame(drawn, columns=["xmin", "ymin", "xmax", "ymax"]).assign(image_id="a")
    write_coco(path, IMAGES, boxes)
    same(read_coco(path)["boxes"], boxes, "boxes")


@pytest.mark.real_data
def test_the_real_competitions_boxes_come_back_bit_for_bit(tmp_path):
    """The corners are sums of x and width in floats: nine decimals of a pixel would not preserve their last digits."""
    if not SIIM.is_dir():
        pytest.skip(f"{SIIM} is missing")
    sizes = pd.read_csv(SIIM / "train_images_ext.csv", dtype={"image_id": str})
    images = sizes.assign(rows=sizes.height, columns=sizes.width, path="", source="siim", view="")[list(IMAGES)[:8]]
    cells = pd.read_csv(SIIM / "train_image_level.csv").dropna(subset=["boxes"])
    boxes = pd.DataFrame(
        [
            (name.removesuffix("_image"), box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
            for name, cell in zip(cells.id, cells.boxes, strict=True)
            for box in ast.literal_eval(cell)
        ],
        columns=["image_id", "xmin", "ymin", "xmax", "ymax"],
    )
    write_coco(tmp_path / "a.json", images, boxes)
    tables = read_coco(tmp_path / "a.json")
    # The one box that begins left of its image is cut.
    same(tables["boxes"], boxes.assign(xmin=boxes.xmin.clip(lower=0)), "boxes")
    assert (boxes.xmin < 0).sum() == 1
    assert (len(tables["images"]), len(boxes)) == (6334, 7853)


def test_a_file_of_another_program(tmp_path, caplog):
    """The file has only the keys that the format requires."""
    content = {
        "images": [{"id": 7, "file_name": "set/00000001_000.jpg", "width": 1024, "height": 1000}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30.5, 40]}],
        "categories": [{"id": 3, "name": "Nodule"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    tables = read_coco(tmp_path / "a.json")
    image, box = tables["images"].iloc[0], tables["boxes"].iloc[0]
    assert (image.image_id, image.patient_id, image["rows"], image["columns"]) == (
        "00000001_000",
        "00000001_000",
        1000,
        1024,
    )
    assert image.path == "set/00000001_000.jpg" and "folds" not in tables
    assert box.tolist() == ["00000001_000", "Nodule", 10, 20, 40.5, 60]
    assert not caplog.records  # the box lies inside its image


def test_boxes_of_the_same_images_in_the_same_pixels(tmp_path):
    path = tmp_path / "a.json"
    write_coco(path, IMAGES.iloc[::-1], BOXES)
    same(read_coco_boxes(path, IMAGES), BOXES, "boxes")
    with pytest.raises(DatasetError, match="1 images in the file are not in the `images` table; the first is 'c'"):
        read_coco_boxes(path, IMAGES.head(2))
    for rows, columns, size in ((3000, 2500, "2500 x 3000"), (3000, 2000, "2000 x 3000"), (2600, 2500, "2500 x 2600")):
        resized = IMAGES.assign(rows=[3000, rows, 100], columns=[2500, columns, 90])
        with pytest.raises(DatasetError, match=f"The first is 'a': 2000 x 2600 pixels in the file, {size} in the table"):
            read_coco_boxes(path, resized)
    write_coco(path, IMAGES.head(2), BOXES)
    with pytest.raises(DatasetError, match="1 images are not in the file; the first is 'c'"):
        read_coco_boxes(path, IMAGES)


def test_images_that_are_not_fully_annotated_are_excluded():
    pd.testing.assert_frame_equal(annotated_images(IMAGES, BOXES), IMAGES.iloc[[0, 2]].reset_index(drop=True))
    assert annotated_images(IMAGES.assign(source="nih", false_none=False), BOXES).image_id.tolist() == ["b", "a"]
    assert len(annotated_images(IMAGES.drop(columns="false_none"), BOXES)) == 3


IMAGE = {"id": 1, "file_name": "a.png", "width": 10, "height": 10}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}


@pytest.mark.parametrize(
    ("image", "box", "message"),
    [
        ({"width": 0}, {}, "images, id 1.*width 0 are not positive whole"),
        ({"height": "10"}, {}, "images, id 1.*'10'"),
        ({}, {"bbox": [1, 1, -2, 2]}, r"annotations, id 1.*\[1, 1, -2, 2\]"),
        ({}, {"bbox": [1, 1, 2, 0]}, r"annotations, id 1: bbox \[1, 1, 2, 0\] is not x, y"),
        ({}, {"bbox": [1, 1, float("nan"), 2]}, "annotations, id 1.*nan"),
        ({}, {"bbox": [1, 1, 10**400, 2]}, "annotations, id 1"),
        ({}, {"bbox": [1, 1, 2]}, "annotations, id 1"),
        ({}, {"bbox": [1, 1, "2", 2]}, "annotations, id 1"),
        ({}, {"bbox": [-5, 1, 300, 2]}, r"annotations, id 1: a box reaches beyond .* \(xmin -5, ymin 1, .* 1 of 1 boxes"),
        ({}, {"bbox": [11, 1, 2, 2]}, "annotations, id 1: a box lies outside the image"),
        ({}, {"bbox": [9.5, 1, 1, 2]}, "annotations, id 1: a box is thinner than 1 pixel"),
        ({}, {"image_id": 2}, "image_id is 2, but the file lists no image"),
        ({}, {"category_id": [1]}, r"category_id is \[1\], but the file lists no category"),
    ],
)
def test_an_error_names_the_invalid_entry(tmp_path, image, box, message):
    content = {"images": [IMAGE | image], "annotations": [BOX | box], "categories": [{"id": 1, "name": "opacity"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=f"a.json, {message}" if "id 1" in message else message):
        read_coco(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON.*line 1"),
        ("[]", "expected an object"),
        ("{}", "categories: the list is missing"),
        ('{"categories": [], "images": [{"id": 1}], "annotations": []}', "images, entry 0: .* 'width', 'height'"),
        ('{"categories": [], "images": [], "annotations": []}', "images: the list is empty"),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "categories, entry 1: an earlier entry also has the id 1",
        ),
        ('{"categories": [{"id": [1], "name": "a"}]}', r"categories, entry 0: the id \[1\] is neither an integer nor text"),
        ('{"categories": [3]}', "categories, entry 0: lacks the keys"),
    ],
)
def test_an_invalid_coco_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_coco(tmp_path / "a.json")
    with pytest.raises(DatasetError, match=r"b\.json is missing"):
        read_coco(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("images", "boxes", "folds", "message"),
    [
        (IMAGES.assign(rows=[3000, 0, 100]), BOXES, None, "1 of 3 images have no size .* is 'a'.*notebook 10"),
        (IMAGES.head(1), BOXES, None, "2 boxes have an image_id that is not in `images`, first 'a'"),
        (
            IMAGES,
            BOXES.assign(finding=["Mass", " Mass", "Mass"]),
            None,
            "finding ' Mass' in `boxes` begins or ends with a space",
        ),
        (IMAGES.assign(width=1), BOXES, None, "column names.*'width'.*rename"),
        (IMAGES.assign(mask=[np.zeros(1), None, None]), BOXES, None, "drop the column"),
        (IMAGES.assign(exposure=np.inf), BOXES, None, "drop the column"),
        (IMAGES, BOXES, FOLDS.assign(id=["b", "z"]), "1 ids in `folds` are not in `images`, first 'z'"),
    ],
)
def test_tables_that_no_file_can_hold_are_refused(tmp_path, images, boxes, folds, message):
    with pytest.raises(DatasetError, match=message):
        write_coco(tmp_path / "a.json", images, boxes, folds)
    assert not (tmp_path / "a.json").exists()


def test_the_formats_own_reader_agrees(tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    write_coco(tmp_path / "a.json", IMAGES, BOXES.assign(finding=["Mass", "Effusion", "Mass"]))
    read = COCO(tmp_path / "a.json")
    assert len(read.getImgIds()) == 3 and len(read.getAnnIds(catIds=read.getCatIds(["Mass"]))) == 2


def test_boxes_beyond_the_edge_are_cut_and_counted(tmp_path, caplog):
    """Image c has 90 columns and 100 rows. Its file may be of a program on Windows: with a BOM, a drive and backslashes."""
    image = {"id": 1, "file_name": "C:\\xrays\\c.png", "width": 90, "height": 100}
    boxes = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box}
        for number, box in ((1, [2, 2, 5, 5]), (2, [-5, 90, 9, 13]))
    ]
    content = {"images": [image], "annotations": boxes, "categories": [{"id": 1, "name": "opacity"}]}
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8-sig", newline="\r\n")
    read = read_coco(tmp_path / "a.json")["boxes"]
    assert read.to_numpy().tolist() == [["c", "opacity", 2, 2, 7, 7], ["c", "opacity", 0, 90, 4, 100]]
    assert "1 of 2 boxes were cut at their image's edge" in caplog.text and "at most 5.00 pixels were cut off" in caplog.text
