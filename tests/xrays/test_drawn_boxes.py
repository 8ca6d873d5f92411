"""Places of labels in pictures; the pictures themselves are tested in tests/test_calls.py."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kitlib.xrays.drawn_boxes import COLOURS, finding_colours, place_labels

corner = st.integers(0, 200)


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


def test_colours_follow_the_alphabet_and_repeat_after_the_last():
    names = [f"finding {number:02d}" for number in range(len(COLOURS) + 1)]
    colours = finding_colours(reversed(names))
    assert [colours[name] for name in names] == [*COLOURS, COLOURS[0]] and len(set(COLOURS)) == len(COLOURS) == 14
