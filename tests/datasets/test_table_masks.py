"""Masks of a user's own images are matched by names and, if several images have one name, by folders."""

from pathlib import Path

import pytest

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.table_reader import read_own
from tests.small_own_images import six_images, write_image


@pytest.fixture
def folder(tmp_path):
    """The data set `mine`: six images, x0 to x5, in its folder `images`."""
    return six_images(tmp_path / "mine")


def test_masks_may_lie_beside_with_names_of_their_own(folder, tmp_path):
    for name in ("x0_mask", "x1-mask", "x2", "mask_x3", "orphan"):
        write_image(tmp_path / "shared_masks" / f"{name}.png")
    parameters = {"mask_folder": "shared_masks", "mask_convention": "lung_fields"}
    data = read_own(DataFolder(folder, [tmp_path / "shared_masks"]), False, **parameters)
    assert data.masks.image_id.tolist() == ["x0", "x1", "x2", "x3"] and len(data.images) == 6
    texts = " ".join(data.faults.problem)
    assert "are masks without an image of their name" in texts and "have no mask" in texts


@pytest.mark.parametrize(
    ("masks", "image_of"),
    [
        # The folders above the folder of masks are above the image, too.
        (("A/masks/1.png", "B/masks/1.png"), {"A/masks/1.png": "A/images/1.png", "B/masks/1.png": "B/images/1.png"}),
        # Those below it are the last ones of the image's path.
        (("masks/A/images/1.png",), {"masks/A/images/1.png": "A/images/1.png"}),
        (("masks/B/images/1_mask.png",), {"masks/B/images/1_mask.png": "B/images/1.png"}),
        # An archive may repeat the folder.
        (("A/masks/masks/1.png", "masks/1.png"), {"A/masks/masks/1.png": "A/images/1.png"}),
        (("masks/masks/B/images/1.png",), {"masks/masks/B/images/1.png": "B/images/1.png"}),
        (("B/masks/1.png", "masks/1.png", "C/masks/1.png"), {"B/masks/1.png": "B/images/1.png"}),
        (("A/images/masks/1.png",), {"A/images/masks/1.png": "A/images/1.png"}),
    ],
)
def test_folders_tell_which_of_several_images_of_one_name_a_mask_is_of(tmp_path, masks, image_of):
    folder = tmp_path / "mine"
    for name in ("A/images/1.png", "B/images/1.png", *masks):
        write_image(folder / name)
    data = read_own(folder, False, mask_folder="masks", mask_convention="lung_fields")
    images = data.images.set_index("image_id").path
    pairs = zip(data.masks.path, images[data.masks.image_id], strict=True)
    assert {tuple(Path(path).relative_to(folder).as_posix() for path in pair) for pair in pairs} == set(image_of.items())
    unclear = data.faults[data.faults.problem.str.contains("several images have")]
    left = sorted(set(masks) - set(image_of))
    assert unclear["row"].tolist() == left[:1]
    assert not left or f"and {len(left) - 1} other files" in unclear.problem.item()
    assert not data.faults.problem.str.contains("are not read").any()  # also not of masks that are not used
