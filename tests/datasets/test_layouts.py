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

from kitlib.datasets.base import read_headers
from kitlib.datasets.data_folder import DICOM, IMAGES, PICTURES, DataFolder
from kitlib.datasets.registry import read_dataset
from kitlib.errors import KitError
from kitlib.phantoms.challenges import write_challenge
from kitlib.phantoms.diagnoses import write_diagnoses
from kitlib.phantoms.lungs import write_lungs
from kitlib.phantoms.nih import write_nih
from kitlib.phantoms.siim import write_competition

QUIET = {"workers": 1, "progress": False, "seed": 3}
TABLES = (".csv", ".tsv", ".txt", ".json", ".xlsx")
WRITERS = {
    "siim": lambda folder: write_competition(
        folder, folder / "truth", train_studies=12, test_studies=4, side=32, damaged_test_files=0, **QUIET
    ),
    "nih": lambda folder: write_nih(folder, images=24, side=64, **QUIET),
    "rsna": lambda folder: write_challenge(folder, "rsna-pneumonia", images=12, side=64, **QUIET),
    "vinbigdata": lambda folder: write_challenge(folder, "vinbigdata", images=14, side=128, **QUIET),
    "ranzcr": lambda folder: write_challenge(folder, "ranzcr-clip", images=12, side=32, **QUIET),
    "siim_acr": lambda folder: write_challenge(folder, "siim-acr", images=6, **QUIET),
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
        keys = [name for name in expected.masks if name != "path"]
        assert data.masks[keys].to_numpy().tolist() == expected.masks[keys].to_numpy().tolist()
    # A copy of the whole is told in a few lines, not in a line for each file.
    assert len(expected.faults) <= len(data.faults) <= len(expected.faults) + 4


@pytest.mark.parametrize("name", ["nih", "rsna", "siim", "vinbigdata"])
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


def move(folder: Path, pattern: str, name) -> None:
    for path in sorted(folder.glob(pattern)):
        target = folder / (name(path) if callable(name) else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def as_picture(folder: Path, suffix: str, place, width: int = 0) -> None:
    """Replace every image file by a picture, at `place` of its path, `width` pixels wide."""
    for path in files(folder):
        if "mask" not in str(path.relative_to(folder)) and "scratch" not in path.parts:
            target = folder / place(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not read_headers([str(path)], progress=False)[0].problem or path.suffix == ".IMG":
                cv2.imwrite(str(target.with_suffix(suffix)), np.full((width or 40, width or 40), 90, np.uint8))
            path.unlink()


def nih_224(folder: Path) -> None:
    as_picture(folder, ".png", lambda path: f"images-224/images-224/{path.name}", 224)
    move(folder, "train_val_list.txt", "train_val_list_NIH.txt")
    move(folder, "test_list.txt", "test_list_NIH.txt")
    move(folder, "BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")


def nih_sample(folder: Path) -> None:
    move(folder, "images_*/images/*", lambda path: f"sample/images/{path.name}")
    copy(folder / "sample", folder / "sample" / "sample")
    move(folder, "Data_Entry*", "sample_labels.csv")
    for path in folder.glob("*list*.txt"):
        path.unlink()


def rsna_processed(folder: Path) -> None:
    as_picture(folder, ".png", lambda path: f"Training/Images/{path.name}", 256)
    rows, classes = (
        pd.read_csv(folder / f"stage_2_{name}.csv", dtype=str) for name in ("train_labels", "detailed_class_info")
    )
    rows.merge(classes.drop_duplicates(), on="patientId").to_csv(folder / "stage2_train_metadata.csv", index=False)
    for path in folder.glob("stage_2_*.csv"):
        path.unlink()


def kermany_zhang(folder: Path) -> None:
    move(folder, "chest_xray", "ZhangLabData/CellData/chest_xray")
    for kind in ("NORMAL", "CNV", "DME", "DRUSEN"):
        place = folder / "ZhangLabData" / "CellData" / "OCT" / "train" / kind
        place.mkdir(parents=True)
        for number in range(20):
            cv2.imwrite(str(place / f"{kind}-1234567-{number}.jpeg"), np.zeros((8, 8), np.uint8))


def ricord_pictures(folder: Path) -> None:
    def place(path: Path) -> str:
        patient = next(part for part in path.parts if part.startswith("MIDRC-RICORD-1C-"))
        return f"MIDRC-RICORD/MIDRC-RICORD/{patient}-{'-'.join(path.parts[-3:])}"

    as_picture(folder, ".jpg", place)


def covidx_two_releases(folder: Path) -> None:
    move(folder, "train*.txt", "train_COVIDx9A.txt")
    move(folder, "test*.txt", "test_COVIDx9A.txt")
    for part in ("train", "test"):
        (folder / f"{part}_COVIDx8B.txt").write_text("1 none.png normal rsna\n")
    move(folder, "test", "competition_test")


COPIES = {
    "nih: khanfashee/nih-chest-x-ray-14-224x224-resized": nih_224,
    "nih: nih-chest-xrays/sample": nih_sample,
    "rsna: kaggle-pneumonia-jpg": lambda folder: as_picture(
        folder, ".jpg", lambda path: f"kaggle-pneumonia-jpg/stage_2_train_images_jpg/{path.name}", 512
    ),
    "rsna: rsna-pneumonia-processed-dataset": rsna_processed,
    "jsrt: raddar/nodules-in-chest-xrays-jsrt": lambda folder: (
        shutil.rmtree(folder / "scratch"),
        as_picture(folder, ".png", lambda path: f"images/images/{path.name}", 64),
    ),
    "jsrt: abduzzami/jsrt-247": lambda folder: (
        move(folder, "scratch/*/masks/left lung/*", lambda path: f"content/jsrt/masks/{path.name}"),
        shutil.rmtree(folder / "scratch"),
        as_picture(folder, ".png", lambda path: f"content/jsrt/cxr/{path.name}", 64),
    ),
    "jsrt: left_lungs and right_lungs": lambda folder: move(
        folder, "scratch/*/masks/*/*", lambda path: f"masks/{path.parent.name.replace(' ', '_')}s/{path.name}"
    ),
    "montgomery: raddar": lambda folder: (
        move(folder, "**/CXR_png/*", lambda path: f"images/images/{path.name}"),
        shutil.rmtree(folder / "MontgomerySet"),
    ),
    "darwin: images in data": lambda folder: move(folder, "images", "data"),
    "covid_chestxray: imagename and AP erect": lambda folder: (folder / "metadata.csv").write_text(
        (folder / "metadata.csv").read_text().replace("filename", "imagename").replace(",AP Supine,", ",AP erect,")
    ),
    "kermany: pcbreviglieri/pneumonia-xray-images": lambda folder: (
        move(folder, "chest_xray/*/PNEUMONIA", lambda path: f"{path.parent.name}/opacity"),
        move(folder, "chest_xray/*/NORMAL", lambda path: f"{path.parent.name}/normal"),
    ),
    "kermany: ZhangLabData": kermany_zhang,
    "kermany: coronahack": lambda folder: move(
        folder, "chest_xray/*/*/*", lambda path: f"Coronahack-Chest-XRay-Dataset/{path.parts[-3]}/{path.name}"
    ),
    "covidx: two releases, competition_test": covidx_two_releases,
    "ricord: MIDRC-RICORD-1c-manifest-Jan-2021": lambda folder: move(
        folder, "*", lambda path: f"MIDRC-RICORD-1c-manifest-Jan-2021/midrc_ricord_1c/{path.name}"
    ),
    "ricord: raddar/ricord-covid19-xray-positive-tests": ricord_pictures,
    "bimcv: covid19_posi_dump": lambda folder: (
        shutil.rmtree(folder / "covid19_neg"),
        move(folder, "covid19_posi/**/mod-rx/*", lambda path: f"covid19_posi_dump/{path.name}"),
    ),
}
# Copies that lack a part of the data set: what is then missing.
WITHOUT = {"nih: nih-chest-xrays/sample": "split", "jsrt: raddar": "masks", "montgomery: raddar": "masks"}


@pytest.mark.parametrize("name", COPIES)
def test_popular_copies_on_kaggle_are_read(sets, tmp_path, name):
    """Their layouts are those of the data sets that the names give; the images are ours."""
    layout = name.partition(":")[0]
    folder, expected = sets[layout]
    copied = copy(folder, tmp_path / "copy")
    COPIES[name](copied)
    data = read_dataset(layout, copied, progress=False)
    lacks = next((part for copied_name, part in WITHOUT.items() if name.startswith(copied_name)), "")
    is_wanted = expected.images.image_id.map(lambda image_id: True)
    if name.endswith("posi_dump"):
        is_wanted = expected.images.diagnosis == "COVID-19"
    wanted = expected.images[is_wanted].reset_index(drop=True)
    for column in ("patient_id", "diagnosis", "split"):
        if column in wanted and column != lacks:
            assert data.images[column].tolist() == wanted[column].tolist()
    assert len(data.images) == len(wanted) and len(data.boxes) == len(expected.boxes)
    pd.testing.assert_frame_equal(
        data.labels.drop(columns="id"), expected.labels.drop(columns="id")[is_wanted.to_numpy()].reset_index(drop=True)
    )
    assert (data.masks is None) == (expected.masks is None or lacks == "masks")
    if data.masks is not None:
        assert set(data.masks.image_id) == set(expected.masks.image_id)


def test_masks_of_another_input_are_found_beside(sets, tmp_path):
    """As Shenzhen's images, in one data set on Kaggle, and its masks, in another."""
    folder, expected = sets["shenzhen"]
    images, masks = copy(folder, tmp_path / "images"), tmp_path / "shcxr-lung-mask"
    for path in images.rglob("*_mask.png"):
        (masks / "mask" / "mask").mkdir(parents=True, exist_ok=True)
        path.rename(masks / "mask" / "mask" / path.name)
    assert read_dataset("shenzhen", images, progress=False).masks is None
    data = read_dataset("shenzhen", DataFolder(images, [masks]), progress=False)
    assert data.masks.image_id.tolist() == expected.masks.image_id.tolist()


def test_a_class_that_is_published_and_lost_is_an_error(tmp_path):
    """60 images of Kermany's would have about 28 bacterial pneumonias; whoever selected the normal ones is only told so."""
    for number in range(60):
        path = tmp_path / "train" / "NORMAL" / f"IM-{number:04d}-0001.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((8, 8), np.uint8))
    faults = read_dataset("kermany", tmp_path, progress=False).faults
    assert faults["row"].tolist() == ["bacterial"] and faults.problem[0].startswith("none of the 60 images has this class")
    copy(tmp_path / "train" / "NORMAL", tmp_path / "train" / "bacteria")
    with pytest.raises(
        KitError, match=r"Class 'bacterial': none of the 60 images .*, and 50% of the image files are not used"
    ):
        read_dataset("kermany", tmp_path, progress=False)


def test_a_set_in_a_published_layout_keeps_its_own_name_and_patients(sets):
    folder, expected = sets["nih"]
    data = read_dataset("nih", folder, progress=False, source="hospital")
    assert set(data.images.source) == {"hospital"} and data.published == {}
    assert data.images.patient_id.tolist() == ("hospital-" + expected.images.patient_id).tolist()


def test_a_file_is_not_given_to_two_rows_that_differ_in_its_suffix(tmp_path):
    """a.jpg is missing: its row must not get a.png, which is another patient's."""
    rows = ["patientid,finding,view,modality,filename", "1,No Finding,PA,X-ray,a.jpg", "2,COVID-19,PA,X-ray,a.png"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((8, 8), np.uint8))
    images = read_dataset("covid_chestxray", tmp_path, progress=False).images
    assert images[["patient_id", "diagnosis"]].to_numpy().tolist() == [["ieee-2", "COVID-19"]]


def test_a_word_within_a_folders_name_does_not_make_its_images_test_images(sets, tmp_path):
    folder, expected = sets["rsna"]
    copied = copy(folder, tmp_path / "latest")
    move(copied, "stage_2_train_images", "contest")
    assert read_dataset("rsna", copied, progress=False).images.image_id.tolist() == expected.images.image_id.tolist()
    first = files(copied)[0]
    (copied / "stage_2_test_images").mkdir()
    first.rename(copied / "stage_2_test_images" / first.name)
    data = read_dataset("rsna", copied, progress=False)
    assert len(data.images) == len(expected.images) - 1
    assert data.faults["row"][data.faults.problem.str.contains("lie in a folder of test images")].tolist() == [first.stem]


def test_files_of_one_name_in_two_folders_are_counted(sets, tmp_path):
    folder, expected = sets["ricord"]
    copy(folder, tmp_path / "a")
    copy(folder, tmp_path / "b")
    data = read_dataset("ricord", tmp_path, progress=False)
    assert len(data.images) == len(expected.images)
    assert data.faults.problem.str.contains("have the patient, folders and name of another file; left out").sum() == 1


def test_links_to_nowhere_are_counted(sets, tmp_path):
    folder, expected = sets["nih"]
    copied = copy(folder, tmp_path / "nih")
    first = files(copied)[0]
    first.unlink()
    first.symlink_to("/nonexistent/" + first.name)
    data = read_dataset("nih", copied, progress=False)
    assert set(expected.images.image_id) - set(data.images.image_id) == {first.stem}
    assert "and 0 others are links to files that do not exist; left out" in data.faults.problem.tolist()


def test_the_organisers_name_of_a_table_comes_before_a_renamed_copy(sets, tmp_path):
    folder, expected = sets["nih"]
    copied = copy(folder, tmp_path / "nih")
    (copied / "Data_Entry_2017_v2020_backup.csv").write_text("a,b\n")
    assert len(read_dataset("nih", copied, progress=False).images) == len(expected.images)
    (copied / "Data_Entry_2017_v2020.csv").rename(copied / "Data_Entry_2017_v2020 (1).csv")
    with pytest.raises(KitError, match=r"several files Data_Entry_2017_v2020\*\.csv that differ: .*; keep one of them"):
        read_dataset("nih", copied, progress=False)
