"""Recognises DICOM files that are no projection X-rays, such as CT, MR and ultrasound images, by Modality or SOP Class."""

from pydicom.uid import UID

from kitlib.xrays.header import Elements

# Radiographs (computed, digital, digitised film), fluoroscopy, angiography, mammography, dental and portal images. The
# standard lacks DR, XR and RX, but devices write them.
PROJECTIONS = ("CR", "DX", "DR", "XR", "RX", "RG", "RF", "DF", "XA", "MG", "IO", "PX", "RTIMAGE")
# Modalities that do not say what was imaged: absent, other, secondary capture, hard copy. The SOP Class may say it.
UNSPECIFIC = ("", "OT", "SC", "HC")
SOP_CLASSES = "1.2.840.10008.5.1.4.1.1."
# CR, DX, MG and dental; secondary capture; XA and RF; portal images.
PROJECTION_CLASSES = tuple(SOP_CLASSES + part for part in ("1", "7", "12", "481.1"))
NOT_AN_XRAY = "not a projection X-ray"  # all warnings of this module start with this


def modality_warnings(elements: Elements) -> list[str]:
    """Return a list with a warning if a file is not a projection X-ray, according to its Modality; otherwise [].

    A Modality in PROJECTIONS means a projection X-ray. A Modality in UNSPECIFIC, such as secondary capture, does not say
    what was imaged; the SOP Class then decides, but a SOP Class that is not of the DICOM standard gives no warning.
    """
    modality = elements.text("Modality").upper()
    if modality in PROJECTIONS:
        return []
    if modality not in UNSPECIFIC:
        return [f"{NOT_AN_XRAY}: Modality {modality[:16]}"]
    sop_class = elements.text("SOPClassUID")
    is_projection = any(sop_class == known or sop_class.startswith(f"{known}.") for known in PROJECTION_CLASSES)
    if is_projection or not sop_class.startswith(SOP_CLASSES):
        return []
    return [f"{NOT_AN_XRAY}: {UID(sop_class).name}"]
