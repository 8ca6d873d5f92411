"""Exported images have every pixel of their files; a file that is not what its row says is named."""

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.dicom import read_xray
from kitlib.dicom_writing import write_xray
from kitlib.png_export import PngExportError, write_pngs


@pytest.fixture
def images(tmp_path):
    """Three DICOM files of differing sizes, of which the last is cut off."""
    rng, rows = np.random.default_rng(0), []
    for image_id, shape in (("a", (30, 40)), ("b", (70, 20)), ("c", (10, 10))):
        path = tmp_path / "set" / f"{image_id}.dcm"
        write_xray(path, rng.integers(0, 4096, shape, dtype=np.uint16), transfer_syntax=ExplicitVRLittleEndian)
        rows.append((image_id, str(path), *shape))
    path.write_bytes(path.read_bytes()[:300])
    return pd.DataFrame(rows, columns=["image_id", "path", "rows", "columns"])


def test_every_pixel_is_the_decoders(images, tmp_path):
    write_pngs(images.head(2), tmp_path / "out", workers=1, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    for image in images.head(2).itertuples():
        written = cv2.imread(str(tmp_path / "out" / f"{image.image_id}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(written, read_xray(image.path))


def test_what_cannot_be_written_is_named_and_the_rest_is_there(images, tmp_path):
    wrong = images.assign(rows=[30, 71, 10])
    with pytest.raises(PngExportError, match=r"2 of 3 images.*c: .*; b: the file has 20 x 70 pixels, its row says 20 x 71"):
        write_pngs(wrong, tmp_path / "out", workers=1, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="notebook 10"):
        write_pngs(images.assign(rows=0), tmp_path / "out")
