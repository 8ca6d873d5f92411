"""The mask store: label images of any size, several files and folders, interruptions, damage, other processes."""

import hashlib
import pickle
import tracemalloc

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kitlib.classes import MASK_CODES
from kitlib.errors import MaskError
from kitlib.xrays import mask_store
from kitlib.xrays.mask_store import SCHEMA, MaskStore


def label_image(seed, rows=31, columns=17):
    return np.random.default_rng(seed).integers(0, len(MASK_CODES) + 1, (rows, columns)).astype(np.uint8)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 999))
def test_label_images_of_any_size_are_read_as_written(tmp_path_factory, rows, columns, seed):
    folder = tmp_path_factory.mktemp("masks")
    codes = label_image(seed, rows, columns)
    store = MaskStore(folder)
    # Views with other memory layouts, too.
    store.add({"plain": codes, "turned": codes.T, "mirrored": codes[:, ::-1], "every other": codes[::2]})
    for read_store in (store, MaskStore(folder)):
        assert read_store.ids == ["plain", "turned", "mirrored", "every other"] and len(read_store) == 4
        assert read_store.read("plain").dtype == np.uint8 and np.array_equal(read_store.read("plain"), codes)
        assert np.array_equal(read_store.read("turned"), codes.T) and np.array_equal(
            read_store.read("every other"), codes[::2]
        )
        assert np.array_equal(read_store.read("mirrored"), codes[:, ::-1])


def test_parts_and_folders_are_one_store(tmp_path):
    for fold in range(2):
        store = MaskStore(tmp_path / str(fold))
        for part in range(3):
            store.add({f"{fold}-{part}-{number}": label_image(100 * fold + 10 * part + number) for number in range(2)})
    store.add({})
    assert [path.name for path in sorted((tmp_path / "1").iterdir())] == [f"part-0000{part}.arrow" for part in range(3)]
    both = MaskStore(tmp_path / "0", tmp_path / "1")
    assert sorted(both.ids) == [f"{fold}-{part}-{number}" for fold in (0, 1) for part in range(3) for number in (0, 1)]
    assert np.array_equal(both.read("1-2-1"), label_image(121)) and "0-0-0" in both and "2-0-0" not in both
    both.add({"new": label_image(7)})
    assert "new" in MaskStore(tmp_path / "0") and "new" not in MaskStore(tmp_path / "1")
    with pytest.raises(KeyError, match=r"no mask for image '2-0-0' in .*, which has 13 masks"):
        both.read("2-0-0")
    assert len(MaskStore(tmp_path / "nowhere")) == 0 and not (tmp_path / "nowhere").exists()
    assert len(MaskStore.create_empty(tmp_path / "1")) == 0 and not (tmp_path / "1").exists()


def test_an_interrupted_add_leaves_no_file_and_can_be_repeated(tmp_path, monkeypatch):
    store = MaskStore(tmp_path)
    store.add({"a": label_image(0)})

    def broken(*_):
        class Writer:
            def __enter__(self):
                return self

            def write_table(self, table):
                raise OSError("no space left")

            def __exit__(self, *_):
                return False

        return Writer()

    monkeypatch.setattr(mask_store.pa.ipc, "new_file", broken)
    with pytest.raises(OSError, match="no space left"):
        store.add({"b": label_image(1)})
    monkeypatch.undo()
    assert "b" not in store and [path.name for path in tmp_path.iterdir()] == ["part-00000.arrow"]
    again = MaskStore(tmp_path)
    again.add({"b": label_image(1)})
    assert np.array_equal(MaskStore(tmp_path).read("b"), label_image(1))


def test_an_existing_mask_is_not_replaced_and_the_whole_call_is_refused(tmp_path):
    store = MaskStore(tmp_path)
    store.add({"a": label_image(0)})
    with pytest.raises(ValueError, match="already has masks for 1 images; the first is 'a'"):
        store.add({"b": label_image(1), "a": label_image(2)})
    assert MaskStore(tmp_path).ids == ["a"] and np.array_equal(store.read("a"), label_image(0))


@pytest.mark.parametrize(
    "codes",
    [np.full((3, 3), 255), np.full((3, 3), -1), np.zeros((3, 3, 3)), np.zeros((0, 3)), np.zeros(3)],
    ids=["0 and 255", "negative", "colours", "no pixel", "one row"],
)
def test_an_array_that_is_not_a_label_image_is_refused(tmp_path, codes):
    with pytest.raises(
        ValueError, match=r"mask for image 'a' is not a label image; expected \(rows, columns\) of codes .*'heart': 2.*got"
    ):
        MaskStore(tmp_path).add({"a": codes})
    assert list(tmp_path.iterdir()) == []


def write(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-9], lambda whole: b"no more " * 99],
    ids=["empty", "half", "its end", "text"],
)
def test_a_damaged_file_is_named_with_the_folder_to_delete(tmp_path, damage):
    MaskStore(tmp_path / "one").add({"a": label_image(0)})
    MaskStore(tmp_path / "two").add({"b": label_image(1)})
    part = tmp_path / "two" / "part-00000.arrow"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(MaskError, match=f"{part} is not a mask file .*; delete {part.parent} and create the masks again"):
        MaskStore(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("columns", "described"), [({"id": ["a"]}, "id string"), ({"image_id": ["a"], "png": [3]}, "image_id string, png int64")]
)
def test_a_file_with_other_columns_is_described(tmp_path, columns, described):
    write(tmp_path / "part-00000.arrow", pa.table(columns))
    with pytest.raises(MaskError, match=rf"part-00000\.arrow is not a mask file \(its columns are {described}\)"):
        MaskStore(tmp_path)


def png(codes):
    return cv2.imencode(".png", codes)[1].tobytes()


@pytest.mark.parametrize(
    "bytes_of",
    [
        lambda codes: None,
        lambda codes: b"",
        lambda codes: png(codes)[: len(png(codes)) // 2],
        lambda codes: bytes(len(png(codes))),
        lambda codes: png(codes.astype(np.uint16)),
        lambda codes: png(np.stack([codes] * 3, axis=2)),
    ],
    ids=["none", "empty", "half", "zeros", "16 bits", "colours"],
)
def test_a_damaged_mask_is_named_and_the_others_are_read(tmp_path, bytes_of):
    codes = label_image(0)
    MaskStore(tmp_path / "one").add({"a": codes})
    (tmp_path / "two").mkdir()
    part = tmp_path / "two" / "part-00000.arrow"
    write(part, pa.table({"image_id": ["b", "c"], "png": [bytes_of(codes), png(codes)]}, schema=SCHEMA))
    store = MaskStore(tmp_path / "one", tmp_path / "two")
    with pytest.raises(MaskError, match=f"{part}: the mask for image 'b' is damaged; delete {part.parent} and create"):
        store.read("b")
    assert np.array_equal(store.read("a"), codes) and np.array_equal(store.read("c"), codes)


def test_the_fingerprint_depends_on_masks_and_ids_and_not_on_files(tmp_path):
    drawn = {f"i{number}": label_image(number) for number in range(4)}
    together, apart = MaskStore(tmp_path / "together"), MaskStore(tmp_path / "apart")
    together.add(drawn)
    for image_id in reversed(drawn):
        apart.add({image_id: drawn[image_id]})
    expected = together.fingerprint()
    assert len(expected) == 64 and apart.fingerprint() == expected
    changed = drawn["i2"].copy()
    changed[3, 4] = (changed[3, 4] + 1) % 5
    others = [drawn | {"i2": changed}, {name: drawn[name] for name in ("i0", "i1", "i2")}]
    others += [{f"{name}x": codes for name, codes in drawn.items()}, {}]
    fingerprints = []
    for number, masks in enumerate(others):
        other = MaskStore(tmp_path / f"other{number}")
        other.add(masks)
        fingerprints.append(other.fingerprint())
    assert len({expected, *fingerprints}) == 5


def test_the_fingerprint_is_the_digest_of_ids_and_files_in_the_order_of_the_ids(tmp_path):
    png = {name: cv2.imencode(".png", label_image(number))[1].tobytes() for number, name in enumerate(("b", "c", "a"))}
    store = MaskStore(tmp_path)
    store.add({name: label_image(number) for number, name in enumerate(png)})
    content = b"".join(name.encode() + hashlib.sha256(png[name]).digest() for name in ("a", "b", "c"))
    assert store.fingerprint() == hashlib.sha256(content).hexdigest()


class Sums:
    """A torch data set that reads masks in any process."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return int(self.store.read(f"i{index}").astype(int).sum())


def test_other_processes_read_the_same_masks(tmp_path):
    store = MaskStore(tmp_path)
    store.add({f"i{number}": label_image(number) for number in range(6)})
    sums = [int(label_image(number).astype(int).sum()) for number in range(6)]
    forked = DataLoader(Sums(store), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [int(value) for value in forked] == sums
    # A spawned process gets the pickled store.
    sent = Sums(pickle.loads(pickle.dumps(store)))
    assert [sent[index] for index in range(6)] == sums


def test_masks_are_memory_mapped_and_not_read_or_copied_as_a_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 5, (600, 1000)).astype(np.uint8)
    store = MaskStore(tmp_path)
    store.add({f"i{number}": np.roll(noise, number, axis=0) for number in range(20)})
    on_disk = sum(part.stat().st_size for part in tmp_path.iterdir())
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    again = MaskStore(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(again.read("i7"), np.roll(noise, 7, axis=0))
    assert on_disk > 3_000_000 and max(peak, pa.total_allocated_bytes() - before) < on_disk / 20
    # Only the folders' names are pickled, no masks.
    assert len(pickle.dumps(again)) < 1000
