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
    """Return [] for a projection X-ray, and a list with one warning for another kind of image, according to the header.

    If the Modality is in PROJECTIONS, the image is a projection X-ray. If the Modality is in UNSPECIFIC, such as secondary
    capture, the SOP Class decides; without a SOP Class, or with one from outside the DICOM standard, there is no warning.
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
