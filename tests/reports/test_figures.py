"""Figures drawn from small tables: coordinates, colours and texts."""

import cv2
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kitlib.classes import MASK_CODES, STUDY_CLASSES
from kitlib.reports import figures
from kitlib.tables import BOX
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.drawn_boxes import finding_colours
from kitlib.xrays.mask_store import MaskStore


class Cache:
    """Returns grey images whose decoded copy has a tenth of the original size."""

    def read(self, image_id):
        return CachedXray(image_id, np.full((80, 60), 90, np.uint8), 800, 600)


IMAGES = pd.DataFrame({"image_id": ["i0", "i1"], "study_id": ["s0", "s1"]})
LABELS = pd.DataFrame(np.eye(4)[[0, 1]], columns=list(STUDY_CLASSES)).assign(id=["s0", "s1"])


def boxes(*rows, score=None):
    table = pd.DataFrame(rows, columns=["image_id", *BOX])
    return table if score is None else table.assign(score=score)


def test_boxes_are_scaled_from_original_pixels():
    truth = boxes(("i1", 100.0, 200.0, 300.0, 600.0))
    detections = boxes(("i1", 150.0, 250.0, 350.0, 650.0), ("i1", 0.0, 0.0, 9.0, 9.0), score=[0.7, 0.05])
    figure = figures.example_images(Cache(), IMAGES, LABELS, truth, detections, per_row=2)
    healthy, ill = figure.axes
    assert not healthy.patches
    # Original pixels divided by ten; the box with the score 0.05 is not drawn.
    assert [patch.get_bbox().extents.tolist() for patch in ill.patches] == [
        pytest.approx([10, 20, 30, 60]),
        pytest.approx([15, 25, 35, 65]),
    ]
    colours = [patch.get_edgecolor() for patch in ill.patches]
    assert colours[0] != colours[1]
    assert [(text.get_text(), text.get_position()) for text in ill.texts] == [("0.70", (15, 24))]
    assert ill.get_title() == "i1\nground truth: typical" and not ill.axison
    assert (ill.images[0].get_cmap().name, ill.images[0].get_clim()) == ("gray", (0, 255))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "annotated",
        "predicted, with confidence (0.2 or more)",
    ]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ((0.05, 0.136), "no box is predicted with 0.2 or more; the highest confidence is 0.14"),
        ((), "no box is predicted"),
    ],
)
def test_the_legend_says_why_no_box_is_drawn(scores, text):
    """The confidence 0.9 belongs to an image that is not shown."""
    rows = [("i1", 150.0, 250.0, 350.0, 650.0)] * len(scores)
    detections = boxes(*rows, ("other", 0.0, 0.0, 9.0, 9.0), score=[*scores, 0.9])
    figure = figures.example_images(Cache(), IMAGES, detections=detections)
    assert [label.get_text() for label in figure.legends[0].get_texts()] == [text]


def test_a_score_is_not_printed_over_a_higher_one():
    detections = boxes(("i1", 150.0, 250.0, 350.0, 650.0), ("i1", 160.0, 250.0, 350.0, 640.0), score=[0.3, 0.7])
    _, ill = figures.example_images(Cache(), IMAGES, detections=detections, per_row=2).axes
    assert len(ill.patches) == 2 and [text.get_text() for text in ill.texts] == ["0.70"]


def test_scores_side_by_side_or_below_each_other_are_all_printed():
    # In pixels of the picture, a score is about 8 wide and 4 high; those of 0.6 and 0.5 would be over others.
    places = {0.9: (10, 20), 0.8: (20, 20), 0.7: (10, 26), 0.6: (16, 21), 0.5: (10, 23)}
    rows = [("i1", 10 * x, 10 * y, 10 * x + 50, 10 * y + 50) for x, y in places.values()]
    (axis,) = figures.example_images(Cache(), IMAGES[1:], detections=boxes(*rows, score=list(places)), per_row=1).axes
    assert [text.get_text() for text in axis.texts] == ["0.90", "0.80", "0.70"] and len(axis.patches) == 5


def test_names_of_findings_stay_inside_the_picture():
    truth = boxes(("i1", 550.0, 0.0, 600.0, 800.0), ("i1", -20.0, 300.0, 80.0, 400.0)).assign(finding=["effusion", "mass"])
    detections = boxes(("i1", 550.0, 0.0, 600.0, 800.0), score=[0.7]).assign(finding="effusion")
    figure = figures.example_images(Cache(), IMAGES[1:], boxes=truth, detections=detections, per_row=1)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["effusion 0.70", "effusion", "mass"]
    figure.canvas.draw()
    for text in axis.texts:
        # The picture has 80 x 60 pixels; widths of names are estimates.
        (left, bottom), (right, top) = axis.transData.inverted().transform(text.get_window_extent())
        assert left >= -1 and right <= 61 and top >= -1 and bottom <= 81


def test_of_a_long_id_only_the_end_is_a_title():
    long_id = "1.2.826.0.1.3680043.8.498." + "0123456789" * 3
    image = pd.DataFrame({"image_id": [long_id], "study_id": ["s0"]})
    labels = LABELS.assign(negative=0.5, typical=0.49)  # at least half is true
    (axis,) = figures.example_images(Cache(), image, labels, per_row=1).axes
    first, second = axis.get_title().splitlines()
    assert first.startswith("…") and long_id.endswith(first[1:]) and len(first) == figures.LONGEST_WORD
    assert second == "ground truth: negative"
    short = long_id[-figures.LONGEST_WORD :]
    (axis,) = figures.example_images(Cache(), image.assign(image_id=short), per_row=1).axes
    assert axis.get_title() == short


def test_findings_have_their_colours_whatever_a_figure_shows():
    truth = boxes(("i0", 0.0, 0.0, 300.0, 300.0), ("i1", 100.0, 200.0, 300.0, 600.0)).assign(finding=["mass", "effusion"])
    detections = boxes(("i1", 110.0, 200.0, 300.0, 600.0), score=[0.7]).assign(finding="effusion")
    colours = finding_colours(["mass", "effusion"])
    both = figures.example_images(Cache(), IMAGES, boxes=truth, detections=detections, per_row=2)
    ill = figures.example_images(Cache(), IMAGES[1:], boxes=truth, detections=detections, per_row=1)
    compared = figures.compare_detections(Cache(), IMAGES[1:], truth, {"model": detections})
    for axis in (both.axes[1], ill.axes[0], compared.axes[0]):
        annotated, predicted = axis.patches
        for patch in (annotated, predicted):
            assert to_hex(patch.get_edgecolor()).upper() == colours["effusion"]
        assert (annotated.get_linestyle(), predicted.get_linestyle()) == ("--", "-")
        assert [text.get_text() for text in axis.texts] == ["effusion 0.70", "effusion"]
    assert compared.axes[0].get_title() == "model\ni1"
    lines = [figure.legends[0].get_lines()[:2] for figure in (both, compared)]
    kinds = [[(line.get_label(), line.get_linestyle()) for line in pair] for pair in lines]
    predicted = "predicted, with confidence"
    assert kinds == [[("annotated", "--"), (f"{predicted} (0.2 or more)", "-")], [("annotated", "--"), (predicted, "-")]]
    legends = [[text.get_text() for text in figure.legends[0].get_texts()][2:] for figure in (both, ill, compared)]
    assert legends == [["effusion", "mass"], ["effusion"], ["effusion"]]


def test_box_sizes_are_divided_by_finding():
    images = IMAGES.assign(rows=800, columns=600)
    truth = boxes(("i1", 0, 0, 300, 800), ("i1", 300, 0, 600, 400), ("i1", 0, 0, 300, 800)).assign(finding=["b", "a", "b"])
    _, sizes = figures.boxes_figure(images, truth).axes
    assert [text.get_text() for text in sizes.get_legend().get_texts()] == ["a (1)", "b (2)"]
    # The bars of all findings are on top of each other: one box of a quarter of the image, two of half of it.
    assert sum(bar.get_height() for bar in sizes.patches) == 3
    assert max(bar.get_y() + bar.get_height() for bar in sizes.patches) == 2


def test_the_axis_of_the_fusion_steps_exaggerates_nothing():
    steps = pd.DataFrame({"step": ["0 default", "1 x"], "score": [0.61, 0.62], "gain": [0.0, 0.01]})
    (axis,) = figures.fusion_steps(steps).axes
    # A bar's length would stand for the score, so the axis would have to begin at 0.
    assert not axis.patches and axis.lines[0].get_xdata().tolist() == [0.61, 0.62]
    assert [text.get_text() for text in axis.texts] == ["0.6100 (+0.0000)", "0.6200 (+0.0100)"]
    assert [text.get_position()[1] for text in axis.texts] == [0, 1]
    assert axis.yaxis_inverted() and axis.get_xlabel() == "score, out of fold"


def test_masks_are_outlined(tmp_path):
    codes = np.zeros((80, 60), np.uint8)
    codes[10:50, 5:25], codes[10:50, 35:55] = MASK_CODES["right_lung"], MASK_CODES["left_lung"]
    masks = MaskStore(tmp_path)
    masks.add({"i1": codes})
    figure = figures.example_images(Cache(), IMAGES, LABELS, per_row=2, masks=masks)
    bare, drawn = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["annotated: left lung, right lung"]
    assert not bare.collections
    boxes = [outline.get_paths()[0].get_extents().extents.tolist() for outline in drawn.collections]
    # In matplotlib pixel centres are integers: the left edge of pixel 5 is at 4.5.
    assert sorted(boxes) == [[4.5, 9.5, 24.5, 49.5], [34.5, 9.5, 54.5, 49.5]]


def test_fold_shares_have_one_bar_per_fold_and_class():
    folds = pd.DataFrame({"id": ["i0", "i1"], "fold": [0, 1]})
    (axis,) = figures.fold_shares(folds, IMAGES, LABELS).axes
    heights = [patch.get_height() for patch in axis.patches]
    # Fold 0 is all negative, fold 1 all typical.
    assert heights == [1, 0, 0, 0, 0, 1, 0, 0] and axis.get_ylabel() == "share of the fold's images"
    assert axis.get_legend().get_title().get_text() == "fold"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0", "1"]
    more = pd.concat([folds, folds[:1]])
    (axis,) = figures.fold_shares(more, IMAGES, LABELS[["id"]]).axes
    assert [patch.get_height() for patch in axis.patches] == [2, 1] and axis.get_ylabel() == "images"


def test_confusion_shows_the_counts():
    matrix = pd.DataFrame([[3, 1], [0, 2]], index=["a", "b"], columns=["a", "b"])
    (axis,) = figures.confusion_figure({"": matrix}).axes
    assert [text.get_text() for text in axis.texts] == ["3", "1", "0", "2"]
    assert [text.get_position() for text in axis.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]] and axis.images[0].get_clim() == (0, 1)
    assert [text.get_color() for text in axis.texts] == ["white", "black", "black", "white"]  # dark and light cells
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("most probable class", "ground truth")
    five = figures.confusion_figure({f"{number}": matrix for number in range(5)}).axes
    assert [axis.get_title() for axis in five] == list("01234")
    # Four are side by side, the fifth is below the first.
    assert [axis.get_subplotspec().colspan.start for axis in five] == [0, 1, 2, 3, 0]
    empty = figures.confusion_figure({"": matrix.assign(a=[3, 0], b=[1, 0])}).axes[0].images[0].get_array()
    assert empty.tolist() == [[0.75, 0.25], [0, 0]]


def test_the_drawn_curve_has_the_average_precision_below_it():
    curve = pd.DataFrame({"recall": [0.0, 0.5, 1.0], "precision": [1.0, 1.0, 2 / 3]})
    (axis,) = figures.precision_recall_figure({"a (AP 0.833)": curve}).axes
    x, y = axis.lines[0].get_path().vertices.T
    drawn = axis.lines[0].get_drawstyle()
    # With steps drawn before each point, the area is the sum of the recall gains times the precision at their end.
    assert drawn == "steps-pre"
    assert np.sum(np.diff(axis.lines[0].get_xdata()) * axis.lines[0].get_ydata()[1:]) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert len(x) == len(y)
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_xlim()) == ("recall", "precision", (0, 1))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a (AP 0.833)"]
    (axis,) = figures.precision_recall_figure({"b (c) (AP 0.833)": curve}, ["b (c)", "a"]).axes
    assert axis.lines[0].get_color() == finding_colours(["a", "b (c)"])["b (c)"]


def test_each_class_has_a_line_of_observed_shares_with_dots_for_their_counts():
    rows = [("b", 0.1, 0.2, 5), ("a", 0.3, 0.4, 6), ("b", 0.9, 0.7, 9)]
    (axis,) = figures.reliability_figure(pd.DataFrame(rows, columns=["class", "predicted", "observed", "count"])).axes
    assert [line.get_label() for line in axis.lines] == ["calibrated", "b", "a"]
    drawn = [line.get_xydata().tolist() for line in axis.lines]
    assert drawn == [[[0, 0], [1, 1]], [[0.1, 0.2], [0.9, 0.7]], [[0.3, 0.4]]]
    for line, dots in zip(axis.lines[1:], axis.collections, strict=True):
        assert np.array_equal(dots.get_offsets(), line.get_xydata()) and to_hex(dots.get_facecolor()[0]) == line.get_color()
    small, large = axis.collections[0].get_sizes()  # for 5 and 9 images
    assert small < large
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted probability", "observed share")
    assert axis.get_xlim() == axis.get_ylim() == (0, 1) and axis.get_legend()


def test_figures_are_written_without_leftover_files(tmp_path):
    bins = pd.DataFrame({"class": ["a", "a"], "predicted": [0.1, 0.9], "observed": [0.2, 0.7], "count": [5, 9]})
    steps = pd.DataFrame({"step": ["0 default", "1 x"], "score": [0.5, 0.6], "gain": [0.0, 0.1]})
    for number, figure in enumerate((figures.reliability_figure(bins), figures.fusion_steps(steps))):
        path = tmp_path / f"{number}.png"
        assert figures.save_figure(figure, path).data == path.read_bytes()
        assert cv2.imread(str(path)).std() > 1
    assert len(list(tmp_path.iterdir())) == 2


def test_boxes_are_counted_per_image_and_sized_by_its_area():
    images = IMAGES.assign(rows=800, columns=600)
    counts, sizes = figures.boxes_figure(images, boxes(("i1", 0, 0, 300, 800), ("i1", 300, 0, 600, 400))).axes
    assert [label.get_text() for label in counts.get_xticklabels()] == ["0", "2"]
    assert [bar.get_height() for bar in counts.patches] == [1, 1]
    # Half of the image and a quarter of it.
    edges = [bar.get_x() for bar in sizes.patches if bar.get_height()]
    assert len(edges) == 2 and edges[0] == pytest.approx(0.25)
    assert [text.get_text() for text in counts.texts] == ["1", "1"]
    assert [axis.get_xlabel() for axis in (counts, sizes)] == ["boxes per image", "area of the box, as a share of the image"]
    assert [axis.get_ylabel() for axis in (counts, sizes)] == ["images", "boxes"]
