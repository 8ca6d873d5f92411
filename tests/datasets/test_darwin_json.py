"""Darwin's annotation files: both versions give equal results, polygons are filled, errors name the file."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.datasets.darwin_json import fill_even_odd, read_darwin_json
from kitlib.errors import MaskError
from kitlib.xrays.header import MAX_SAMPLES

SQUARE, HOLE, OTHER = ([(2, 3), (12, 3), (12, 13), (2, 13)], [(4, 5), (7, 5), (7, 8), (4, 8)], [(20, 2), (26, 2), (26, 6)])


def points(path):
    return [{"x": float(x), "y": float(y)} for x, y in path]


def version_1(*annotations):
    image = {"width": 30, "height": 20, "filename": "0001.jpeg", "original_filename": "person1_virus_6.jpeg"}
    return {"dataset": "x", "image": image, "annotations": list(annotations)}


def version_2(*annotations):
    slot = {"slot_name": "0", "width": 30, "height": 20, "source_files": [{"file_name": "person1_virus_6.jpeg"}]}
    return {"version": "2.0", "item": {"name": "0001.jpeg", "slots": [slot]}, "annotations": list(annotations)}


def read(tmp_path, told):
    path = tmp_path / "1.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return read_darwin_json(path)


TAG = {"name": "Lateral", "tag": {}}
SIMPLE = [
    version_1({"name": "Lung", "polygon": {"path": points(SQUARE)}}, TAG),
    version_2({"name": "Lung", "polygon": {"paths": [points(SQUARE)]}}, TAG),
]
COMPLEX = [
    version_1({"name": "Lung", "complex_polygon": {"path": [points(SQUARE), points(HOLE)]}}),
    version_1({"name": "Lung", "polygon": {"path": points(SQUARE), "additional_paths": [points(HOLE)]}}),
    version_2({"name": "Lung", "polygon": {"paths": [points(SQUARE), points(HOLE)]}}),
]


@pytest.mark.parametrize("told", SIMPLE)
def test_names_size_tags_and_a_square(tmp_path, told):
    annotation = read(tmp_path, told)
    assert annotation.names == ("0001.jpeg", "person1_virus_6.jpeg") and (annotation.rows, annotation.columns) == (20, 30)
    assert annotation.tags == ("Lateral",) and annotation.has_polygon() and not annotation.has_polygon(("ignore",))
    expected = np.zeros((20, 30), bool)
    expected[3:13, 2:12] = True
    np.testing.assert_array_equal(annotation.mask(), expected)


@pytest.mark.parametrize("told", COMPLEX)
def test_a_path_within_another_is_a_hole(tmp_path, told):
    mask = read(tmp_path, told).mask()
    assert mask.sum() == 10 * 10 - 3 * 3 and not mask[5:8, 4:7].any()


def test_polygons_are_united_and_those_of_other_names_left_out(tmp_path):
    # Overlapping lungs make no hole, and a polygon of another name removes nothing from a lung.
    shapes = [("Lung", SQUARE), ("lung", [(8, 3), (16, 3), (16, 13), (8, 13)]), ("Ignore", [(0, 0), (30, 0), (30, 20)])]
    mask = read(tmp_path, version_1(*({"name": name, "polygon": {"path": points(path)}} for name, path in shapes))).mask()
    assert mask.sum() == 10 * 14 and mask[3:13, 2:16].all()
    assert not read(tmp_path, version_1(TAG)).has_polygon()


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("{", "as JSON"),
        ([], "version none"),
        ({"images": [], "annotations": []}, "'image'"),
        ({"version": "3.0", "file": {}, "annotations": []}, "version 3.0"),
        (version_1({"name": "Lung", "polygon": {"path": [{"x": 1}]}}), "'y'"),
        (json.dumps(version_1({"name": "Lung", "polygon": {"path": [{"x": 1, "y": float("nan")}]}})), "not finite"),
        (version_1() | {"image": {"width": 10**6, "height": 10**6, "filename": "a"}}, "1000000 x 1000000"),
        (version_1() | {"image": {"width": 0, "height": 5, "filename": "a"}}, "5 x 0"),
        (version_1() | {"image": {"width": -4, "height": -5, "filename": "a"}}, "-5 x -4"),
        (version_1() | {"image": {"width": MAX_SAMPLES + 1, "height": 1, "filename": "a"}}, f"1 x {MAX_SAMPLES + 1}"),
    ],
)
def test_what_is_no_annotation_names_its_file(tmp_path, told, problem):
    with pytest.raises(MaskError, match=rf"1\.json.*{problem}"):
        read(tmp_path, told)


def test_an_image_may_have_one_row_and_as_many_pixels_as_an_x_ray(tmp_path):
    annotation = read(tmp_path, version_1() | {"image": {"width": MAX_SAMPLES, "height": 1, "filename": "a"}})
    assert (annotation.rows, annotation.columns) == (1, MAX_SAMPLES)


def test_a_missing_file_names_itself(tmp_path):
    with pytest.raises(MaskError, match=r"gone\.json"):
        read_darwin_json(tmp_path / "gone.json")


@given(st.integers(0, 2**32 - 1), st.floats(5, 90), st.integers(3, 200))
def test_the_area_is_that_of_the_polygon(seed, radius, corners):
    """Against the shoelace formula: a pixel's centre decides, so there is no bias; cv2.fillPoly's is +perimeter / 2."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    outline = rng.uniform(95, 105, 2) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x, y = outline.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    filled = fill_even_odd([outline], 200, 200)
    perimeter = np.linalg.norm(outline - np.roll(outline, -1, axis=0), axis=1).sum()
    # For a convex shape each row's width is off by less than a pixel, and the number of rows by one.
    assert abs(filled.sum() - area) <= perimeter / 2 + 1
    if corners > 20 and radius > 20:
        assert abs(filled.sum() / area - 1) < 0.01
    # The same pixels by definition, with one ray per pixel.
    start, end = outline, np.roll(outline, -1, axis=0)
    row, column = rng.integers(0, 200, (2, 300))
    middle_x, middle_y = column[:, None] + 0.5, row[:, None] + 0.5
    crosses = (start[:, 1] <= middle_y) != (end[:, 1] <= middle_y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = start[:, 0] + (middle_y - start[:, 1]) * (end - start)[:, 0] / (end - start)[:, 1]
    inside = (crosses & (at <= middle_x)).sum(axis=1) % 2 == 1
    np.testing.assert_array_equal(filled[row, column], inside)


def test_polygons_beyond_the_image_are_cut_at_its_edge():
    outline = np.array([(-50.0, -50.0), (15.0, -50.0), (15.0, 90.0), (-50.0, 90.0)])
    filled = fill_even_odd([outline], 20, 30)
    assert filled[:, :15].all() and not filled[:, 15:].any()
    assert not fill_even_odd([outline - 1000], 20, 30).any()
    assert not fill_even_odd([np.zeros((0, 2)), np.ones((1, 2)), np.ones((2, 2))], 20, 30).any()
