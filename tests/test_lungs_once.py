"""A submission's segmenter is asked once an image, keeps what was found as it was, and fails without harm."""

import re
import threading
import time

import numpy as np
import pytest
from small_xrays import COLUMNS, ROWS, SmallXrays

from kitlib import lungs_once
from kitlib.lungs import Lungs
from kitlib.lungs_once import LungsOnce

SMALL = SmallXrays(8)
XRAYS = list(SMALL.stream())


class Segmenter:
    """Finds a frame and a mask that differ from image to image, none in the first; breaks at the image `breaks`."""

    def __init__(self, breaks=""):
        self.breaks, self.asked = breaks, []

    def find(self, xrays):
        self.asked += [xray.image_id for xray in xrays]
        if self.breaks in self.asked:
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
    made = Segmenter()
    monkeypatch.setattr(lungs_once, "load_segmenter", lambda bundle, batch_size: made)
    return made


def same(one, other):
    frames = one.frame is other.frame is None or np.array_equal(one.frame, other.frame)
    return frames and (one.mask is other.mask is None or np.array_equal(one.mask, other.mask))


@pytest.mark.parametrize("masked", [False, True])
def test_what_was_found_is_kept_as_it_was_and_asked_for_once(segmenter, tmp_path, masked):
    lungs = LungsOnce(tmp_path, masked)
    expected = [Segmenter.of(xray) if masked else Lungs(Segmenter.of(xray).frame) for xray in XRAYS]
    first = lungs.find(XRAYS[:5])
    again = lungs.find(XRAYS[::-1])[::-1]
    assert all(same(*each) for each in zip(again, expected, strict=True))
    assert all(same(*each) for each in zip(first, expected, strict=False))
    assert sorted(segmenter.asked) == SMALL.image_ids
    assert (lungs.segmented, lungs.missed, lungs.fault) == (8, 1, "") and lungs.seconds > 0


def test_without_a_bundle_or_with_a_damaged_one_no_lungs_are_found_and_it_says_why(tmp_path):
    for bundle, told in (
        (None, "name its run by the kernel's key `lungs`"),
        (tmp_path, "failed: BundleError: .*is missing"),
    ):
        lungs = LungsOnce(bundle, masked=True)
        lungs.begin()
        assert all(each.frame is None and each.mask is None for each in lungs.find(XRAYS)) and lungs.segmented == 0
        assert re.search(told, lungs.fault)


def test_an_error_costs_the_lungs_from_there_on(segmenter, tmp_path):
    segmenter.breaks, lungs = "image005", LungsOnce(tmp_path, masked=False)
    for start in (0, 4):
        lungs.find(XRAYS[start : start + 4])
    frames = [each.frame is not None for each in lungs.find(XRAYS)]
    # The batch that failed is seen whole, by every model; nobody asks again.
    assert frames == [False, True, True, True, *[False] * 4] and len(segmenter.asked) == 8
    assert lungs.fault.startswith("failed: RuntimeError: no kernel image is available; images are seen whole")


def test_two_threads_do_not_ask_twice(segmenter, tmp_path, monkeypatch):
    find = Segmenter.find
    monkeypatch.setattr(Segmenter, "find", lambda self, xrays: time.sleep(0.05) or find(self, xrays))
    lungs = LungsOnce(tmp_path, masked=False)
    threads = [threading.Thread(target=lungs.find, args=(XRAYS,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(segmenter.asked) == SMALL.image_ids
