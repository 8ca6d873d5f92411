"""CachedLungs segments each image once, returns cached lungs unchanged, and survives a failing segmenter."""

import re
import threading
import time

import numpy as np
import pytest

from kitlib.inference import cached_lungs
from kitlib.inference.cached_lungs import CachedLungs, LungsReport
from kitlib.lungs.finders import Lungs
from tests.small_xrays import COLUMNS, ROWS, SmallXrays

SMALL = SmallXrays(8)
XRAYS = list(SMALL.stream())


class Segmenter:
    """Finds a different frame and mask in each image, none in the first; raises for the images in `breaks`."""

    def __init__(self, breaks=()):
        self.breaks, self.asked, self.loaded = breaks, [], []

    def find(self, xrays):
        self.asked += [xray.image_id for xray in xrays]
        if set(self.breaks) & {xray.image_id for xray in xrays}:
            raise RuntimeError("no kernel image is available")
        return [self.of(xray) for xray in xrays]

    @staticmethod
    def of(xray):
        number = int(xray.image_id[5:])
        if not number:
            return Lungs(None)
        mask = np.random.default_rng(number).random((ROWS // 2, COLUMNS // 2)) > 0.5
        return Lungs(np.array([number / 3, 1.0, COLUMNS, ROWS]), mask)


@pytest.fixture
def segmenter(monkeypatch):
    fake = Segmenter()

    def load(bundle, batch_size):
        fake.loaded.append((bundle, batch_size))
        return fake

    monkeypatch.setattr(cached_lungs, "load_segmenter", load)
    return fake


def same(one, other):
    frames = one.frame is other.frame is None or np.array_equal(one.frame, other.frame)
    return frames and (one.mask is other.mask is None or np.array_equal(one.mask, other.mask))


@pytest.mark.parametrize("masked", [False, True])
def test_cached_lungs_are_unchanged_and_segmented_once(segmenter, tmp_path, masked):
    lungs = CachedLungs(tmp_path, masked, batch_size=4)
    expected = [Segmenter.of(xray) if masked else Lungs(Segmenter.of(xray).frame) for xray in XRAYS]
    first = lungs.find(XRAYS[:5])
    again = lungs.find(XRAYS[::-1])[::-1]
    assert all(same(*each) for each in zip(again, expected, strict=True))
    assert all(same(*each) for each in zip(first, expected, strict=False))
    assert sorted(segmenter.asked) == SMALL.image_ids
    assert segmenter.loaded == [(tmp_path, 4)]
    assert 0 < lungs.seconds < 60 and lungs.report() == LungsReport(8, 1, 0, lungs.seconds, "")


def test_only_the_latest_lungs_are_kept(segmenter, tmp_path):
    lungs = CachedLungs(tmp_path, masked=False, most=3)
    # A batch may have more images.
    assert [each.frame is not None for each in lungs.find(XRAYS[:5])] == [False, True, True, True, True]
    lungs.find(XRAYS[2:5])
    assert segmenter.asked == SMALL.image_ids[:5]
    lungs.find(XRAYS[1:2])
    assert segmenter.asked == [*SMALL.image_ids[:5], "image001"] and lungs.segmented == 3


def test_without_a_valid_bundle_no_lungs_are_found_and_fault_says_why(tmp_path):
    for bundle, message in (
        (None, "set `lungs` in the kernel's YAML file to a segmenter's run"),
        (tmp_path, "failed: BundleError: .*is missing"),
    ):
        lungs = CachedLungs(bundle, masked=True)
        lungs.begin()
        assert all(each.frame is None and each.mask is None for each in lungs.find(XRAYS)) and lungs.segmented == 0
        assert re.search(message, lungs.fault)


def test_an_image_on_which_the_segmenter_fails_does_not_affect_the_others(segmenter, tmp_path):
    segmenter.breaks, lungs = ["image003", "image005"], CachedLungs(tmp_path, masked=False)
    assert lungs.find(XRAYS[3:4])[0].frame is None  # a batch of one image says nothing about the segmenter
    found = lungs.find(XRAYS)
    assert [each.frame is not None for each in found] == [False, True, True, False, True, False, True, True]
    assert lungs.fault == "" and (lungs.segmented, lungs.missed) == (8, 3)


def test_a_segmenter_that_fails_on_a_whole_batch_is_not_used_again(segmenter, tmp_path):
    segmenter.breaks, lungs = ["image002", "image003"], CachedLungs(tmp_path, masked=False)
    for start in (0, 2, 4, 6):
        lungs.find(XRAYS[start : start + 2])
    frames = [each.frame is not None for each in lungs.find(XRAYS)]
    # The first batch keeps its lungs; the third is not segmented. Calls: two images, two, and each of the latter alone.
    assert frames == [False, True, *[False] * 6] and len(segmenter.asked) == 6
    assert lungs.fault.startswith("failed: RuntimeError: no kernel image is available; all further images are used")


def test_two_threads_do_not_segment_an_image_twice(segmenter, tmp_path, monkeypatch):
    find = Segmenter.find
    monkeypatch.setattr(Segmenter, "find", lambda self, xrays: time.sleep(0.05) or find(self, xrays))
    lungs = CachedLungs(tmp_path, masked=False)
    threads = [threading.Thread(target=lungs.find, args=(XRAYS,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(segmenter.asked) == SMALL.image_ids
