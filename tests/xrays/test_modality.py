"""CT, MR and other modalities have a warning, or are refused; projection X-rays of every kind have neither."""

import numpy as np
import pandas as pd
import pytest
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    XRayAngiographicImageStorage,
)

from kitlib.xrays.cache import XrayCache
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.writing import write_xray

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)


@pytest.mark.parametrize(
    ("modality", "sop_class", "warning"),
    [
        *((name, None, "") for name in ("CR", "DX", "DR", "RG", "RF", "XA", "MG", "cr ")),
        *((name, None, f"Modality {name}") for name in ("CT", "MR", "US", "NM", "PT", "SEG", "XC")),
        ("CR", CTImageStorage, ""),  # Modality goes before the SOP Class
        *((name, CTImageStorage, "CT Image Storage") for name in (None, "", "OT", "SC")),
        (None, UltrasoundImageStorage, "Ultrasound Image Storage"),
        (None, DigitalXRayImageStorageForPresentation, ""),
        (None, XRayAngiographicImageStorage, ""),
        (None, SecondaryCaptureImageStorage, ""),
        (None, "1.3.46.670589.2.5.1.1", ""),  # private
        (None, None, ""),
    ],
)
def test_modality_decides_before_the_sop_class(tmp_path, modality, sop_class, warning):
    extra = {"Modality": modality, "SOPClassUID": sop_class}
    write_xray(tmp_path / "x.dcm", RAMP, transfer_syntax=ExplicitVRLittleEndian, extra=extra)
    xray = decode_xray(tmp_path / "x.dcm")
    np.testing.assert_array_equal(xray.pixels, RAMP)
    assert xray.warnings == ((f"not a projection X-ray: {warning}",) if warning else ())


def test_a_cache_of_projections_refuses_other_modalities(tmp_path):
    for name in ("CT", "DX"):
        path = tmp_path / f"{name}.dcm"
        write_xray(path, RAMP, transfer_syntax=ExplicitVRLittleEndian, extra={"Modality": name})
    images = pd.DataFrame({"image_id": ["CT", "DX"], "path": [str(tmp_path / f"{name}.dcm") for name in ("CT", "DX")]})
    for number, (only_projections, status) in enumerate(((True, "failed"), (False, "cached"), (True, "failed"))):
        table = XrayCache(tmp_path / "c", 32, only_projections).fill(images, workers=1).set_index("image_id")
        assert ((table.seconds > 0) == (number == 0)).all()  # a refused file has taken its time
        assert table.status["CT"] == status and table.status["DX"] in ("decoded", "cached")
        assert "not a projection X-ray: Modality CT" in (table.reason["CT"], *table.warnings["CT"])
