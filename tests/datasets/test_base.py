"""What all readers share: the comparison with published counts, headers, and boxes of resized or other images."""

import numpy as np
import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.datasets.base import (
    LEAST_EXPECTED,
    MOST_UNUSABLE,
    Dataset,
    add_headers,
    cut_at_edges,
    make_boxes,
    original_sizes,
    read_headers,
    scale_boxes,
)
from kitlib.datasets.data_folder import DataFolder
from kitlib.errors import DatasetError
from kitlib.xrays.writing import write_xray


def tables(count: int, folder="x") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `images` of as many patients, 10 x 20 pixels, and `labels`: all have the class A and none has B."""
    ids = [f"i{number:03d}" for number in range(count)]
    images = pd.DataFrame(
        {"image_id": ids, "study_id": ids, "patient_id": ids, "path": [f"{folder}/{name}.png" for name in ids]}
    )
    images = images.assign(rows=10, columns=20, source="s", view="")
    return images, pd.DataFrame({"id": ids, "A": 1.0, "B": 0.0})


# 100 of 200 published images, so that half of the published ones of B are expected.
@pytest.mark.parametrize(
    ("published", "is_told"),
    [
        ({"images": 200, "B": 2 * LEAST_EXPECTED}, True),
        ({"images": 200, "B": 2 * LEAST_EXPECTED - 1}, False),
        ({"images": 200, "A": 200}, False),
        ({"B": 1000}, False),
        ({}, False),
    ],
)
def test_a_class_without_images_is_told_if_enough_were_expected(tmp_path, published, is_told):
    images, labels = tables(100)
    for b, told in ((0.0, is_told), (np.nan, is_told), ([*[0.0] * 99, 1.0], False)):
        data = Dataset.from_tables(DataFolder(tmp_path), images, labels.assign(B=b), published)
        assert data.faults["row"].tolist() == ["B"] * told


@pytest.mark.parametrize(("unused", "is_error"), [(11, False), (12, True)])  # 11 of 111 files are 9.9 %, 12 of 112 10.7 %
def test_a_class_without_images_is_an_error_if_many_files_are_unused(tmp_path, unused, is_error):
    images, labels = tables(100, tmp_path / "main")
    names = [f"main/{name}.png" for name in images.image_id] + [f"main/else/{number}.png" for number in range(unused)]
    # Masks, test images and the files of other inputs do not count.
    names += [f"{place}/{number}.png" for place in ("main/masks", "main/test", "beside") for number in range(50)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = DataFolder(tmp_path / "main", [tmp_path / "beside"])
    source.set_aside(path for path in source.paths if path.parent.name == "test")
    published = {"images": 200, "B": 100}
    if is_error:
        with pytest.raises(
            DatasetError, match=r"another layout .*Class 'B': none of the 100 images.*11% of the image files"
        ):
            Dataset.from_tables(source, images, labels, published)
    else:
        masks = pd.DataFrame({"path": [str(tmp_path / "main" / "masks" / "0.png")]})
        faults = Dataset.from_tables(source, images, labels, published, masks=masks).faults
        # 11 files are in no table, and 50 of test images and 49 other masks are not in these tables.
        assert [problem.partition(" are not read")[0] for problem in faults.problem] == [
            "and 109 other image files",
            "none of the 100 images has this class, which 100 of 200 published images have",
        ]


@pytest.mark.parametrize(("published", "is_error"), [(2 * LEAST_EXPECTED, True), (2 * LEAST_EXPECTED - 1, False)])
def test_one_patient_of_all_images_is_an_error_if_many_were_expected(tmp_path, published, is_error):
    images, labels = tables(100)
    counts = {"images": 200, "patients": published}
    two = images.assign(patient_id=["p", *["q"] * 99])
    assert Dataset.from_tables(DataFolder(tmp_path), two, labels, counts).faults.empty
    one = images.assign(patient_id="p")
    if is_error:
        with pytest.raises(DatasetError, match=f"All 100 images have the patient id 'p', but {published} patients"):
            Dataset.from_tables(DataFolder(tmp_path), one, labels, counts)
    else:
        assert Dataset.from_tables(DataFolder(tmp_path), one, labels, counts).faults.empty


def test_a_convention_of_masks_is_one_of_the_kits(tmp_path):
    images, labels = tables(2)
    assert Dataset.from_tables(DataFolder(tmp_path), images.assign(convention=["", "with_heart"]), labels).faults.empty
    with pytest.raises(ValueError, match=r"unknown mask conventions \['x'\]; valid: lung_fields, with_heart"):
        Dataset.from_tables(DataFolder(tmp_path), images.assign(convention=["", "x"]), labels)


def test_without_images_the_error_shows_the_first_faults(tmp_path):
    source = DataFolder(tmp_path)
    for number in range(5):
        source.faults.add("t.csv", f"r{number}", "left out")
    with pytest.raises(DatasetError, match=r"no image can be used; there are 5 faults, .*r0.*r1.*r2\)$"):
        Dataset.from_tables(source, *(table[:0] for table in tables(1)))


@pytest.mark.parametrize(
    ("boxed", "unusable", "is_error"),
    [
        (LEAST_EXPECTED - 1, LEAST_EXPECTED - 1, False),
        (LEAST_EXPECTED, LEAST_EXPECTED, True),
        (round(LEAST_EXPECTED / MOST_UNUSABLE), LEAST_EXPECTED, True),
        (round(LEAST_EXPECTED / MOST_UNUSABLE) + 1, LEAST_EXPECTED, False),
    ],
)
def test_many_boxes_that_do_not_fit_are_of_images_of_another_size(tmp_path, boxed, unusable, is_error):
    """Each image has two boxes, one of which lies outside the image if it is unusable."""
    images = tables(boxed + 1)[0]
    ids = images.image_id[:boxed]
    boxes = pd.DataFrame({"image_id": ids, "xmin": 1.0, "ymin": 1.0, "xmax": 5.0, "ymax": 5.0})
    outside, beyond = boxes[:unusable].assign(ymin=80.0, ymax=90.0), boxes[unusable:].assign(xmax=21.0)
    boxes, source = pd.concat([boxes, outside, beyond], ignore_index=True), DataFolder(tmp_path)
    if is_error:
        with pytest.raises(DatasetError, match=f"{unusable} of {boxed} images have an unusable box in t.csv"):
            cut_at_edges(images, boxes, source, "t.csv")
        return
    kept, cut = cut_at_edges(images, boxes, source, "t.csv", "_image")
    assert kept.image_id.tolist() == images.image_id[unusable:].tolist()  # the last one has no box
    assert set(cut.image_id) == set(ids[unusable:]) and len(cut) == 2 * (boxed - unusable) and (cut.xmax <= 20).all()
    told = [row for _, row, problem in source.faults.rows if "left out" in problem]
    assert told == [f"{name}_image" for name in ids[:unusable]]
    assert len(source.faults.rows) == boxed  # the boxes of the others reach a pixel beyond the image


def test_a_box_has_four_finite_numbers_and_an_area():
    valid = ["1 2 3 4", "-1.5 0 0.1 1e2"]
    invalid = ["1 2 0 4", "1 2 3 0", "1 2 -3 4", "1 2 inf 4", "-inf 2 3 4", " 2 3 4", "1 2 3 x", "1 nan 3 4"]
    rows = [cells.split(" ") for cells in (*valid, *invalid)]
    boxes, is_valid = make_boxes(pd.Series(range(10)), pd.DataFrame(rows, columns=list("abcd")))
    assert is_valid.tolist() == [True] * 2 + [False] * 8
    assert boxes[is_valid].to_numpy().tolist() == [[0, 1, 2, 4, 6], [1, -1.5, 0, pytest.approx(-1.4), 100]]


def test_headers_fill_in_what_a_table_leaves_blank_and_unusable_files_are_left_out(tmp_path):
    pixels = np.zeros((6, 8), np.uint8)
    for name, extra in {"a": {}, "b": {}, "empty": {"Rows": None}}.items():
        extra = {"ViewPosition": "AP"} | extra
        write_xray(
            tmp_path / f"{name}.dcm", pixels, transfer_syntax=ExplicitVRLittleEndian, patient_id="header", extra=extra
        )
    (tmp_path / "damaged.dcm").write_bytes(b"")
    ids = ["a", "b", "empty", "damaged", "missing"]
    rows = pd.DataFrame(
        {"image_id": ids, "patient_id": ["", "table", "", "", ""], "path": [f"{tmp_path}/{name}.dcm" for name in ids]}
    )
    source = DataFolder(tmp_path)
    images = add_headers(rows.assign(source="s", view=["", "PA", "", "", ""]), source, progress=False)
    columns = ["image_id", "study_id", "patient_id", "view", "rows", "columns"]
    assert images[columns].to_numpy().tolist() == [["a", "a", "header", "AP", 6, 8], ["b", "b", "table", "PA", 6, 8]]
    assert [row for _, row, _ in source.faults.rows] == ids[2:]
    empty, damaged = read_headers([f"{tmp_path}/{name}.dcm" for name in ("empty", "damaged")], progress=False)
    assert empty.problem == "the header states no image size" and (damaged.rows, damaged.columns) == (0, 0)
    with pytest.raises(DatasetError, match=r"no image can be used; there are 3 faults, .*empty.*damaged.*missing"):
        add_headers(rows[:0], source, progress=False)


def test_sizes_of_copies_are_those_of_the_table_and_dicom_files_are_originals(tmp_path):
    lines = ["image_id,dim0,dim1", " b ,30,40", "b,1,1", "c,0,40", "d,x,40", "e,30,", "a,99,99", "f,1,1", "other,5,5"]
    (tmp_path / "sizes.csv").write_text("\n".join(lines))
    suffixes = {"a": "dcm", "b": "png", "c": "png", "d": "JPG", "e": "png", "f": "jpeg", "g": "png"}
    images = pd.DataFrame({"image_id": list(suffixes), "path": [f"{name}.{suffix}" for name, suffix in suffixes.items()]})
    source = DataFolder(tmp_path)
    sizes = original_sizes(images.assign(rows=10, columns=20), source, "none.csv", "sizes.csv")
    # Of several rows, the first valid one counts.
    assert sizes.to_numpy().tolist() == [["a", 10, 20], ["b", 30, 40], ["f", 1, 1]]
    ((file, row, problem),) = source.faults.rows
    assert (file, row) == ("sizes.csv", "c") and "and 3 other images" in problem  # c, d, e, g
    (tmp_path / "sizes.csv").unlink()
    dicom = images[:1].assign(rows=10, columns=20)
    assert original_sizes(dicom, DataFolder(tmp_path), "sizes.csv").to_numpy().tolist() == [["a", 10, 20]]


def test_boxes_are_scaled_with_their_images_and_resized_images_with_boxes_are_told(tmp_path):
    images = tables(4)[0]
    originals = images[["image_id"]].assign(rows=[10, 40, 10, 40], columns=[20, 20, 60, 60])
    boxes = pd.DataFrame({"image_id": ["i002", "i001", "i000", "i001"], "xmin": 3.0, "ymin": 4.0, "xmax": 9.0, "ymax": 8.0})
    source = DataFolder(tmp_path)
    scaled = scale_boxes(boxes.assign(reader="r"), images, originals, source, "t.csv")
    assert scaled.drop(columns="reader").to_numpy().tolist() == [
        ["i002", 1, 4, 3, 8],
        ["i001", 3, 1, 9, 2],
        ["i000", 3, 4, 9, 8],
        ["i001", 3, 1, 9, 2],
    ]
    problem = "and 1 other images with boxes are resized, such as the first from 20 x 40 to 20 x 10 pixels; "
    assert source.faults.rows == [("t.csv", "i001", f"{problem}the boxes are scaled")]  # i003 has no box
    scale_boxes(boxes[2:3], images, originals, source, "t.csv")
    assert len(source.faults.rows) == 1
