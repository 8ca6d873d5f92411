"""YOLO's label files are readable by ultralytics and restore the boxes; errors name the file and line."""

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kitlib.errors import DatasetError
from kitlib.runs.yolo_labels import read_yolo, write_yolo
from kitlib.tables import check_table
from tests.runs.test_coco import BOXES, FOLDS, IMAGES


def test_a_line_has_fractions_of_the_image(tmp_path):
    boxes = pd.DataFrame([["c", 9, 10, 45, 60]], columns=["image_id", "xmin", "ymin", "xmax", "ymax"])
    folder = tmp_path / "new" / "folder"
    write_yolo(folder, IMAGES, boxes)
    # Image c has 90 columns and 100 rows: the centre is (27, 35), the size 36 x 50.
    assert (folder / "labels" / "c.txt").read_text() == "0 0.3 0.35 0.4 0.5\n"
    assert [(folder / "labels" / f"{name}.txt").read_text() for name in "ab"] == ["", ""]
    assert (folder / "classes.txt").read_text() == "opacity\n"
    assert yaml.safe_load((folder / "data.yaml").read_text()) == {
        "train": "images",
        "val": "images",
        "names": {0: "opacity"},
    }


def test_each_fold_is_used_once_for_validation(tmp_path):
    write_yolo(tmp_path, IMAGES, BOXES, FOLDS)
    assert yaml.safe_load((tmp_path / "fold1.yaml").read_text())["val"] == "fold1_val.txt"
    lists = {
        name: (tmp_path / f"{name}.txt").read_text() for name in ("fold0_train", "fold0_val", "fold1_train", "fold1_val")
    }
    b, c = "./images/b.png\n", "./images/c.png\n"
    assert lists == {"fold0_train": b, "fold0_val": c, "fold1_train": c, "fold1_val": b}


@pytest.mark.parametrize("findings", [None, ["Mass", "Effusion", "Mass"]])
def test_boxes_come_back_in_the_order_of_the_images(tmp_path, findings):
    boxes = BOXES if findings is None else BOXES.assign(finding=findings)
    write_yolo(tmp_path, IMAGES, boxes)
    expected = check_table(boxes.iloc[[1, 0, 2]], "boxes")
    pd.testing.assert_frame_equal(read_yolo(tmp_path, IMAGES), expected, check_exact=True)


def inside(side: int) -> st.SearchStrategy[list[float]]:
    """Draw the two edges of a box on an axis of `side` pixels."""
    edge = st.one_of(st.just(0.0), st.floats(1e-3, side), st.just(float(side)))
    return st.tuples(edge, edge).map(sorted).filter(lambda edges: edges[1] - edges[0] >= 1)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(3, 100_000), st.integers(3, 100_000))
def test_any_box_comes_back_bit_for_bit(tmp_path_factory, data, rows, columns):
    images = IMAGES.head(1).assign(rows=rows, columns=columns)
    x, y = data.draw(inside(columns)), data.draw(inside(rows))
    boxes = pd.DataFrame([["b", x[0], y[0], x[1], y[1]]], columns=["image_id", "xmin", "ymin", "xmax", "ymax"])
    folder = tmp_path_factory.mktemp("yolo")
    write_yolo(folder, images, boxes)
    pd.testing.assert_frame_equal(read_yolo(folder, images), check_table(boxes, "boxes"), check_exact=True)


def test_boxes_beyond_the_edge_by_rounding_are_clipped(tmp_path):
    write_yolo(tmp_path, IMAGES, BOXES.head(0))
    (tmp_path / "labels" / "c.txt").write_text("0 0.833333 0.5 0.333335 1.000000\n\n")
    (tmp_path / "classes.txt").write_text("\nopacity\n\n")  # people add blank lines
    box = read_yolo(tmp_path, IMAGES).iloc[0]
    assert box.finding == "opacity"
    assert box.xmax == 90 and box.ymin == 0 and box.ymax == 100
    assert box.xmin == pytest.approx(90 * (0.833333 - 0.333335 / 2), abs=1e-9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "is not `class cx cy width height`"),
        ("opacity 0.5 0.5 0.1 0.1", "is not `class"),
        ("0 0.5 0.5 0.1 nan", "is not `class"),
        ("1 0.5 0.5 0.1 0.1", r"class 1 does not exist; classes\.txt lists 1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0 450 500 10 10", "a box lies outside the image"),
        ("0 0.5 0.5 0 0.1", "width and height above 0"),
        ("0 0.5 0.5 0.1 0.0001", "thinner than 1 pixel"),
        ("0 0.5 0.5 1e999999 0.1", "in fractions of the image"),
        ("0 0.1 0.5 30 0.1", r"by more than 0\.1 of its side .*\. 1 of 4 boxes"),
    ],
)
def test_an_error_names_the_invalid_line(tmp_path, line, message):
    write_yolo(tmp_path, IMAGES, BOXES)
    with open(tmp_path / "labels" / "b.txt", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DatasetError, match=rf"b\.txt, line 2: .*{message}"):
        read_yolo(tmp_path, IMAGES)


def test_an_error_names_a_missing_or_unmatched_file(tmp_path):
    write_yolo(tmp_path, IMAGES, BOXES)
    with pytest.raises(DatasetError, match=r"1 files belong to none of the images; the first is .*c\.txt"):
        read_yolo(tmp_path, IMAGES.head(2))
    (tmp_path / "labels" / "a.txt").unlink()
    with pytest.raises(DatasetError, match=r"lacks 1 of 3 files; the first is a\.txt.*empty file"):
        read_yolo(tmp_path, IMAGES)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"classes\.txt is missing"):
        read_yolo(tmp_path, IMAGES)


def test_labels_are_not_mixed_and_boxes_stay_inside(tmp_path):
    with pytest.raises(DatasetError, match="image b has a box that reaches beyond"):
        write_yolo(tmp_path, IMAGES, BOXES.assign(xmin=[1, -0.1, 1]))
    with pytest.raises(DatasetError, match="have no size in the columns"):
        write_yolo(tmp_path, IMAGES.assign(rows=0), BOXES)
    with pytest.raises(DatasetError, match="is not a valid file name"):
        write_yolo(tmp_path, IMAGES.replace("c", "x/c"), BOXES)
    assert not (tmp_path / "labels").exists()
    write_yolo(tmp_path, IMAGES, BOXES)
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_yolo(tmp_path, IMAGES, BOXES)


def test_ultralytics_reads_them(tmp_path):
    """Its reader, which rejects labels that are not normalised, finds the same sizes and no damaged or missing file."""
    from ultralytics.data.utils import verify_image_label

    write_yolo(tmp_path, IMAGES, BOXES.assign(finding=["Mass", "Effusion", "Mass"]))
    (tmp_path / "images").mkdir()
    for image in IMAGES.itertuples():
        Image.fromarray(np.zeros((image.rows, image.columns), np.uint8)).save(tmp_path / "images" / f"{image.image_id}.png")
        pair = (str(tmp_path / "images" / f"{image.image_id}.png"), str(tmp_path / "labels" / f"{image.image_id}.txt"))
        _, labels, _, _, _, missing, _, _, damaged, _ = verify_image_label((*pair, "", False, 2, 0, 0, False))
        boxes = BOXES[BOXES.image_id == image.image_id]
        assert len(labels) == len(boxes) and (missing, damaged) == (0, 0)
        widths = labels[:, 3] * image.columns if len(boxes) else []
        np.testing.assert_allclose(sorted(widths), sorted(boxes.xmax - boxes.xmin), rtol=1e-6)
