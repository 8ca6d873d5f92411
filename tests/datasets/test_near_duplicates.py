"""Near-duplicates: a re-encoded, cropped, rescaled and brightened copy is found, another chest is not."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from kitlib.datasets import near_duplicates
from kitlib.datasets.near_duplicates import MAX_DISTANCE, group_hashes, group_near_duplicates, perceptual_hash
from kitlib.phantoms.drawing import render
from kitlib.phantoms.patients import draw_exposure, draw_opacities, draw_patient
from kitlib.xrays.cache import CachedXray

CLASSES = ("negative", "typical", "indeterminate", "atypical")


class Images(dict):
    """Pixels by image id, with the interface of a cache."""

    def read(self, image_id: str) -> CachedXray:
        return CachedXray(image_id, self[image_id], *self[image_id].shape)


def phantom(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grey, _ = render(draw_patient(rng), draw_exposure(rng, 256), draw_opacities(rng, CLASSES[seed % 4]))
    return (255 * grey).astype(np.uint8)


def copy_of(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Return a copy, cropped by up to 1 % at each edge, rescaled, brightened and compressed as JPEG."""
    rng = np.random.default_rng([seed, 1])
    top, bottom, left, right = rng.integers(0, 3, 4)
    cropped = pixels[top : pixels.shape[0] - bottom, left : pixels.shape[1] - right]
    scaled = cv2.resize(cropped, None, fx=1.3, fy=1.3, interpolation=cv2.INTER_LINEAR)
    brighter = np.clip(scaled * rng.uniform(0.95, 1.1) + rng.uniform(0, 10), 0, 255).astype(np.uint8)
    return cv2.imdecode(cv2.imencode(".jpg", brighter, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_GRAYSCALE)


def test_copies_are_found_and_other_patients_are_not():
    images = Images({f"i{seed}": phantom(seed) for seed in range(40)})
    images |= {f"c{seed}": copy_of(images[f"i{seed}"], seed) for seed in range(0, 40, 4)}
    groups = group_near_duplicates(images, [*images, "never decoded"]).set_index("image_id").group
    assert "never decoded" not in groups.index
    assert all(groups[f"i{seed}"] == groups[f"c{seed}"] for seed in range(0, 40, 4))
    assert groups.nunique() == 40


def test_half_of_the_256_bits_are_above_the_median():
    bits = perceptual_hash(np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8))
    assert bits.dtype == bool and bits.shape == (256,) and bits.sum() == 128


@pytest.mark.parametrize("shape", [(3000, 90), (90, 3000), (2000, 600), (1, 700)])
def test_a_long_narrow_image_and_its_small_copy_have_nearly_the_same_hash(shape):
    noise = np.random.default_rng(0).uniform(0, 255, (24, 20))
    pixels = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    small = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_AREA)
    assert (perceptual_hash(pixels) != perceptual_hash(small)).sum() <= MAX_DISTANCE


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 1.0), st.integers(0, 60))
def test_the_hash_does_not_see_brightness(seed, contrast, brightness):
    """Bits compare frequencies to their median, so a linear change of grey alters only bits at the limit of rounding."""
    noise = np.random.default_rng(seed).normal(0, 1, (24, 20))
    pixels = (127 + 60 * np.clip(cv2.resize(noise, (200, 240), interpolation=cv2.INTER_CUBIC), -2, 2)).astype(np.uint8)
    changed = (pixels * contrast * 0.75 + brightness).astype(np.uint8)
    assert (perceptual_hash(pixels) != perceptual_hash(changed)).sum() <= 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_groups_are_the_chains_of_near_pairs(count, max_distance, seed):
    """Against a direct search of all pairs, on hashes of 16 bits, which are often close, in blocks of 2 by 3."""
    hashes = list(np.random.default_rng(seed).random((count, 16)) < 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "BLOCK_ROWS", 2)
        patch.setattr(near_duplicates, "BLOCK_COLUMNS", 3)
        groups = group_hashes(hashes, max_distance)
    expected = list(range(count))
    for one in range(count):
        for other in range(one):
            if (hashes[one] != hashes[other]).sum() <= max_distance:
                expected = [expected[other] if name == expected[one] else name for name in expected]
    assert len(groups) == count and groups.dtype.kind == "i"
    pairs = {(a, b) for a, b in zip(groups, expected, strict=True)}
    assert len(pairs) == len(set(groups)) == len(set(expected))


def test_identical_hashes_chains_and_the_limit_across_blocks(monkeypatch):
    """Blocks of 3 by 7; 30 identical hashes, a chain in steps of 32 bits, and pairs of 32 and 33 bits."""
    monkeypatch.setattr(near_duplicates, "BLOCK_ROWS", 3)
    monkeypatch.setattr(near_duplicates, "BLOCK_COLUMNS", 7)
    rng = np.random.default_rng(0)
    flipped = [rng.permutation(256) for _ in range(20)]
    chain, far = [np.zeros(256, bool)], rng.random((20, 256)) < 0.5
    for bits in flipped:
        chain.append(chain[-1] ^ np.isin(np.arange(256), bits[:32]))
    near, distant = (
        far ^ np.stack([np.isin(np.arange(256), bits[count]) for bits in flipped]) for count in (slice(32), slice(-33, None))
    )
    hashes = [*[chain[0]] * 30, *chain, *far, *near, *distant]
    order = rng.permutation(len(hashes))
    groups = np.empty(len(hashes), int)
    groups[order] = group_hashes([hashes[place] for place in order], MAX_DISTANCE)
    assert len(set(groups[:51])) == 1
    assert (groups[51:71] == groups[71:91]).all() and len(set(groups[71:])) == 40 and len(set(groups)) == 41


def test_two_clusters_with_a_single_bridge_are_one_group(monkeypatch):
    """Clusters of 9 and 51 hashes, joined by one pair 30 bits apart, in blocks of 4 by 8; groups as by brute force."""
    monkeypatch.setattr(near_duplicates, "BLOCK_ROWS", 4)
    monkeypatch.setattr(near_duplicates, "BLOCK_COLUMNS", 8)
    rng = np.random.default_rng(1)

    def flip(bits, places):
        return bits ^ np.isin(np.arange(256), places)

    for _ in range(40):
        one_end, order = rng.random(256) < 0.5, rng.permutation(256)
        other_end, beyond = flip(one_end, order[:30]), flip(one_end, order[:44])
        small, large = (
            [flip(centre, rng.permutation(order[60:])[:6]) for _ in range(n)] for centre, n in ((one_end, 8), (beyond, 50))
        )
        hashes = [one_end, *small, other_end, *large]
        distances = (np.stack(hashes)[:, None] != np.stack(hashes)).sum(axis=2)
        assert (distances[:9, 9:] <= MAX_DISTANCE).sum() == 1
        assert connected_components(distances <= MAX_DISTANCE, directed=False)[0] == 1
        assert len(set(group_hashes(hashes, MAX_DISTANCE))) == 1


@pytest.mark.real_data
def test_few_real_chests_of_other_patients_come_together(real_data):
    """120 NIH chest images of 1,024 px, no two of which are copies."""
    paths = sorted((real_data / "cxr_det").rglob("*.jpg"))[:120]
    groups = group_hashes([perceptual_hash(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in paths], MAX_DISTANCE)
    assert len(paths) == 120 and len(set(groups)) == 120
