"""Images of a test set are decoded once, and again only when their cached copy is lost."""

import shutil

import numpy as np
import pandas as pd
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.errors import CacheError
from kitlib.inference.decoded_once import DecodedOnce
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.worker import Outcome
from kitlib.xrays.writing import write_xray


def test_a_lost_or_damaged_copy_is_decoded_again_and_costs_at_most_its_image(tmp_path):
    paths = [tmp_path / f"{name}.dcm" for name in "abcd"]
    for number, path in enumerate(paths):
        write_xray(path, np.full((8, 6), 20 * number, np.uint8), transfer_syntax=ExplicitVRLittleEndian)
    images = pd.DataFrame({"image_id": [path.stem for path in paths], "path": list(map(str, paths))})
    cache = XrayCache(tmp_path / "cache", 8)
    xrays = DecodedOnce(cache, images, workers=1, longest_s=60)
    first = {xray.image_id: xray.pixels for xray in xrays.without(set())}
    assert sorted(first) == ["a", "b", "c", "d"]
    (cache.folder / "a.safetensors").write_bytes(b"damaged")
    (cache.folder / "b.safetensors").unlink()
    (cache.folder / "c.safetensors").unlink()
    paths[2].unlink()
    second = {xray.image_id: xray.pixels for xray in xrays.without(set())}
    assert sorted(second) == ["a", "b", "d"]
    assert all((second[name] == first[name]).all() for name in second)
    assert {done.image_id for done in xrays.outcomes if done.status == "failed"} == {"c"}
    assert {(row.image_id, row.rows, row.columns) for row in xrays.sized(images).itertuples()} == {
        ("a", 8, 6),
        ("b", 8, 6),
        ("d", 8, 6),
    }
    assert sorted(xrays.ids_without({"a"})) == ["b", "d"] and xrays.error is None
    (cache.folder / "d.safetensors").unlink()
    assert xrays.restore("d") and (cache.folder / "d.safetensors").is_file()
    assert not xrays.restore("c")  # its file is gone, too
    xrays.close()


def three(tmp_path) -> tuple[DecodedOnce, XrayCache]:
    paths = [tmp_path / f"{name}.dcm" for name in "abc"]
    for path in paths:
        write_xray(path, np.full((8, 6), 20, np.uint8), transfer_syntax=ExplicitVRLittleEndian)
    images = pd.DataFrame({"image_id": [path.stem for path in paths], "path": list(map(str, paths))})
    cache = XrayCache(tmp_path / "cache", 8)
    return DecodedOnce(cache, images, workers=1, longest_s=60), cache


def test_a_copy_that_is_lost_twice_costs_its_image_and_no_other(tmp_path, monkeypatch):
    xrays, _ = three(tmp_path)
    assert len(list(xrays.without(set()))) == 3
    read = XrayCache.read

    def losing(self, image_id):
        if image_id == "b":
            raise CacheError("the disk is dying")
        return read(self, image_id)

    monkeypatch.setattr(XrayCache, "read", losing)
    assert sorted(xray.image_id for xray in xrays.without(set())) == ["a", "c"]
    (failed,) = (done for done in xrays.outcomes if done.status == "failed")
    assert failed.image_id == "b" and failed.reason == "its decoded copy was lost: the disk is dying"
    xrays.close()


def test_slow_files_lower_the_time_limit_of_later_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(XrayCache, "decode", lambda *_: (Outcome(name, "failed", seconds=19.9) for name in "abc"))
    xrays, _ = three(tmp_path)
    assert list(xrays.without(set())) == [] and xrays.limits.slow == 3
    xrays.close()


def test_a_pass_ends_when_decoding_is_closed_and_makes_no_file(tmp_path):
    xrays, cache = three(tmp_path)
    first = xrays.without(set())
    next(first)
    xrays.close()
    shutil.rmtree(cache.folder)
    assert list(first) == [] and list(xrays.without(set())) == []
    assert xrays.error is None and not cache.folder.exists()
