"""Pictures and bars as an HTML parser sees them: elements, positions and texts, and no scripts."""

import base64
from xml.etree import ElementTree

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import STUDY_CLASSES
from kitlib.page.xray_svg import MARKS, draw_bars, draw_picture
from kitlib.xrays.drawn_boxes import finding_colours

SVG = "{http://www.w3.org/2000/svg}"
ROWS, COLUMNS = 300, 200  # original size; the copy is three times smaller
GREY = np.add.outer(np.arange(100), np.arange(67)).astype(np.uint8)
BOXES = pd.DataFrame(
    [(0.2, 10, 20, 60, 90), (0.9, 100.5, 120.25, 180, 299), (0.5, 0, 0, 200, 300)],
    columns=["score", "xmin", "ymin", "xmax", "ymax"],
)
SHARES = dict(zip(STUDY_CLASSES, (0.1234, 0.7, 0.12, 0.0566), strict=True))


def drawn(**told) -> ElementTree.Element:
    return ElementTree.fromstring(draw_picture(GREY, ROWS, COLUMNS, **told))


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.get("class") == name]


def decoded(image: ElementTree.Element) -> np.ndarray:
    assert (image.get("width"), image.get("height")) == (str(COLUMNS), str(ROWS))
    assert image.get("preserveAspectRatio") == "none"  # the aspect ratio of a copy is rounded
    return cv2.imdecode(np.frombuffer(base64.b64decode(image.get("href").split(",")[1]), np.uint8), cv2.IMREAD_UNCHANGED)


def corners(rect: ElementTree.Element) -> tuple[float, ...]:
    x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def legend(root: ElementTree.Element) -> list[str]:
    return ["".join(entry.itertext()).strip() for part in of_class(root, "legend") for entry in part]


def test_without_layers_the_picture_has_only_the_x_ray():
    root = drawn()
    svg = root.find(f"{SVG}svg")
    assert svg.get("viewBox") == "0 0 200 300" and svg.get("role") == "img"
    assert svg.get("aria-label") == "Chest X-ray."
    assert legend(root) == [] and [child.get("class") for child in svg] == ["xray"]
    grey = decoded(svg[0])
    assert grey.shape == GREY.shape and np.abs(grey.astype(int) - GREY).max() <= 4  # JPEG of a ramp


def test_boxes_are_in_original_pixels_from_the_threshold_on():
    root = drawn(boxes=BOXES, threshold=0.5)
    assert [corners(rect) for rect in of_class(root, "predicted")] == [(0, 0, 200, 300), (100.5, 120.25, 180, 299)]
    low, high = of_class(root, "score")
    assert (low.text, high.text) == ("0.50", "0.90")
    # Each score is near the upper left corner of its box, which is (0, 0) or (100.5, 120.25).
    assert float(low.get("x")) < 90 < float(high.get("x")) and float(low.get("y")) < 90 < float(high.get("y"))
    label = root.find(f"{SVG}svg").get("aria-label")
    assert label == "Chest X-ray with 2 boxes of opacity with a score of at least 0.50."
    assert legend(root) == ["opacity found by the model, with its score"]


@given(
    boxes=st.lists(
        st.tuples(st.floats(0, 1), *[st.integers(0, 99)] * 2, *[st.integers(1, 100)] * 2).map(
            lambda box: (box[0], box[1], box[2], box[1] + box[3], box[2] + box[4])
        ),
        max_size=6,
    ),
    threshold=st.floats(0, 1),
)
@settings(max_examples=30)
def test_each_box_shown_has_its_score_inside_the_picture(boxes, threshold):
    table = pd.DataFrame(boxes, columns=BOXES.columns)
    root = drawn(boxes=table, truth=table.drop(columns="score"), threshold=threshold)
    expected = [box for box in boxes if box[0] >= threshold]
    assert sorted(corners(rect) for rect in of_class(root, "predicted")) == sorted(box[1:] for box in expected)
    assert len(of_class(root, "truth")) == len(boxes)
    assert sorted(text.text for text in of_class(root, "score")) == sorted(f"{box[0]:.2f}" for box in expected)
    for text in of_class(root, "score"):
        assert 0 <= float(text.get("x")) <= COLUMNS - 2 * float(text.get("font-size"))
        assert float(text.get("font-size")) <= float(text.get("y")) <= ROWS


def test_several_findings_have_colours_names_and_a_table():
    """The colours are those of all findings of the run: b and c keep theirs where there is no box of a."""
    findings = ("a", "b", "c")
    colours = finding_colours(findings)
    assert len(set(colours.values())) == 3 and finding_colours(["b"]) == {}
    boxes, truth = BOXES.assign(finding=["c", "<b>", "b"]), BOXES.iloc[:1].assign(finding="c").drop(columns="score")
    for name, drawn_boxes in (("b", boxes[boxes.finding == "b"]), ("c", boxes[boxes.finding == "c"])):
        root = drawn(boxes=drawn_boxes, truth=truth, findings=findings)
        assert [rect.get("stroke") for rect in of_class(root, "predicted")] == [colours[name]]
        (annotated,) = of_class(root, "truth")
        assert annotated.get("stroke") == colours["c"] and annotated.get("stroke-dasharray") == "9 6"
        kinds = ["finding found by the model, with its score", "annotated finding"]
        assert legend(root) == [*kinds, *sorted({name, "c"})]
    root = drawn(boxes=boxes, truth=truth, threshold=0.3, findings=("<b>", "b", "c"))
    assert [text.text for text in of_class(root, "score")] == ["b 0.50", "<b> 0.90"]
    (annotated,) = of_class(root, "name")
    assert annotated.text == "c" and float(annotated.get("y")) > 90  # below its box, which ends at 90
    (table,) = of_class(root, "box-table")
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert rows[1:] == [["<b>", "0.900", "100, 120, 180, 299"], ["b", "0.500", "0, 0, 200, 300"]]
    label = root.find(f"{SVG}svg").get("aria-label")
    assert label == "Chest X-ray with 2 boxes (1 <b>, 1 b) with a score of at least 0.30, 1 annotated box."


@pytest.mark.parametrize(
    ("layers", "description"),
    [
        ({"mask": np.ones((100, 67), bool), "heat": np.ones((9, 9), np.float32)}, "the outline of the lungs, a heat map."),
        (
            {"boxes": BOXES.assign(finding="a"), "threshold": 0.95, "findings": ("a", "b")},
            "0 boxes with a score of at least 0.95.",
        ),
    ],
)
def test_the_description_names_all_layers(layers, description):
    assert drawn(**layers).find(f"{SVG}svg").get("aria-label") == f"Chest X-ray with {description}"


def test_the_smallest_picture_is_one_pixel():
    root = ElementTree.fromstring(draw_picture(GREY[:1, :1], 1, 1))
    assert root.find(f"{SVG}svg").get("viewBox") == "0 0 1 1"


def test_a_mask_of_any_structure_has_its_name():
    root = drawn(mask=np.ones((100, 67), bool), structure="pneumothorax")
    assert legend(root) == ["pneumothorax found by the model"]
    assert root.find(f"{SVG}svg").get("aria-label") == "Chest X-ray with the outline of the pneumothorax."


def test_lines_do_not_grow_with_the_image_and_differ_in_colour_and_dash():
    root = drawn(boxes=BOXES, truth=BOXES.drop(columns="score"), mask=np.ones((100, 67), bool))
    lines = [line for name in MARKS for line in of_class(root, name)]
    assert len(lines) == 3 + 3 + 1 and len(of_class(root, "halo")) == len(lines)
    assert {line.get("vector-effect") for line in [*lines, *of_class(root, "halo")]} == {"non-scaling-stroke"}
    predicted, truth = (of_class(root, name)[0] for name in ("predicted", "truth"))
    assert predicted.get("stroke") != truth.get("stroke")
    assert predicted.get("stroke-dasharray") is None and truth.get("stroke-dasharray") == "9 6"
    assert legend(root) == ["opacity found by the model, with its score", "annotated opacity", "lungs found by the model"]


def test_the_lungs_outline_runs_through_the_middles_of_its_outermost_pixels():
    """Each pixel of a 4 x 5 mask is 50 x 60 original pixels; the mask covers rows 1 to 3 of columns 1 and 2."""
    mask = np.zeros((5, 4), bool)
    mask[1:4, 1:3] = True
    path = of_class(drawn(mask=mask), "mask")[0].get("d")
    assert path == "M75.0,90.0L75.0,210.0L125.0,210.0L125.0,90.0Z"  # (1.5 * 50, 1.5 * 60) and so on


def test_a_hole_is_outlined_and_an_empty_mask_is_not_drawn():
    mask = np.ones((9, 9), bool)
    assert of_class(drawn(mask=mask), "mask")[0].get("d").count("M") == 1
    mask[3:6, 3:6] = False
    assert of_class(drawn(mask=mask), "mask")[0].get("d").count("M") == 2
    nothing = drawn(mask=np.zeros((9, 9), bool), heat=np.zeros((9, 9), np.float32))
    assert not of_class(nothing, "mask") and not of_class(nothing, "heat") and legend(nothing) == []


def test_heat_is_as_opaque_as_it_is_hot():
    """Opacities are 0, half and all of 0.6 * 255 = 153; the ends of OpenCV's inferno are almost black and almost white."""
    heat = np.zeros((30, 20), np.float32)
    heat[:, 10:], heat[:10, 10:] = 1, 0.5
    root = drawn(heat=heat)
    overlay = decoded(of_class(root, "heat")[0])
    assert overlay.shape == (30, 20, 4)
    # rint(127.5) is 128 (to even), and 128 * 0.6 is 76.8.
    assert list(overlay[[0, 0, 20], [0, 15, 15], 3]) == [0, 77, 153]
    assert overlay[20, 15, :3].min() > 150 and legend(root) == ["where the model looked (Grad-CAM)"]
    assert decoded(of_class(drawn(heat=np.ones((900, 600), np.float32)), "heat")[0]).shape[0] == 256


@given(
    caption=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40).filter(lambda text: "\ufffe" not in text)
)
@settings(max_examples=30)
def test_a_caption_is_text_whatever_it_says(caption):
    caption = "".join(letter for letter in caption if ord(letter) & 0xFFFE != 0xFFFE)  # characters that XML does not allow
    for hostile in (caption, f"</figcaption><script>alert(1)</script>{caption}\"'"):
        root = drawn(caption=hostile)
        assert "".join(root.find("figcaption").itertext()) == hostile
        assert not [element for element in root.iter() if "script" in element.tag]


def test_an_empty_truth_is_described_but_not_in_the_legend():
    root = drawn(truth=BOXES.iloc[:0].drop(columns="score"), boxes=BOXES.iloc[:1], threshold=0.1)
    assert legend(root) == ["opacity found by the model, with its score"]
    label = root.find(f"{SVG}svg").get("aria-label")
    assert label == "Chest X-ray with 1 box of opacity with a score of at least 0.10, 0 annotated boxes."


@pytest.mark.parametrize(
    "told",
    [
        {"mask": np.ones((4, 4), np.uint8)},
        {"mask": np.ones(4, bool)},
        {"heat": np.full((4, 4), 1.5, np.float32)},
        {"heat": np.full((4, 4), np.nan, np.float32)},
        {"heat": np.ones((4, 4, 3), np.float32)},
    ],
)
def test_layers_of_another_type_or_range_are_refused(told):
    with pytest.raises(ValueError, match=r"expected a (bool mask|heat map)"):
        drawn(**told)


@pytest.mark.parametrize("pixels", [GREY.astype(float), GREY[0], GREY[:0]])
def test_pixels_of_another_type_or_shape_are_refused(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        draw_picture(pixels, ROWS, COLUMNS)


def meters(root: ElementTree.Element) -> list[tuple[str, str]]:
    found = [element for element in root.iter() if element.get("role") == "meter"]
    assert {(meter.get("aria-valuemin"), meter.get("aria-valuemax")) for meter in found} == {("0", "1")}
    return [(meter.get("aria-label"), meter.get("aria-valuenow")) for meter in found]


def test_bars_say_name_and_number_and_mark_the_annotated_class():
    html = draw_bars(SHARES, 0.0314, False, ["typical"])
    root = ElementTree.fromstring(html)
    assert meters(root) == [
        ("probability of negative", "0.123"),
        ("probability of typical, the annotated class", "0.700"),
        ("probability of indeterminate", "0.120"),
        ("probability of atypical", "0.057"),
        ("no finding in this image", "0.031"),
    ]
    rows = [" ".join(row.itertext()).split() for row in root.iter() if (row.get("class") or "").startswith("bar")]
    assert rows[:2] == [["negative", "0.123"], ["typical", "annotated", "0.700"]] and rows[4] == ["none", "0.031"]
    assert "width:12.34%" in html and "width:3.14%" in html


def test_class_frequencies_are_grey_and_explained():
    root = ElementTree.fromstring(draw_bars(SHARES, 0.5, True))
    assert [label.endswith("its share of the training set") for label, _ in meters(root)] == [True] * 4 + [False]
    assert "None of the selected models predicts the class" in "".join(root.itertext())
    assert len(of_class(root, "bar priors")) == 4
    without = ElementTree.fromstring(draw_bars(SHARES, None, False))
    assert len(meters(without)) == 4 and "None of the selected models" not in "".join(without.itertext())


def test_bars_of_0_and_1_are_drawn():
    root = ElementTree.fromstring(draw_bars({"a": 0.0, "b": 1.0}))
    assert meters(root) == [("probability of a", "0.000"), ("probability of b", "1.000")]


@pytest.mark.parametrize(("classes", "none"), [(SHARES, 1.5), ({**SHARES, "typical": float("nan")}, 0)])
def test_bars_of_other_numbers_are_refused(classes, none):
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        draw_bars(classes, none)
