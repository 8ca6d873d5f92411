"""Every reader on copies of its data set as they lie on Kaggle: wrapped, doubled, linked, split, resized, damaged."""

import os
import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitlib.datasets.data_folder import DICOM, IMAGES, PICTURES, DataFolder
from kitlib.datasets.registry import read_dataset
from kitlib.errors import KitError
from kitlib.phantoms.diagnoses import write_diagnoses
from kitlib.phantoms.lungs import write_lungs
from kitlib.phantoms.nih import write_nih
from kitlib.phantoms.rsna import write_rsna
from kitlib.phantoms.siim import write_competition

QUIET = {"workers": 1, "progress": False, "seed": 3}
TABLES = (".csv", ".tsv", ".txt", ".json", ".xlsx")
WRITERS = {
    "siim": lambda folder: write_competition(
        folder, folder / "truth", train_studies=12, test_studies=4, side=32, damaged_test_files=0, **QUIET
    ),
    "nih": lambda folder: write_nih(folder, images=24, side=64, **QUIET),
    "rsna": lambda folder: write_rsna(folder, images=12, side=64, **QUIET),
    "jsrt": lambda folder: write_lungs(folder, "jsrt", images=2, side=64, **QUIET),
    "montgomery": lambda folder: write_lungs(folder, "montgomery", images=6, side=64, **QUIET),
    "shenzhen": lambda folder: write_lungs(folder, "shenzhen", images=6, side=64, **QUIET),
    "darwin": lambda folder: write_lungs(folder, "darwin", images=4, side=320, **QUIET),
    **{
        name: lambda folder, name=name: write_diagnoses(folder, name, images=24, side=32, **QUIET)
        for name in ("covid_chestxray", "kermany", "covidx", "covidgr", "ricord", "bimcv")
    },
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return layout -> (folder, Dataset) of each set as its authors publish it."""
    folders = {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}
    return {name: (folder, read_dataset(name, folder, progress=False)) for name, folder in folders.items()}


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def files(folder: Path, suffixes=IMAGES) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in suffixes)


def add_junk(folder: Path, target: Path) -> DataFolder:
    """What macOS, Windows and archives add: the same names with other contents, in hidden or known places."""
    for path in files(folder, (*IMAGES, *TABLES)):
        place = target / "__MACOSX" / path.relative_to(folder).with_name(f"._{path.name}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"\0\5\x16\7")
        (target / "__MACOSX" / path.relative_to(folder)).write_bytes(b"\0\5\x16\7")
    copied = copy(folder, target / folder.name)
    for path in [copied, *(path for path in copied.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "._table.tsv", "desktop.ini"):
            (path / name).write_bytes(b"\0\xff\xfe")
    return DataFolder(target)


def double(folder: Path, target: Path) -> DataFolder:
    copy(folder, target / folder.name)
    copy(folder, target / folder.name / "again" / folder.name)
    return DataFolder(target)


def rename_suffixes(folder: Path, target: Path) -> DataFolder:
    copied = copy(folder, target / folder.name)
    for path in files(copied):
        path.rename(path.with_suffix(path.suffix.upper()))
    return DataFolder(copied)


def link(folder: Path, target: Path) -> DataFolder:
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    return DataFolder(target)


def split(folder: Path, target: Path) -> DataFolder:
    """Images in one input, tables in another."""
    images, tables = copy(folder, target / "images" / folder.name), copy(folder, target / "tables" / folder.name)
    for path in files(images, TABLES):
        path.unlink()
    for path in files(tables):
        path.unlink()
    return DataFolder(images, [tables])


LAYOUTS = {
    "in a folder": lambda folder, target: DataFolder(copy(folder, target / "archive" / folder.name).parent),
    "with junk": add_junk,
    "twice": double,
    "suffixes in capitals": rename_suffixes,
    "links": link,
    "tables beside": split,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_another_layout_is_the_same_data_set(sets, tmp_path, name, layout):
    folder, expected = sets[name]
    data = read_dataset(name, LAYOUTS[layout](folder, tmp_path), progress=False)
    for table in ("images", "labels", "boxes"):
        found, wanted = getattr(data, table), getattr(expected, table)
        pd.testing.assert_frame_equal(
            found.drop(columns="path", errors="ignore"), wanted.drop(columns="path", errors="ignore")
        )
    if expected.masks is not None:
        keys = ["image_id", "structure"]
        assert data.masks[keys].to_numpy().tolist() == expected.masks[keys].to_numpy().tolist()
    # A copy of the whole is told in a few lines, not in a line for each file.
    assert len(expected.faults) <= len(data.faults) <= len(expected.faults) + 4


@pytest.mark.parametrize("name", ["nih", "rsna", "siim"])
def test_boxes_follow_resized_images(sets, tmp_path, name):
    """The tables of the published sets are in pixels of the original images, whatever the size of the copies."""
    folder, expected = sets[name]
    copied = copy(folder, tmp_path / name)
    sizes = ["image_id,dim0,dim1"]
    for row in expected.images.itertuples():
        path = copied / Path(row.path).relative_to(folder)
        sizes.append(f"{row.image_id},{row.rows},{row.columns}")
        path.unlink()
        cv2.imwrite(str(path.with_suffix(".png")), np.zeros((row.rows // 2, row.columns // 4), np.uint8))
    (copied / "meta.csv").write_text("\n".join(sizes))
    data = read_dataset(name, copied, progress=False)
    assert data.images.image_id.tolist() == expected.images.image_id.tolist()
    assert len(expected.boxes) >= 2
    original = expected.images.set_index("image_id").loc[expected.boxes.image_id]
    for side, size, divisor in (("x", "columns", 4), ("y", "rows", 2)):
        scale = (original[size] // divisor / original[size]).to_numpy()
        for end in ("min", "max"):
            np.testing.assert_allclose(data.boxes[side + end], expected.boxes[side + end] * scale)


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_folder_and_one_of_another_set_are_errors_that_say_what_there_is(sets, tmp_path, name):
    (tmp_path / "empty").mkdir()
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.zeros((8, 8), np.uint8))
    for folder in (tmp_path / "empty", tmp_path):
        with pytest.raises(KitError, match=r"inputs/README\.md"):
            read_dataset(name, folder, progress=False)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", WRITERS)
def test_of_a_damaged_copy_nothing_is_misread_or_lost_silently(sets, tmp_path_factory, name, seed):
    """Files removed, emptied, moved or renamed: an error of the kit, or the right labels for what is left, and faults."""
    folder, expected = sets[name]
    copied = copy(folder, tmp_path_factory.mktemp("damaged") / folder.name)
    chance = random.Random(seed)
    every = files(copied, (*IMAGES, *TABLES))
    for path in chance.sample(every, chance.choice([1, 2, len(every) // 3])):
        kind = chance.choice(["remove", "empty", "garbage", "move", "rename"])
        content = path.read_bytes()
        path.unlink()
        if kind in ("empty", "garbage"):
            path.write_bytes(b"" if kind == "empty" else chance.randbytes(99))
        elif kind != "remove":
            place = copied / "extra" / path.name if kind == "move" else path.with_name(f"renamed{path.name}")
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
    try:
        data = read_dataset(name, copied, progress=False)
    except KitError:
        return
    finally:
        left = files(copied, (*DICOM, *PICTURES, ".img"))
        masks = {path for path in left if "mask" in str(path.relative_to(copied)).lower() or "lung" in path.parent.name}
        shutil.rmtree(copied)
    wanted = expected.labels.set_index("id")
    labels = data.labels[data.labels.id.isin(wanted.index)].set_index("id")  # a renamed file is another image
    wanted = wanted.loc[labels.index, list(labels)]
    # A lost table may make a label unknown (NaN), but never another one.
    assert ((labels == wanted) | labels.isna()).all(axis=None)
    used = set(data.images.path) | set(() if data.masks is None else data.masks.path)
    unused = [path for path in left if str(path) not in used and path not in masks and "test" not in path.parts]
    assert not unused or len(data.faults), unused[:3]
