"""The lung figures show the masks and values that they are called with."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kitlib.classes import LUNG_CODES
from kitlib.lungs.clean_up import FOUND, SMALL
from kitlib.reports.figures import PREDICTION, TRUTH, save_figure
from kitlib.reports.lungs_figures import clean_up_figure, lungs_montage, mask_images, overlap_figure
from kitlib.tables import BOX
from kitlib.xrays.mask_store import MaskStore
from tests.small_lungs import stored_lungs
from tests.small_masks import COLUMNS, ROWS, SmallMasks
from tests.small_xrays import SmallXrays


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallMasks(tmp_path_factory.mktemp("masks"), count=8, sides=True)


def scores(dice, structure="lungs"):
    return pd.DataFrame({"structure": structure, "dice": dice})


def test_one_line_per_structure_with_one_step_per_image():
    figure = overlap_figure(pd.concat([scores([0.9, 0.5, 0.75, 1.0]), scores([0.8, 0.85], "heart")]))
    (axis,) = figure.axes
    lungs, heart, people = axis.lines
    assert [line.get_label() for line in (lungs, heart)] == ["lungs", "heart"]
    assert lungs.get_xdata().tolist() == [0.5, 0.75, 0.9, 1.0] and lungs.get_ydata().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert heart.get_ydata().tolist() == [0.5, 1.0]
    assert people.get_xdata() == [0.95, 0.95] and people.get_linestyle() == ":"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("Dice, out of fold", "share of images") and axis.get_ylim() == (0, 1)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["lungs", "heart", "two readers, median"] and lungs.get_drawstyle() == "steps-post"
    assert len(overlap_figure(scores([0.9], "heart")).axes[0].lines) == 1
    assert axis.get_xlim() == (0.5, 1) and overlap_figure(scores([0.9])).axes[0].get_xlim() == (0.7, 1)


def outlines(axis):
    """Return the colours of the outlines in one picture."""
    drawn = [each for each in axis.collections if isinstance(each, matplotlib.contour.ContourSet)]
    return [to_hex(each.get_edgecolor()[0]) for each in drawn]


def test_predicted_masks_are_orange_and_annotated_masks_are_green(small, tmp_path):
    predicted = MaskStore(tmp_path)
    lungs_alone = small.masks.read("chest001").copy()
    lungs_alone[lungs_alone == 2] = 0
    predicted.add({"chest001": lungs_alone, "chest002": np.zeros((ROWS // 2, COLUMNS // 2), np.uint8)})
    ids = ["chest001", "chest002", "chest003"]
    figure = mask_images(small, predicted, ids, ["one", "two", "three"], drawn=small.masks)
    assert [axis.get_title() for axis in figure.axes] == ["one", "two", "three", ""]
    orange, green = to_hex(PREDICTION), to_hex(TRUTH)
    # Heart and both lungs are annotated. The predicted masks have both lungs, nothing, and no mask at all.
    assert [outlines(axis) for axis in figure.axes] == [[green] * 3 + [orange] * 2, [green] * 3, [green] * 3, []]
    for axis, image_id in zip(figure.axes, ids, strict=False):
        assert np.array_equal(axis.images[0].get_array(), small.pixels[image_id]) and not axis.axison
    (alone, *_) = mask_images(small, predicted, ids[:1], ["one"]).axes
    assert outlines(alone) == [orange] * 2
    for given, names in ((figure, ["annotated", "predicted"]), (mask_images(small, predicted, [], []), ["predicted"])):
        assert [text.get_text() for text in given.legends[0].get_texts()] == names
    assert [to_hex(line.get_color()) for line in figure.legends[0].get_lines()] == [green, orange]
    assert len(save_figure(figure, tmp_path / "figure.png").data) == (tmp_path / "figure.png").stat().st_size > 1000


def test_an_outline_goes_around_its_mask(small, tmp_path):
    (axis, *_) = mask_images(small, small.masks, ["chest000"], [""]).axes
    codes = small.masks.read("chest000")
    for each, code in zip(axis.collections, (2, 3, 4), strict=True):
        line = np.concatenate([path.vertices for path in each.get_paths()])
        ys, xs = np.nonzero(codes == code)
        # Half a pixel outside the centres of the outermost pixels is their edge.
        assert line.min(axis=0).tolist() == [xs.min() - 0.5, ys.min() - 0.5]
        assert line.max(axis=0).tolist() == [xs.max() + 0.5, ys.max() + 0.5]


def test_a_montage_dims_pixels_outside_the_lungs_and_frames_lungs_that_were_found(small):
    rows = [("chest000", FOUND, 0.3, 20.0, 24.0, 80.0, 100.0), ("chest001", SMALL, 0.01, 0.0, 0.0, COLUMNS, ROWS)]
    table = pd.DataFrame(rows, columns=["image_id", "verdict", "area", *BOX])
    figure = lungs_montage(small, small.masks, table)
    first, second, *empty = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["chest000\nfound, 30%", "chest001\ntoo small, 1%"]
    assert len(empty) == 4 and not any(axis.images for axis in empty)
    (frame,) = first.patches
    # The decoded copy has half the size of the original, and the first pixel begins at -0.5.
    assert frame.get_bbox().extents.tolist() == [9.5, 11.5, 39.5, 49.5] and to_hex(frame.get_edgecolor()) == to_hex(
        PREDICTION
    )
    assert len(second.patches) == 0 and not frame.get_fill() and len(figure.legends) == 1
    shown, inside = first.images[0].get_array(), np.isin(small.masks.read("chest000"), LUNG_CODES)
    assert np.array_equal(shown[inside], small.pixels["chest000"][inside])
    assert np.array_equal(shown[~inside], small.pixels["chest000"][~inside] // 3)


def test_nothing_to_show_is_an_empty_picture(small):
    nothing = pd.DataFrame(columns=["image_id", "verdict", "area", *BOX])
    for figure in (lungs_montage(small, small.masks, nothing), mask_images(small, small.masks, [], [])):
        assert not any(axis.images for axis in figure.axes)


def test_the_clean_up_is_shown_from_the_image_to_the_masked_image(tmp_path):
    small = SmallXrays(8)
    stored, ids = stored_lungs(tmp_path, small), small.image_ids[:2]
    figure = clean_up_figure(small, stored, ids)
    names = [axis.get_ylabel() for axis in figure.axes[::2]]
    assert names[0] == "image" and names[3] == "masked image" and len(set(filter(None, names))) == 4
    for column, image_id in enumerate(ids):
        image, drawn, cleaned, masked = (figure.axes[2 * row + column].images[0].get_array() for row in range(4))
        xray = small.read(image_id)
        assert np.array_equal(image, xray.pixels) and np.array_equal(drawn > 0, stored.masks.read(image_id) > 0)
        assert np.array_equal(cleaned > 0, stored.find_one(xray).mask)
        assert np.array_equal(masked, np.where(cleaned > 0, xray.pixels, 0))
        assert drawn.max() == cleaned.max() == 255
        assert figure.axes[column].get_title() == image_id
    for axis in figure.axes:
        assert (axis.images[0].get_cmap().name, axis.images[0].get_clim()) == ("gray", (0, 255))
        assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0
    assert len(clean_up_figure(small, stored, []).axes) == 4
