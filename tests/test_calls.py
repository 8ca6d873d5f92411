"""The five calls that kitlib itself offers."""

import subprocess
import sys

import cv2
import numpy as np
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
