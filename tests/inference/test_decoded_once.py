"""Images of a test set are decoded once, and again only when their cached copy is lost."""

import numpy as np
import pandas as pd
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.inference.decoded_once import DecodedOnce
from kitlib.xrays.cache import XrayCache
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
    assert sorted(xrays.sized(images).image_id) == ["a", "b", "d"] and xrays.error is None
    xrays.close()
