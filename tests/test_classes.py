"""Names and codes of classes."""

from kitlib.classes import LUNG_CODES, MASK_CODES


def test_each_structure_of_a_mask_has_its_own_code():
    """Masks are stored as label images, in which 0 is the background."""
    assert sorted(MASK_CODES.values()) == list(range(1, len(MASK_CODES) + 1))


def test_lungs_are_neither_the_heart_nor_a_pneumothorax():
    assert {name for name, code in MASK_CODES.items() if code in LUNG_CODES} == {"lungs", "left_lung", "right_lung"}
