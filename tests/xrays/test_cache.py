"""The decode-once cache: entries, reuse and invalidation, packing, and files that fail, hang or crash a worker."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from safetensors.numpy import save_file

import kitlib.xrays.cache
from kitlib.errors import CacheError
from kitlib.xrays.cache import DECODING, STALE_SECONDS, CachedXray, XrayCache
from kitlib.xrays.entry import read_entry
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.worker import decode_into, shrink
from kitlib.xrays.writing import write_xray
from tests import PROJECT

pytestmark = pytest.mark.usefixtures("quick_processes")
RNG = np.random.default_rng(0)


def write_images(folder: Path, count: int, rows: int = 90, columns: int = 60) -> pd.DataFrame:
    records = []
    for number in range(count):
        path = folder / f"{number}.dcm"
        stored = RNG.integers(0, 4096, (rows, columns)).astype(np.uint16)
        write_xray(path, stored, transfer_syntax=ExplicitVRLittleEndian, bits_stored=12)
        records.append({"image_id": f"image{number}", "path": str(path)})
    return pd.DataFrame(records)


def misbehave(entry, image_id, path, longest_side):
    """Stand in for a worker's task with three bad files; at module level, so that a new process can import it."""
    if image_id == "image1":
        os.kill(os.getpid(), signal.SIGSEGV)
    if image_id == "image2":
        time.sleep(60)
    if image_id == "image3":
        np.ones(2**29)  # 4 GB
    return decode_into(entry, image_id, path, longest_side)


def test_a_packed_cache_is_one_file_and_reads_and_goes_on_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(kitlib.xrays.cache, "scratch_root", lambda: tmp_path / "scratch")
    images = write_images(tmp_path, 4)
    cache = XrayCache(tmp_path / "cache", longest_side=45)
    cache.fill(images.head(3), workers=1)
    before = {image_id: cache.read(image_id) for image_id in images.image_id.head(3)}
    packed = cache.pack()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [packed]
    packed.chmod(0o444)
    again = XrayCache(tmp_path / "cache", longest_side=45)
    for image_id, expected in before.items():
        np.testing.assert_array_equal(again.read(image_id).pixels, expected.pixels)
        assert again.read(image_id).rows == expected.rows
    assert "image3" not in again and not (tmp_path / "scratch").exists()
    with pytest.raises(KeyError, match="no image 'image3'"):
        again.read("image3")
    assert again.fill(images, workers=1).status.tolist() == ["cached", "cached", "cached", "decoded"]
    # Images decoded later are kept for this archive, and not used for another one.
    assert XrayCache(tmp_path / "cache", longest_side=45).folder == again.folder
    both = XrayCache(again.pack().parent, longest_side=45)
    assert both.folder != again.folder
    assert all(image_id in both for image_id in images.image_id)
    np.testing.assert_array_equal(both.read("image0").pixels, before["image0"].pixels)


@pytest.mark.parametrize("length", [87, 88, 89, 187, 200])
def test_long_names_survive_packing(tmp_path, length):
    """With the suffix, 88 characters are 100, the most that a plain tar header holds; 200 are the most for an image_id."""
    cache = XrayCache(tmp_path, 8)
    for number, name in enumerate(("a" * length, "b", "é" * (length // 2))):
        cache.put(CachedXray(name, np.full((2, number + 1), number, np.uint8), 20, 10))
    cache.pack()
    again = XrayCache(tmp_path, 8)
    for number, name in enumerate(("a" * length, "b", "é" * (length // 2))):
        assert again.read(name).pixels.tolist() == [[number] * (number + 1)] * 2


def test_damage_to_an_archive_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(kitlib.xrays.cache, "scratch_root", lambda: tmp_path / "scratch")
    cache = XrayCache(tmp_path / "cache", longest_side=45)
    cache.fill(write_images(tmp_path, 3), workers=1)
    packed = cache.pack()
    whole = packed.read_bytes()
    second = whole.index(b"image1.safetensors")
    for damaged, fault in (
        (whole[: second + 600], r"\.tar cannot be read: the archive ends before byte"),
        (whole[: second + 100], r"\.tar cannot be read: no tar header at byte"),
        (whole[:second] + b"\xff" + whole[second + 1 :], r"\.tar cannot be read"),
    ):
        packed.write_bytes(damaged)
        with pytest.raises(CacheError, match=fault):
            XrayCache(tmp_path / "cache", longest_side=45)
    packed.write_bytes(whole[: second + 1500] + b"?!" + whole[second + 1502 :])
    with pytest.raises(CacheError, match=r"image1.safetensors is damaged"):
        XrayCache(tmp_path / "cache", longest_side=45).read("image1")


def test_what_cannot_be_packed_or_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kitlib.xrays.cache, "scratch_root", lambda: tmp_path / "scratch")
    cache = XrayCache(tmp_path / "cache", longest_side=45)
    with pytest.raises(CacheError, match="has no entries to pack"):
        cache.pack()
    cache.packed.parent.mkdir()
    cache.packed.write_bytes(b"half a file")
    with pytest.raises(CacheError, match=r"\.tar cannot be read: no tar header at byte 0"):
        XrayCache(tmp_path / "cache", longest_side=45)


def test_fill_read_resume_and_notice_changes(tmp_path):
    images = write_images(tmp_path, 5)
    (tmp_path / "3.dcm").write_bytes(b"damaged")
    cache = XrayCache(tmp_path / "cache", longest_side=45)
    table = cache.fill(images, workers=1)
    assert table.image_id.tolist() == images.image_id.tolist()
    assert table.status.tolist() == ["decoded", "decoded", "decoded", "failed", "decoded"]
    assert table.reason[3]
    assert "image3" not in cache

    decoded = cache.read("image0")
    assert (decoded.rows, decoded.columns) == (90, 60)
    assert decoded.pixels.shape == (45, 30)
    # Exactly half the size: each pixel is the mean of four, rounded.
    blocks = read_xray(tmp_path / "0.dcm").reshape(45, 2, 30, 2).mean(axis=(1, 3))
    assert np.abs(decoded.pixels - blocks).max() <= 0.5

    write_images(tmp_path, 1, rows=30)  # another image in the place of the first
    again = cache.fill(images, workers=1).set_index("image_id")
    assert again.status.tolist() == ["decoded", "cached", "cached", "failed", "cached"]
    assert ((again.seconds > 0) == (again.status != "cached")).all() and again.seconds.between(0, 60).all()
    failed = again.loc["image3"]
    assert (failed["rows"], failed["columns"], failed["warnings"]) == (0, 0, ())
    assert (again.rows["image1"], again["columns"]["image1"]) == (90, 60)
    assert cache.read("image0").rows == 30

    other = XrayCache(tmp_path / "cache", longest_side=20)
    assert "image1" not in other
    with pytest.raises(KeyError, match="decode it first"):
        other.read("image1")


def test_another_file_of_the_same_size_and_time_is_decoded(tmp_path):
    """Files unpacked from archives may share one time; here only the pixels in the middle of the file differ."""
    images = write_images(tmp_path, 1, 400, 400)
    path = Path(images.path[0])
    cache = XrayCache(tmp_path / "c")
    cache.fill(images, workers=1)
    before, status = path.read_bytes(), path.stat()
    decoded = cache.read("image0").pixels
    middle = len(before) // 2
    path.write_bytes(before[: middle - 50] + bytes(100) + before[middle + 50 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert cache.fill(images, workers=1).status.tolist() == ["decoded"]
    # 100 bytes of 16-bit pixels were changed.
    assert (cache.read("image0").pixels != decoded).sum() in range(45, 52)


def test_a_copy_with_the_same_time_is_reused_and_a_touched_file_is_not(tmp_path):
    images = write_images(tmp_path, 1)
    cache = XrayCache(tmp_path / "c")
    cache.fill(images, workers=1)
    copy = shutil.copy2(images.path[0], tmp_path / "copy.dcm")
    assert cache.fill(images.assign(path=str(copy)), workers=1).status.tolist() == ["cached"]
    os.utime(copy)
    assert cache.fill(images.assign(path=str(copy)), workers=1).status.tolist() == ["decoded"]


def test_a_pipe_in_place_of_a_decoded_file_fails_without_blocking(tmp_path):
    images = write_images(tmp_path, 1)
    cache = XrayCache(tmp_path / "c")
    cache.fill(images, workers=1)
    Path(images.path[0]).unlink()
    os.mkfifo(images.path[0])
    table = cache.fill(images, workers=1)
    assert table.status.tolist() == ["failed"] and table.reason[0] == "not a regular file"


def test_the_same_files_give_the_pixels_of_this_version_of_the_decoder(tmp_path):
    """Integer results on every processor: no sigmoid, no lossy file. Raise DECODING for an intended change."""
    y, x = np.mgrid[:48, :40]
    deep = ((x * 97 + y * 61) % 4096).astype(np.uint16)
    rescale = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
    written = {
        "plain": (deep, ImplicitVRLittleEndian, {"bits_stored": 12}),
        "inverted": (deep, RLELossless, {"bits_stored": 12, "photometric": "MONOCHROME1"}),
        "window": (deep, JPEGLosslessSV1, {"bits_stored": 12, "window": (2000, 1500)}),
        "exact": (deep, JPEGLSLossless, {"window": (2000, 1500), "voi_function": "LINEAR_EXACT"}),
        "big endian": (deep, ExplicitVRBigEndian, {"bits_stored": 12, "window": (2000, 700)}),
        "rescaled": (deep.astype(np.int16) - 900, JPEG2000Lossless, {"window": (100, 3000), "extra": rescale}),
        "bytes": ((deep >> 4).astype(np.uint8), ExplicitVRLittleEndian, {}),
    }
    paths = []
    for name, (stored, syntax, options) in written.items():
        paths.append(str(tmp_path / f"{name}.dcm"))
        write_xray(paths[-1], stored, transfer_syntax=syntax, **options)
    Image.fromarray((deep >> 4).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([(deep >> shift).astype(np.uint8) for shift in (4, 2, 3)])).save(tmp_path / "colour.png")
    paths += [str(tmp_path / "grey.png"), str(tmp_path / "colour.png")]
    cache = XrayCache(tmp_path / "cache", 64)
    table = cache.fill(pd.DataFrame({"image_id": [Path(path).stem for path in paths], "path": paths}), workers=1)
    assert table.reason.tolist() == [""] * len(paths)
    digests = {name: hashlib.sha256(cache.read(name).pixels).hexdigest()[:8] for name in table.image_id}
    assert (DECODING, digests) == (
        4,
        {
            "plain": "f91418a5",
            "inverted": "fe726cb0",
            "window": "8af0f4e0",
            "exact": "5a62aa93",
            "big endian": "cf901714",
            "rescaled": "62313510",
            "bytes": "7ed79fd1",
            "grey": "7ed79fd1",
            "colour": "eb4fe481",
        },
    )
    assert cache.folder.name == f"64px_v{DECODING}"


def test_small_images_are_not_enlarged():
    pixels = RNG.integers(0, 256, (30, 20), dtype=np.uint8)
    assert shrink(pixels, 30) is pixels
    assert shrink(pixels, 15).shape == (15, 10)
    assert shrink(np.zeros((4000, 2), np.uint8), 100).shape == (100, 1)


def test_a_bad_file_costs_one_file(tmp_path, monkeypatch, real_processes):
    monkeypatch.setattr(kitlib.xrays.cache, "decode_into", misbehave)
    outcomes = {outcome.image_id: outcome for outcome in XrayCache(tmp_path / "c").decode(write_images(tmp_path, 7), 1, 5.0)}
    assert len(outcomes) == 7
    for image_id, reason in (("image1", "crashed"), ("image2", "not decoded in 5 s"), ("image3", "memory")):
        assert outcomes[image_id].status == "failed"
        assert reason in outcomes[image_id].reason
    assert [outcomes[f"image{number}"].status for number in (0, 4, 5, 6)] == ["decoded"] * 4


def test_each_file_gets_its_own_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(kitlib.xrays.cache, "decode_into", misbehave)
    limits = iter([60.0, 60.0, 0.5, 60.0, 60.0])
    outcomes = XrayCache(tmp_path / "c").decode(write_images(tmp_path, 5), 1, lambda: next(limits))
    reasons = {outcome.image_id: outcome.reason for outcome in outcomes}
    assert reasons["image2"] == "not decoded in 0.5 s" and next(limits, None) is None


def test_only_a_few_files_are_ahead_of_the_consumer(tmp_path):
    images = write_images(tmp_path, 40, 8, 8)
    cache = XrayCache(tmp_path / "c")
    outcomes = cache.decode(images, workers=1)
    next(outcomes)
    time.sleep(0.5)
    assert 1 <= len(list(cache.folder.glob("*.safetensors"))) <= 3
    outcomes.close()
    time.sleep(0.2)
    assert len(list(cache.folder.glob("*.safetensors"))) <= 3


def test_killed_in_the_middle_it_resumes_from_whole_entries(tmp_path):
    images = write_images(tmp_path, 60, 400, 400)
    images.to_csv(tmp_path / "images.csv", index=False)
    # No `if __name__ == "__main__"`: a worker must not run the script again.
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nimport pandas as pd\nfrom kitlib.xrays.cache import XrayCache\n"
        "for outcome in XrayCache(sys.argv[1]).decode(pd.read_csv(sys.argv[2]), workers=2):\n"
        "    print(outcome.status, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    run = [sys.executable, str(script), str(tmp_path / "c"), str(tmp_path / "images.csv")]
    with subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(7):
            assert process.stdout.readline() == "decoded\n"
        process.kill()
    cache = XrayCache(tmp_path / "c")
    entries = [path.stem for path in cache.folder.glob("[!.]*.safetensors")]
    assert len(entries) >= 7
    for image_id in entries:
        assert cache.read(image_id).pixels.shape == (400, 400)
    counts = cache.fill(images, workers=1).status.value_counts()
    assert counts["cached"] >= len(entries)
    assert counts.sum() == 60


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_entry_is_reported_and_decoded_again(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(kitlib.xrays.cache, "scratch_root", lambda: tmp_path / "scratch")
    images = write_images(tmp_path, 2, 9, 6)
    cache = XrayCache(tmp_path / "c")
    cache.fill(images, workers=1)
    expected = cache.read("image0")
    entry = cache.folder / "image0.safetensors"
    whole = entry.read_bytes()
    # Every single byte: pixels, sizes and the names of the facts.
    for damaged in (whole[:50], b"", *(bytes([*whole[:at], whole[at] ^ 4, *whole[at + 1 :]]) for at in range(len(whole)))):
        entry.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"image0\.safetensors is damaged .*prepare the run again"):
            XrayCache(tmp_path / "c").read("image0")
    if packed:
        cache.pack()
        cache = XrayCache(tmp_path / "c")
        with pytest.raises(CacheError, match="is damaged"):
            cache.read("image0")
    assert cache.fill(images, workers=1).status.tolist() == ["decoded", "cached"]
    np.testing.assert_array_equal(cache.read("image0").pixels, expected.pixels)
    assert cache.read("image0").rows == 9


def test_a_checksum_is_compared_once_by_each_object(tmp_path, monkeypatch):
    compared, checksum = [], zlib.crc32
    cache = XrayCache(tmp_path)
    cache.put(CachedXray("a", np.arange(12, dtype=np.uint8).reshape(3, 4).T, 40, 30))
    monkeypatch.setattr(zlib, "crc32", lambda *arguments: compared.append(1) or checksum(*arguments))
    assert [cache.read("a").pixels.shape for _ in range(3)] == [(4, 3)] * 3
    once = len(compared)
    XrayCache(tmp_path).read("a")
    assert once and len(compared) == 2 * once


def test_an_entry_without_a_checksum_is_damaged(tmp_path):
    images = write_images(tmp_path, 1)
    cache = XrayCache(tmp_path / "c")
    cache.fill(images, workers=1)
    entry = cache.folder / "image0.safetensors"
    pixels, facts = read_entry(entry)
    save_file({"pixels": pixels}, entry, metadata=facts)
    with pytest.raises(CacheError, match="checksum is wrong or missing"):
        XrayCache(tmp_path / "c").read("image0")
    assert cache.fill(images, workers=1).status.tolist() == ["decoded"]


def test_partial_files_are_removed_only_when_their_writer_must_be_dead(tmp_path):
    images = write_images(tmp_path, 1)
    cache = XrayCache(tmp_path / "c")
    cache.folder.mkdir(parents=True)
    young, old = cache.folder / ".x.young.safetensors", cache.folder / ".x.old.safetensors"
    for partial, age in ((young, STALE_SECONDS / 2), (old, 2 * STALE_SECONDS)):
        partial.write_bytes(b"partial")
        os.utime(partial, (time.time() - age,) * 2)
    cache.fill(images, workers=1)
    assert young.is_file() and not old.is_file()


def test_a_full_disk_raises_and_leaves_no_file(tmp_path, monkeypatch):
    (image,) = write_images(tmp_path, 1).to_dict("records")

    def full(self, written):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        decode_into(tmp_path / "c" / "x.safetensors", image["image_id"], image["path"], 10)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path):
    images = write_images(tmp_path, 2)
    (tmp_path / "c").write_text("a file in place of the folder")
    with pytest.raises(CacheError, match="choose a writable folder"):
        XrayCache(tmp_path / "c").fill(images, workers=1)


def test_tables_and_ids_that_are_refused(tmp_path):
    cache = XrayCache(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) path"):
        list(cache.decode(pd.DataFrame({"image_id": ["a"]})))
    with pytest.raises(ValueError, match="occurs twice"):
        list(cache.decode(pd.DataFrame({"image_id": ["a", "a"], "path": ["x", "y"]})))
    assert list(cache.decode(pd.DataFrame({"image_id": [], "path": []}))) == []


@pytest.mark.parametrize("image_id", ["../a", "x" * 201, ".a", ""])
def test_an_id_that_cannot_be_a_file_name_costs_only_its_image(tmp_path, image_id):
    images = write_images(tmp_path, 1)
    images = pd.concat([images.assign(image_id=image_id), images], ignore_index=True)
    table = XrayCache(tmp_path / "c").fill(images, workers=1)
    assert table["status"].tolist() == ["failed", "decoded"]
    assert "cannot be a file name" in table["reason"][0]


def test_a_worker_imports_little():
    """A worker must start in about a second, because workers are replaced all the time."""
    program = "import sys, kitlib.xrays.worker; print([n for n in ('torch', 'pandas', 'matplotlib') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
