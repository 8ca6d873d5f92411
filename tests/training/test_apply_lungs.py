"""Applying a segmenter to a data set: every image once, exact resume, and masks that later stages read."""

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from kitlib.classes import LUNG_CODES
from kitlib.errors import SettingsError, TrainingError
from kitlib.inference.segment_lungs import load_segmenter
from kitlib.lungs.clean_up import BLANK, EMPTY, FOUND
from kitlib.lungs.finders import StoredLungs
from kitlib.recipes.fields import PUBLISHED_CLEAN_UP
from kitlib.settings import override
from kitlib.tables import BOX, read_table
from kitlib.training import apply_lungs as module
from kitlib.training.apply_lungs import apply_lungs
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.mask_store import MaskStore
from tests.small_masks import COLUMNS, RECIPE, ROWS, SmallMasks
from tests.small_tasks import train_small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    small = SmallMasks(tmp_path_factory.mktemp("masks"))
    small.pixels["chest003"] = np.full_like(small.pixels["chest003"], 90)  # a blank image
    return small


@pytest.fixture(scope="module")
def bundle(small, tmp_path_factory):
    healthy = SmallMasks(tmp_path_factory.mktemp("healthy"))
    recipe = override(RECIPE, epochs=12, least_width=0.5, least_area=0.05, dilations=9)
    run = train_small(tmp_path_factory.mktemp("trained"), healthy, recipe, fold=0, masks=healthy.masks)
    return run.run_folder / "bundle"


def applied(small, bundle, folder, **options):
    return apply_lungs(small.images, small, bundle, folder, progress=False, **options)


@pytest.fixture(scope="module")
def run(small, bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lungs")
    return folder, applied(small, bundle, folder, masked_images=True)


@pytest.mark.gpu
def test_every_image_has_a_row_and_a_mask_and_a_blank_one_no_lungs(run, small):
    folder, lungs = run
    assert lungs.image_id.tolist() == small.image_ids
    assert sorted(MaskStore(folder / "masks").ids) == sorted(small.image_ids)
    verdicts = lungs.set_index("image_id").verdict
    assert verdicts["chest003"] == BLANK and (verdicts.drop("chest003") == FOUND).all()
    assert lungs.loc[lungs.verdict != FOUND, list(BOX)].to_numpy().tolist() == [[0, 0, COLUMNS, ROWS]]
    pd.testing.assert_frame_equal(read_table("lungs", folder / "tables" / "lungs.parquet"), lungs)


def test_frames_hold_the_lungs_that_were_drawn(run, small):
    for row in run[1][run[1].verdict == FOUND].itertuples():
        drawn = np.argwhere(np.isin(small.masks.read(row.image_id), LUNG_CODES)) * 2  # the copy has half the pixels
        inside = (drawn[:, 1] >= row.xmin) & (drawn[:, 1] < row.xmax) & (drawn[:, 0] >= row.ymin) & (drawn[:, 0] < row.ymax)
        assert inside.mean() > 0.98


@pytest.mark.gpu
def test_later_stages_find_what_the_segmenter_would_find(run, small, bundle):
    folder, _ = run
    stored, at_once = StoredLungs(folder), load_segmenter(folder / "bundle", batch_size=16)
    for kept, found in zip(stored.find(list(small.stream())), at_once.find(list(small.stream())), strict=True):
        if found.frame is None:
            assert kept.frame is None and kept.mask is None
        else:
            assert kept.frame.tolist() == found.frame.tolist() and np.array_equal(kept.mask, found.mask)


def test_masks_are_stored_as_drawn_and_models_see_the_cleaned_ones(run, small):
    folder, lungs = run
    copies, masks, stored = (
        XrayCache(folder / "masked", small.longest_side),
        MaskStore(folder / "masks"),
        StoredLungs(folder),
    )
    for row in lungs.itertuples():
        copy, image = copies.read(row.image_id), small.read(row.image_id)
        seen, drawn = stored.find_one(image).mask, masks.read(row.image_id) > 0
        assert np.array_equal(copy.pixels, image.pixels if seen is None else np.where(seen, image.pixels, 0))
        assert (copy.rows, copy.columns) == (ROWS, COLUMNS) and (seen is None) == (row.verdict != FOUND)
        if seen is not None:  # 9 pixels of the canvas of 512 are one pixel of a copy of 60
            grown = ndimage.binary_dilation(drawn, np.ones((3, 3)))
            assert seen.sum() > drawn.sum() and (seen == grown).mean() > 0.9


class Counting:
    """Cache that counts reads and raises an error at a chosen read."""

    def __init__(self, small, fails_at=None):
        self.small, self.longest_side, self.reads, self.fails_at = small, small.longest_side, [], fails_at

    def read(self, image_id: str) -> CachedXray:
        self.reads.append(image_id)
        if len(self.reads) == self.fails_at:
            raise OSError("the disk is gone")
        return self.small.read(image_id)


def test_an_interrupted_run_continues_and_ends_with_the_same_lungs(run, small, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_FILE", 4)
    with pytest.raises(OSError, match="the disk is gone"):
        apply_lungs(small.images, Counting(small, fails_at=11), bundle, tmp_path, batch_size=2, progress=False)
    # Eight images are in two complete files; an incomplete part leaves no files.
    assert len(MaskStore(tmp_path / "masks")) == 8 and not (tmp_path / "tables" / "lungs.parquet").exists()
    counting = Counting(small)
    lungs = apply_lungs(small.images, counting, bundle, tmp_path, batch_size=2, progress=False)
    assert sorted(counting.reads) == small.image_ids[8:]
    pd.testing.assert_frame_equal(lungs, run[1])
    nothing = Counting(small)
    pd.testing.assert_frame_equal(apply_lungs(small.images, nothing, bundle, tmp_path, progress=False), lungs)
    assert nothing.reads == [] and not (tmp_path / "masked").exists()  # copies are written only on request
    with pytest.raises(TrainingError, match="data_fingerprint: "):
        apply_lungs(small.images[:8], small, bundle, tmp_path, progress=False)
    everything = Counting(small)
    again = apply_lungs(small.images, everything, bundle, tmp_path, resume=False, progress=False)
    assert sorted(everything.reads) == small.image_ids and again.equals(lungs)


def test_rows_without_their_masks_are_made_again(run, small, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_FILE", 4)
    applied(small, bundle, tmp_path)
    # As if killed after writing the rows of the last part and before writing its masks.
    sorted((tmp_path / "masks").glob("*.arrow"))[-1].unlink()
    counting = Counting(small)
    pd.testing.assert_frame_equal(apply_lungs(small.images, counting, bundle, tmp_path, progress=False), run[1])
    assert len(counting.reads) == 4


def test_a_changed_clean_up_is_kept_in_the_bundle_and_is_another_run(run, small, bundle, tmp_path):
    plain = applied(small, bundle, tmp_path / "plain", clean_up={"dilations": 0, "margin": 0.0})
    for name in small.image_ids:  # whatever the clean-up, the stored masks are those that were drawn
        assert np.array_equal(MaskStore(tmp_path / "plain" / "masks").read(name), MaskStore(run[0] / "masks").read(name))
    wide = applied(small, bundle, tmp_path / "wide", clean_up={"dilations": 0, "margin": 0.2})
    found = plain.verdict == FOUND
    assert ((wide.xmax - wide.xmin) >= (plain.xmax - plain.xmin))[found].all() and found.sum() == 15
    assert load_segmenter(tmp_path / "wide" / "bundle").recipe.margin == 0.2
    with pytest.raises(TrainingError, match=r"recipe\.margin: 0\.2 recorded, 0\.0 requested"):
        applied(small, bundle, tmp_path / "wide", clean_up={"dilations": 0, "margin": 0.0})
    with pytest.raises(SettingsError, match="no field 'width'; valid fields: least_island, dilations"):
        applied(small, bundle, tmp_path / "other", clean_up={"width": 2.0})


def test_the_published_least_area_is_only_for_dilated_masks(small, bundle, tmp_path, caplog):
    with pytest.raises(SettingsError, match=r"least_area is 0\.1907, .* the recipe has 0 dilations .* set least_area"):
        applied(small, bundle, tmp_path, clean_up=PUBLISHED_CLEAN_UP | {"dilations": 0})
    assert "but its network is resunet" not in caplog.text
    applied(small, bundle, tmp_path / "old", clean_up=PUBLISHED_CLEAN_UP)  # as in the bundles of a resunet until clean-up 2
    assert "but its network is resunet" in caplog.text


def test_if_no_lungs_pass_the_clean_up_whole_images_are_used(small, bundle, tmp_path):
    lungs = applied(small, bundle, tmp_path, clean_up={"least_island": 0.99})
    assert set(lungs.verdict) == {EMPTY, BLANK} and (lungs.area == 0).all()
    assert all(each.frame is None for each in StoredLungs(tmp_path).find(list(small.stream())))
