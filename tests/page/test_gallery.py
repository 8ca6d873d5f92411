"""The gallery of a prepared run: pages, thumbnails, whole studies, and runs with missing or changed files."""

import os

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.bundle import data_fingerprint
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import RunError, UnreadableXray
from kitlib.leaderboard.listing import list_runs
from kitlib.page.gallery import Gallery, find_gallery
from kitlib.page.opened_study import DecodedCopies
from kitlib.xrays.cache import CachedXray, XrayCache
from kitlib.xrays.writing import write_xray
from tests.small_runs import prepare, study_scores, tables_of, train
from tests.small_xrays import BOX, COLUMNS, ROWS, SmallXrays


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    copies = DecodedCopies(tmp_path_factory.mktemp("copies"))
    yield copies
    copies.close()


def make_run(folder, small=None, dataset="siim", **changed):
    """Write a prepared run with the tables of `small`, replaced by those in `changed`, and decoded copies of all images."""
    small = small or SmallXrays(16)
    cache = XrayCache(folder / "xrays", small.longest_side)
    for image_id in small.image_ids:
        cache.put(small.read(image_id))
    return prepare(folder, {**tables_of(small), **changed}, dataset=dataset)


def captions(gallery, choice):
    pages = gallery.page(choice, 1)[1]
    return [caption for number in range(1, pages + 1) for _, caption in gallery.page(choice, number)[0]]


def test_pages_show_every_image_of_a_choice_once(tmp_path, copies):
    gallery = Gallery(make_run(tmp_path), copies, page_size=5)
    assert gallery.choices() == ["all", *STUDY_CLASSES] and gallery.longest_side == 50
    assert gallery.name == tmp_path.name
    shown = captions(gallery, "all")
    # 16 images, two per study; the studies have the four classes in turn; all but the negative ones have one box.
    assert sorted(caption.split(", ")[-1] for caption in shown) == [f"image{n:03d}" for n in range(16)]
    assert gallery.page("all", 1)[1] == 4 and len(gallery.page("all", 4)[0]) == 1
    assert sorted(captions(gallery, "typical")) == [f"typical, 1 box, image{n:03d}" for n in (2, 3, 10, 11)]
    assert "negative, no box, image000" in shown


def test_images_are_mixed_and_always_in_the_same_order(tmp_path, copies):
    small = SmallXrays(64)
    by_class = small.images.sort_values("study_id", key=lambda ids: ids.str[5:].astype(int) % 4)
    shown = captions(Gallery(make_run(tmp_path / "sorted", small, images=by_class), copies), "all")
    assert shown == captions(Gallery(make_run(tmp_path / "turned", small, images=by_class[::-1]), copies), "all")
    assert {caption.split(", ")[0] for caption in shown[:12]} == set(STUDY_CLASSES)


def test_thumbnails_are_small_keep_their_shape_and_are_kept(tmp_path, copies):
    small = SmallXrays(4)
    small.pixels["image001"] = np.tile(np.array([[50, 150]], np.uint8), (400, 150))
    gallery = Gallery(make_run(tmp_path, small), copies)
    tiles = {caption.split(", ")[-1]: tile for tile, caption in gallery.page("all", 1)[0]}
    # 400 x 300 shrunk to 160 x 120: each pixel is the mean of 2.5 columns, which are 50 and 150 in turn.
    assert tiles["image001"].shape == (160, 120) and tiles["image001"].dtype == np.uint8
    assert abs(tiles["image001"].mean() - 100) < 0.5 and np.ptp(tiles["image001"].astype(int)) <= 20
    assert (tiles["image002"] == small.pixels["image002"]).all()
    for copy in (tmp_path / "xrays").rglob("*.safetensors"):
        copy.unlink()
    again = {caption: tile for tile, caption in gallery.page("all", 1)[0]}
    assert (again["typical, 1 box, image002"] == small.pixels["image002"]).all()


def test_an_image_without_a_copy_is_a_grey_tile(tmp_path, copies):
    run = make_run(tmp_path)
    folder = XrayCache(run / "xrays", 50).folder
    (folder / "image003.safetensors").unlink()
    (folder / "image004.safetensors").write_bytes(b"damaged")
    gallery = Gallery(run, copies, page_size=16)
    grey = {caption: tile for tile, caption in gallery.page("all", 1)[0] if "no decoded copy" in caption}
    assert set(grey) == {"typical, 1 box, no decoded copy, image003", "indeterminate, 1 box, no decoded copy, image004"}
    assert all((tile == 128).all() and tile.shape == (160, 160) for tile in grey.values())
    with pytest.raises(UnreadableXray, match=r"is damaged .*to decode it again"):
        gallery.open("image004")
    study = gallery.open("image002")
    assert [image.image_id for image in study.images] == ["image002"]
    assert "image003 of this study is left out" in study.remarks[0]
    with pytest.raises(UnreadableXray):
        gallery.open("image003")


def test_the_whole_study_opens_with_class_fold_and_boxes(tmp_path, copies):
    small = SmallXrays(16)
    run = make_run(tmp_path, small, images=small.images.assign(rows=0, columns=0))
    gallery = Gallery(run, copies)
    study = gallery.open("image011")
    assert study.study_id == "study005" and study.true_classes == ("typical",) and study.fold == 1
    assert study.trained_on == gallery.fingerprint == data_fingerprint(**tables_of(small))
    assert [image.image_id for image in study.images] == ["image011", "image010"]
    assert [(image.rows, image.columns) for image in study.images] == [(ROWS, COLUMNS)] * 2
    assert study.images[0].truth.to_numpy().tolist() == [["opacity", *BOX]] and study.remarks == ()
    assert (study.read(study.images[0], 50).pixels == small.pixels["image011"]).all()
    assert gallery.open("image001").images[0].truth.to_numpy().shape == (0, 5)
    assert gallery.open("image015").images[0].image_id == "image015"
    assert "patient" not in repr(study.images) and "patient" not in repr(study.remarks)


def test_an_image_without_annotations_has_no_truth(tmp_path, copies):
    small = SmallXrays(16)
    unseen = small.images["image_id"] == "image003"
    run = make_run(
        tmp_path,
        small,
        images=small.images.assign(false_none=unseen),
        boxes=small.boxes[small.boxes["image_id"] != "image003"],
        folds=small.fold_table[~unseen],
    )
    gallery = Gallery(run, copies)
    assert "typical, image003" in captions(gallery, "all")
    study = gallery.open("image003")
    assert [image.truth is None for image in study.images] == [True, False] and study.fold == 0
    assert "No boxes were annotated" in " ".join(study.images[0].remarks)
    elsewhere = Gallery(make_run(tmp_path / "nih", dataset="nih"), copies)
    assert elsewhere.open("image003").images[0].truth is None


def test_only_images_whose_patient_is_in_no_fold_have_none(tmp_path, copies):
    small = SmallXrays(16)
    put_aside = small.images["patient_id"] == "patient001"  # images 4 to 7
    unlearnt = put_aside | (small.images["study_id"] == "study007")  # images 14 and 15, whose patient also has 12 and 13
    images = small.images.assign(split=np.where(put_aside, "test", "train"))
    gallery = Gallery(make_run(tmp_path, small, images=images, folds=small.fold_table[~unlearnt]), copies)
    assert gallery.choices()[-1] == "test"
    assert {caption.split(", ")[-1] for caption in captions(gallery, "test")} == {f"image00{n}" for n in (4, 5, 6, 7)}
    assert gallery.open("image005").fold is None
    assert gallery.open("image014").fold == 1


def test_a_study_in_two_folds_says_so(tmp_path, copies):
    small = SmallXrays(16)
    images = small.images.assign(patient_id=small.images["image_id"])
    run = make_run(tmp_path, small, images=images, folds=small.fold_table.assign(fold=np.arange(16) % 2))
    study = Gallery(run, copies).open("image003")
    assert study.fold == 1 and "several folds" in study.remarks[0]


def test_classes_of_other_data_sets_and_several_findings_are_shown(tmp_path, copies):
    small = SmallXrays(4)
    labels = small.labels.rename(columns=dict(zip(STUDY_CLASSES, "ABCD", strict=True)))
    labels.loc[labels["id"] == small.images.study_id[2], ["A", "C"]] = 1.0
    gallery = Gallery(make_run(tmp_path, small, labels=labels, dataset="rsna"), copies)
    study = gallery.open("image002")
    assert {"A", "C"} <= set(study.true_classes) and study.true_classes == tuple(sorted(study.true_classes))
    assert gallery.choices() == ["all", *(name for name in "ABCD" if labels[name].any())]
    for name in study.true_classes:
        assert "image002" in [caption.rpartition(", ")[2] for _, caption in gallery.page(name, 1)[0]]
    assert study.images[0].truth.to_numpy().tolist() == [["opacity", *BOX]]


def test_boxes_of_several_findings_are_counted_by_name(tmp_path, copies):
    small = SmallXrays(8)
    more = small.boxes[small.boxes["image_id"] == "image002"].assign(finding="mass")
    boxes = pd.concat([small.boxes.assign(finding="typical"), more, more])
    gallery = Gallery(make_run(tmp_path, small, dataset="vinbigdata", boxes=boxes), copies)
    assert gallery.choices() == ["all", *STUDY_CLASSES, "mass"] and gallery.findings == ("mass", "typical")
    assert captions(gallery, "mass") == ["2 mass, 1 typical, image002"]
    assert "negative, no box, image000" in captions(gallery, "all")
    study = gallery.open("image002")
    assert study.findings == gallery.findings
    assert sorted(study.images[0].truth.to_numpy().tolist()) == [["mass", *BOX], ["mass", *BOX], ["typical", *BOX]]


def test_files_are_used_if_they_are_the_ones_that_were_decoded(tmp_path, copies):
    small = SmallXrays(6)
    stored = {name: cv2.resize(pixels, (COLUMNS, ROWS)) for name, pixels in small.pixels.items()}
    paths = {name: tmp_path / f"{name}.{'png' if name == 'image001' else 'dcm'}" for name in stored}
    for name, path in paths.items():
        if path.suffix == ".png":
            cv2.imwrite(str(path), stored[name])
        else:
            write_xray(path, stored[name], transfer_syntax=ExplicitVRLittleEndian, patient_id="SECRET")
    images = small.images.assign(path=[str(paths[name]) for name in small.image_ids])
    run = prepare(tmp_path / "run", {**tables_of(small), "images": images}, dataset="siim")
    cache = XrayCache(run / "xrays", 50)
    for name, path in list(paths.items())[:5]:  # the last one is decoded on request
        copies.decode(name, path, 50)
        made = XrayCache(copies.folder, 50).folder / f"{name}.safetensors"
        cache.folder.mkdir(parents=True, exist_ok=True)
        made.rename(cache.folder / made.name)
    os.utime(paths["image002"], (0, 0))  # moving a file may change its time
    paths["image003"].write_bytes(paths["image000"].read_bytes())
    paths["image004"].unlink()
    gallery = Gallery(run, copies)
    found = {name: gallery.open(name).images[0] for name in stored}
    assert [found[name].is_dicom for name in sorted(found)] == [True, False, True, False, False, True]
    assert found["image000"].facts == {
        "Format": "DICOM",
        "Modality": "DX",
        "View": "PA",
        "Body part": "CHEST",
        "Photometric interpretation": "MONOCHROME2",
        "Bits": "8",
        "Size": "80 x 100 (rows x columns)",
        "Transfer syntax": "Explicit VR Little Endian",
    }
    assert found["image002"].remarks == () and found["image000"].path == paths["image000"]
    assert "has changed" in found["image003"].remarks[0] and not found["image003"].path.exists()
    assert "was not found" in found["image004"].remarks[0] and found["image004"].facts == {
        "Size": "80 x 100 (rows x columns)"
    }
    study = gallery.open("image003")
    with pytest.raises(UnreadableXray, match="changed since it was decoded"):
        study.read(study.images[0], 40)  # at another size than the run's copies the file is needed
    assert study.read(study.images[1], 40).pixels.shape == (32, 40)
    assert (found["image005"].rows, found["image005"].columns) == (ROWS, COLUMNS)
    assert "SECRET" not in repr(found)


def test_an_unknown_choice_page_or_image_is_refused(tmp_path, copies):
    gallery = Gallery(make_run(tmp_path), copies)
    with pytest.raises(ValueError, match="choice 'test' does not exist; choices: all, negative"):
        gallery.page("test", 1)
    for number in (0, 3):
        with pytest.raises(ValueError, match="has pages 1 to 2"):
            gallery.page("all", number)
    for image_id in ("", "image016"):
        with pytest.raises(ValueError, match=f"image '{image_id}' does not exist in"):
            gallery.open(image_id)
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        Gallery(tmp_path / "nothing", copies)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(RunError, match="is not a run of notebook 10"):
        Gallery(tmp_path, copies)


def test_a_gallery_is_found_by_what_models_were_trained_on(tmp_path, copies):
    small, other = SmallXrays(8), SmallXrays(16)
    tables = tables_of(small)
    make_run(tmp_path / "here" / "other", other)
    damaged = make_run(tmp_path / "here" / "damaged", small)
    (damaged / "tables" / "boxes.parquet").write_bytes(b"")
    make_run(tmp_path / "here" / "prepare", small)
    listed = list_runs([tmp_path / "here"])
    fingerprint = data_fingerprint(**tables)
    assert find_gallery(listed, fingerprint, copies).name == "prepare"
    assert find_gallery(listed, "0" * 64, copies) is None
    trained = train(tmp_path / "here" / "study", tables, study_scores=study_scores(tables, 0.5))
    assert find_gallery(list_runs([trained]), fingerprint, copies).name == "prepare"
    assert find_gallery([], fingerprint, copies) is None


def test_thousands_of_images_open_without_being_read(tmp_path, copies):
    small = SmallXrays(6000)
    small_tables = tables_of(small)
    run = prepare(tmp_path, small_tables, dataset="siim")
    XrayCache(run / "xrays", 50).put(CachedXray("image1234", small.pixels["image1234"], ROWS, COLUMNS))
    gallery = Gallery(run, copies)
    tiles, pages = gallery.page("negative", 1)
    assert pages == 125 and all("no decoded copy" in caption for _, caption in tiles)
    study = gallery.open("image1234")
    assert [image.image_id for image in study.images] == ["image1234"] and len(study.remarks) == 1
