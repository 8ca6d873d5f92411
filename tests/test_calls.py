"""The five calls that kitlib itself offers."""

import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest

import kitlib
from kitlib.errors import UnreadableXray


def test_importing_kitlib_imports_nothing_large():
    code = (
        "import sys, kitlib; print([name for name in ('torch', 'pydicom', 'pandas', 'numpy', 'cv2') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_calls_are_those_of_the_documentation():
    from kitlib import draw_boxes, predict, read_xray, score, train_classifier

    assert all(call.__doc__ for call in (draw_boxes, predict, read_xray, score, train_classifier))
    assert {"draw_boxes", "predict", "read_xray", "score", "train_classifier"} <= set(dir(kitlib))
    with pytest.raises(AttributeError, match="'kitlib' has no attribute 'guess'; it has the functions read_xray"):
        kitlib.guess  # noqa: B018


def test_read_xray_reads_a_png_and_names_what_it_cannot_read(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(6, 8)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    np.testing.assert_array_equal(kitlib.read_xray(tmp_path / "x.png"), image)
    for path, reason in ((tmp_path / "gone.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UnreadableXray, match=reason):
            kitlib.read_xray(path)


def test_boxes_are_drawn_where_they_are_from_a_score_on():
    image = np.full((400, 800), 100, np.uint8)  # lines are two pixels wide, with a shadow of one more on either side
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = pd.DataFrame([(100, 200, 300, 350, 0.9), (500, 200, 600, 300, 0.1)], columns=[*sides, "score"])
    picture = kitlib.draw_boxes(image, boxes, min_score=0.5)
    assert picture.shape == (400, 800, 3) and (image == 100).all()
    orange = (picture == (255, 165, 0)).all(axis=2)
    assert orange[275, 100] and orange[275, 300] and orange[350, 200] and not orange[:, 450:].any()
    assert (picture[210:340, 110:290] == 100).all()
    # Boxes of an image of twice the size, as dictionaries.
    larger = [{name: 2 * side for name, side in row.items() if name in sides} for row in boxes.to_dict("records")]
    small = kitlib.draw_boxes(image, larger, size=(800, 1600))
    assert (small == (255, 165, 0)).all(axis=2)[275, 100] and (small == (255, 165, 0)).all(axis=2)[250, 600]
    # Of several findings, the first in the alphabet is "#E69F00" and the second "#CC00FF"; boxes without a score are dashed.
    named = boxes.assign(finding="mass")
    colours = ("mass", (204, 0, 255)), ("effusion", (230, 159, 0))
    for finding, colour in colours:
        solid = kitlib.draw_boxes(image, named.assign(finding=finding), findings=("mass", "effusion"))
        dashed = kitlib.draw_boxes(image, named.assign(finding=finding).drop(columns="score"), findings=("mass", "effusion"))
        share = [(picture[350, 100:300] == colour).all(axis=1).mean() for picture in (solid, dashed)]
        assert share[0] == 1 and 0.4 < share[1] < 0.7
    both = kitlib.draw_boxes(image, named.assign(finding=["mass", "effusion"]))
    assert tuple(both[350, 200]) == colours[0][1] and tuple(both[300, 550]) == colours[1][1]
    with pytest.raises(ValueError, match=r"a box lacks the keys \['ymin', 'ymax'\]"):
        kitlib.draw_boxes(image, [{"xmin": 1, "xmax": 2}])
    with pytest.raises(ValueError, match="expected an image of uint8"):
        kitlib.draw_boxes(image.astype(float), [])
