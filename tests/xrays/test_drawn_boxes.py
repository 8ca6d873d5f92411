"""Boxes in pictures, and the colours and the places of their labels."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.xrays.drawn_boxes import COLOURS, draw_boxes, finding_colours, place_labels

corner = st.integers(0, 200)
IMAGE = np.full((400, 800), 100, np.uint8)  # lines are two pixels wide, with a shadow of one more on either side
BOX = {"xmin": 100, "ymin": 200, "xmax": 300, "ymax": 350}
ORANGE, FIRST, SECOND = (255, 165, 0), (230, 159, 0), (204, 0, 255)  # the latter of several findings: #E69F00 and #CC00FF


def shows(picture, colour):
    return (picture == colour).all(axis=2)


@given(st.lists(st.tuples(corner, corner, st.floats(5, 60)), max_size=8))
def test_labels_are_inside_the_picture_and_cover_no_other(boxes):
    """Eight labels fit into 400 rows below any box, so none has to cover another one."""
    corners = np.array([(x, y, x + 20, y + 20) for x, y, _ in boxes]).reshape(-1, 4)
    widths = [width for *_, width in boxes]
    places = place_labels(corners, widths, 10, 400, 220)
    assert places.shape == (len(boxes), 2)
    for number, ((x, y), width) in enumerate(zip(places, widths, strict=True)):
        assert 0 <= x <= 220 - width + 1e-9 and 10 <= y <= 400
        for (other_x, other_y), other_width in zip(places[:number], widths, strict=False):
            assert abs(y - other_y) >= 10 or x >= other_x + other_width or other_x >= x + width


def test_a_label_is_above_its_box_or_inside_at_the_top_edge():
    places = place_labels(np.array([(50, 100, 80, 150), (50, 5, 80, 50)]), [20, 20], 9, 200, 200)
    assert places.tolist() == [[50, 97], [50, 5 + 9.9]]


@pytest.mark.parametrize(
    ("xmin", "width", "x"),
    [(0, 20, 0), (-7, 20, 0), (180, 20, 180), (185, 20, 180), (50, 200, 0), (50, 230, 0)],
    ids=["at the left", "beyond the left", "at the right", "beyond the right", "as wide as all", "wider than all"],
)
def test_a_label_begins_with_its_box_unless_it_would_leave_the_picture(xmin, width, x):
    for ymin, y in ((100, 97), (0, 9.9), (-5, 9.9)):
        assert place_labels(np.array([(xmin, ymin, xmin + 30, 150)]), [width], 9, 200, 200).tolist() == [[x, y]]


def test_a_label_without_a_free_line_stays_at_its_box():
    boxes = np.array([(10, 100, 50, 150)] * 3)
    # Letters of 40 pixels in 130 rows: the line at 100 - 40 / 3 is the only one above the lower edge, but for one below it.
    assert place_labels(boxes, [30] * 3, 40, 130, 200)[:, 1].tolist() == pytest.approx([100 - 40 / 3] * 3)
    assert place_labels(boxes, [30] * 3, 40, 140, 200)[:, 1].tolist() == pytest.approx(
        [100 - 40 / 3, 148 - 40 / 3, 100 - 40 / 3]
    )


def test_colours_follow_the_alphabet_and_repeat_after_the_last():
    names = [f"finding {number:02d}" for number in range(len(COLOURS) + 1)]
    colours = finding_colours(reversed(names))
    assert [colours[name] for name in names] == [*COLOURS, COLOURS[0]] and len(set(COLOURS)) == len(COLOURS) == 14


def test_a_single_finding_needs_no_colour():
    assert finding_colours([]) == finding_colours(["mass", "mass"]) == {}


def test_boxes_are_drawn_where_they_are_from_a_score_on():
    boxes = pd.DataFrame([BOX | {"score": 0.9}, {"xmin": 500, "ymin": 200, "xmax": 600, "ymax": 300, "score": 0.1}])
    picture = draw_boxes(IMAGE, boxes, min_score=0.9)
    assert picture.shape == (400, 800, 3) and (IMAGE == 100).all()
    orange = shows(picture, ORANGE)
    assert orange[275, 100] and orange[275, 300] and orange[350, 200] and not orange[:, 450:].any()
    assert (picture[210:340, 110:290] == 100).all()
    assert not shows(draw_boxes(IMAGE, boxes, min_score=0.91), ORANGE).any()
    assert shows(draw_boxes(IMAGE, boxes), ORANGE)[:, 450:].any()


def test_boxes_of_the_original_image_are_scaled_to_its_copy():
    # Rows by 2 and columns by 3; without a score they are always drawn.
    original = [{name: (3 if name.startswith("x") else 2) * side for name, side in BOX.items()}]
    copy = draw_boxes(IMAGE, original, min_score=0.99, size=(800, 2400))
    np.testing.assert_array_equal(copy, draw_boxes(IMAGE, [BOX]))


@pytest.mark.parametrize(("finding", "colour"), [("effusion", FIRST), ("mass", SECOND)])
def test_boxes_without_a_score_are_dashed_if_there_are_several_findings(finding, colour):
    shares = []
    for box in (BOX | {"score": 0.9}, BOX):
        of_finding = shows(draw_boxes(IMAGE, [box | {"finding": finding}], findings=("mass", "effusion")), colour)
        shares += [(of_finding[350, 100:300].mean(), of_finding[200:350, 300].mean())]
    assert shares[0] == (1, 1) and all(0.4 < share < 0.7 for share in shares[1])
    # Of a single finding they are solid.
    assert shows(draw_boxes(IMAGE, [BOX | {"finding": finding}], findings=(finding,)), ORANGE)[350, 100:300].all()


def test_colours_are_of_all_findings_or_else_of_the_boxes():
    boxes = [BOX | {"finding": "mass"}, BOX | {"ymin": 20, "ymax": 90, "finding": "effusion"}]
    picture = draw_boxes(IMAGE, boxes)
    assert shows(picture, SECOND)[275, 300] and shows(picture, FIRST)[50, 300]
    picture = draw_boxes(IMAGE, boxes[:1], findings=("mass", "nodule"))
    assert shows(picture, FIRST)[275, 300]


def test_labels_show_the_score_and_the_name_of_one_of_several_findings():
    def label(**facts):
        """Return the part of the picture above the box."""
        return draw_boxes(IMAGE, [BOX | facts], findings=("mass", "effusion") if "several" in facts else ())[150:198]

    assert (label() == 100).all() and (label(finding="mass") == 100).all()
    orange = label(score=0.25)
    assert orange[..., 0].max() > 150 and orange[..., 2].max() == 100  # much red, no blue above the image's
    np.testing.assert_array_equal(label(score=0.25, finding="mass"), orange)
    assert (label(score=0.26) != orange).any()
    several = {"several": True}
    assert label(**several, finding="mass")[..., 2].max() > 150
    # Name and score are both shown, beside each other.
    widths = [
        np.ptp(np.flatnonzero((label(**several, **facts) != 100).any(axis=(0, 2))))
        for facts in ({"score": 0.25}, {"finding": "mass"}, {"finding": "mass", "score": 0.25})
    ]
    assert max(widths[:2]) < widths[2]


def test_the_highest_score_is_on_top():
    boxes = [BOX | {"finding": name, "score": score} for name, score in (("mass", 0.3), ("effusion", 0.8))]
    for given_boxes in (boxes, boxes[::-1]):
        assert shows(draw_boxes(IMAGE, given_boxes), FIRST)[350, 100:300].all()
    # A box without a score counts as certain.
    certain = draw_boxes(IMAGE, [BOX | {"finding": "mass"}, *boxes])
    assert shows(certain, SECOND)[350, 100:300].mean() > 0.4


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"a box lacks the keys \['ymin', 'ymax'\]"):
        draw_boxes(IMAGE, [{"xmin": 1, "xmax": 2}])
    for image in (IMAGE.astype(float), IMAGE[..., None], IMAGE[:0]):
        with pytest.raises(ValueError, match="expected an image of uint8"):
            draw_boxes(image, [])
    assert (draw_boxes(IMAGE, []) == 100).all()
