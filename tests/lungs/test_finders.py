"""Lung finders: darkness, with frames in original pixels, and a finished run with and without an image's lungs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitlib.bundle import ADDED, read_bundle, read_record, save_bundle
from kitlib.classes import LUNG_CODES, MASK_CODES
from kitlib.errors import BundleError, TableError
from kitlib.lungs.darkness import lung_box
from kitlib.lungs.finders import DarkLungs, StoredLungs, segmenter_digest
from kitlib.phantoms.drawing import render
from kitlib.phantoms.patients import draw_exposure, draw_opacities, draw_patient
from kitlib.tables import BOX, read_table, write_table
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.mask_store import MaskStore
from tests.small_lungs import FRAME, bright_segmenter, lungs_run, stored_lungs
from tests.small_xrays import COLUMNS, ROWS, SmallXrays


def phantom(seed):
    rng = np.random.default_rng(seed)
    opacities = draw_opacities(rng, "typical")
    grey, _ = render(draw_patient(rng), draw_exposure(rng, 200), opacities)
    return (255 * grey).astype(np.uint8)


def test_dark_lungs_are_the_frame_of_the_copy_in_original_pixels():
    copies = [phantom(seed) for seed in range(4)] + [np.zeros((90, 70), np.uint8)]
    xrays = [CachedXray(f"i{n}", pixels, 2 * len(pixels) + 3, 5 * pixels.shape[1] + 1) for n, pixels in enumerate(copies)]
    found = DarkLungs().find(xrays)
    assert [each.mask for each in found] == [None] * 5 and found[4].frame is None
    assert sum(each.frame is not None for each in found) >= 3
    for xray, lungs in zip(xrays, found, strict=True):
        box, (height, width) = lung_box(xray.pixels), xray.pixels.shape
        if box is not None:
            x, y = xray.columns / width, xray.rows / height
            assert lungs.frame == pytest.approx(box * [x, y, x, y], rel=1e-12)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9000), st.integers(1, 9000))
def test_a_frame_at_the_far_edge_is_never_beyond_it(height, width, rows, columns):
    whole = np.array([0.0, 0.0, width, height])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kitlib.lungs.finders.lung_box", lambda pixels: whole)
        xray = CachedXray("a", np.broadcast_to(np.uint8(0), (height, width)), rows, columns)
        # Exactly: a frame that exceeds the image is refused.
        assert DarkLungs().find([xray])[0].frame.tolist() == [0, 0, columns, rows]


@pytest.fixture(scope="module")
def small():
    return SmallXrays(8)


def test_a_runs_frames_and_masks_are_found(small, tmp_path):
    found = stored_lungs(tmp_path, small).find(list(small.stream()))
    assert len(found) == 8
    for lungs in found:
        assert lungs.frame.tolist() == list(FRAME) and lungs.mask.dtype == bool
        expected = np.zeros((ROWS // 2, COLUMNS // 2), bool)
        expected[3:33, 5:35] = True  # the frame 10, 6, 70, 66 on a copy of half the pixels
        assert np.array_equal(lungs.mask, expected)


def test_heart_is_no_lung_and_either_side_is(small, tmp_path):
    folder = lungs_run(tmp_path, small)
    codes = np.zeros((ROWS // 2, COLUMNS // 2), np.uint8)
    for code in MASK_CODES.values():
        codes[:, 5 * code : 5 * code + 5] = code
    MaskStore.create_empty(folder / "masks").add({"image000": codes})
    mask = StoredLungs(folder).find_one(small.read("image000")).mask
    assert np.array_equal(mask, np.isin(codes, LUNG_CODES)) and mask.sum() == 3 * 5 * ROWS // 2


def test_images_without_lungs_have_no_frame_and_unknown_images_are_an_error(small, tmp_path):
    folder = lungs_run(tmp_path, small, missed=["image003"])
    # Its mask is in the store nevertheless, as notebook 14 writes it.
    MaskStore(folder / "masks").add({"image003": np.ones((ROWS // 2, COLUMNS // 2), np.uint8)})
    stored = StoredLungs(folder)
    stranger = CachedXray("image999", np.zeros((40, 50), np.uint8), ROWS, COLUMNS)
    found = stored.find([small.read("image003"), small.read("image004")])
    assert [each.frame is None for each in found] == [each.mask is None for each in found] == [True, False]
    with pytest.raises(ValueError, match=r"but not the image 'image999'.* apply the segmenter to the prepared run"):
        stored.find_one(stranger)


def test_a_mask_of_another_copy_is_refused_with_what_to_do(small, tmp_path):
    stored = stored_lungs(tmp_path, small)
    larger = CachedXray("image000", np.zeros((ROWS, COLUMNS), np.uint8), ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r"mask of 'image000' has \(40, 50\) pixels, .* \(80, 100\) pixels; apply"):
        stored.find_one(larger)


def test_a_run_without_its_table_or_weights_is_an_error(small, tmp_path):
    with pytest.raises(TableError, match=r"lungs\.parquet is missing"):
        StoredLungs(tmp_path / "nowhere")
    folder = lungs_run(tmp_path / "run", small)
    (folder / "bundle" / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors is missing"):
        StoredLungs(folder)


def test_a_run_with_cleaned_masks_of_an_earlier_version_is_refused(small, tmp_path):
    folder = lungs_run(tmp_path, small)
    record, weights = read_bundle(folder / "bundle")
    stated = {name: value for name, value in record.items() if name not in ADDED}
    save_bundle(folder / "bundle", weights, stated | {"architecture": {}})  # as clean-up 1 wrote it
    with pytest.raises(BundleError, match=r"cleaned up masks differently; apply the segmenter again with notebook 14"):
        StoredLungs(folder)


def test_the_fingerprint_changes_with_frames_masks_and_nothing_else(small, tmp_path):
    one = stored_lungs(tmp_path / "one", small)
    assert stored_lungs(tmp_path / "two", small).fingerprint == one.fingerprint
    told = {one.fingerprint, stored_lungs(tmp_path / "missed", small, missed=["image003"]).fingerprint}
    folder = lungs_run(tmp_path / "frames", small)
    table = read_table("lungs", folder / "tables" / "lungs.parquet")
    table.loc[2, list(BOX)] += 1.0
    write_table(table, "lungs", folder / "tables" / "lungs.parquet")
    told.add(StoredLungs(folder).fingerprint)
    folder = lungs_run(tmp_path / "masks", small)
    masks = {image_id: MaskStore(folder / "masks").read(image_id) for image_id in small.image_ids}
    masks["image005"][0, 0] = 1
    MaskStore.create_empty(folder / "masks").add(masks)
    told.add(StoredLungs(folder).fingerprint)
    assert len(told) == 4


def test_a_segmenter_is_identified_by_weights_and_clean_up(tmp_path):
    plain, again, wider = (
        segmenter_digest(read_record(bright_segmenter(tmp_path / name, **clean_up)))
        for name, clean_up in (("plain", {}), ("again", {}), ("wider", {"margin": 0.2}))
    )
    assert plain == again != wider and len(plain) == 64
    # hashlib.sha256(b'["weights", {"a": 1, "b": [2.5, null]}, 2]'), where 2 is the version of the clean-up: stored runs
    # contain such digests, so they must change with this version alone.
    golden = "e3201fde82386afc6c8d60f0bb1570ab7d1c62d89fe76f6ca4659182dca0be7c"
    for recipe in ({"a": 1, "b": [2.5, None]}, {"b": [2.5, None], "a": 1}):
        assert segmenter_digest({"weights_sha256": "weights", "recipe": recipe}) == golden
    record = read_record(tmp_path / "plain")
    assert segmenter_digest(record | {"model": "another name"}) == plain
    assert segmenter_digest(record | {"weights_sha256": "0" * 64}) != plain
