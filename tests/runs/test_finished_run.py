import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.atomic import write_json
from kitlib.bundle import data_fingerprint
from kitlib.errors import RunError
from kitlib.recipes.fields import StudyRecipe
from kitlib.runs.finished_run import read_extra, read_masks, read_metrics, read_models, read_prepared
from kitlib.tables import write_table
from kitlib.training.split import with_extra
from kitlib.training.xray_dataset import XrayDataset
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.writing import write_xray
from tests.small_bundles import edit_record
from tests.small_kernels import make_run as make_bundle
from tests.small_xrays import SmallXrays


def test_a_run_that_is_not_finished_is_named_with_what_it_contains(tmp_path):
    with pytest.raises(RunError, match=r"metrics\.json is missing\. .*no such folder"):
        read_metrics(tmp_path / "nothing")
    (tmp_path / "record.json").touch()
    for read in (read_metrics, read_prepared):
        with pytest.raises(RunError, match=r"contains: \['record.json'\]"):
            read(tmp_path)


def test_masks_are_those_in_the_runs_folder_if_it_has_one(tmp_path):
    assert read_masks(tmp_path) is None
    (tmp_path / "masks").mkdir()
    assert read_masks(tmp_path).folder == tmp_path / "masks"


def prepared_run(folder, small, **metrics):
    """Write a prepared run of SmallXrays with its images decoded in its cache."""
    images = small.images.assign(path=[str(folder / f"{image_id}.dcm") for image_id in small.image_ids])
    for image_id, pixels in small.pixels.items():
        write_xray(folder / f"{image_id}.dcm", pixels, transfer_syntax=ExplicitVRLittleEndian)
    XrayCache(folder / "xrays", 50).fill(images, workers=1)
    tables = {"images": images, "labels": small.labels, "boxes": small.boxes, "folds": small.fold_table}
    for name, table in tables.items():
        write_table(table, name, folder / "tables" / f"{name}.parquet")
    write_json(folder / "metrics.json", {"longest_side": 50, **metrics})
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    small = SmallXrays(8)
    small.fold_table = small.fold_table.head(6)  # no annotator looked at the other two
    return prepared_run(tmp_path_factory.mktemp("prepared"), small)


def test_extra_images_of_a_prepared_run_are_those_in_its_folds(prepared):
    extra = read_extra(prepared)
    assert extra.images["image_id"].tolist() == [f"image{n:03d}" for n in range(6)]
    assert extra.cache.read("image003").pixels.shape == (40, 50)
    assert len(read_extra(prepared, for_boxes=True).images) == 6  # no image is unsure


def test_extra_images_of_a_labelled_run_are_decoded_in_the_run_that_it_names(tmp_path, prepared):
    tables = read_prepared(prepared)
    for name in ("labels", "boxes"):
        write_table(tables[name], name, tmp_path / "tables" / f"{name}.parquet")
    images = tables["images"].assign(none=0.25, unsure=[n % 2 == 1 for n in range(8)])
    write_table(images, "images", tmp_path / "tables" / "images.parquet")
    write_json(tmp_path / "metrics.json", {"longest_side": 50, "xrays_run": str(prepared)})
    extra = read_extra(tmp_path)
    assert len(extra.images) == 8 and extra.images["none"].tolist() == [0.25] * 8
    assert extra.cache.read("image000").pixels.shape == (40, 50)
    sure = read_extra(tmp_path, for_boxes=True).images
    assert sure["image_id"].to_dict() == {row: f"image{2 * row:03d}" for row in range(4)} and "index" not in sure


def test_extra_images_that_cannot_be_read_are_refused_at_once(tmp_path, prepared):
    write_json(tmp_path / "metrics.json", {"model": "study"})
    with pytest.raises(RunError, match="is not a run of notebook 10 or 50"):
        read_extra(tmp_path)
    shutil.copytree(prepared / "tables", tmp_path / "tables")
    write_json(tmp_path / "metrics.json", {"longest_side": 50})
    with pytest.raises(RunError, match=r"6 of 6 images are not decoded in .*; the first is image000"):
        read_extra(tmp_path)


def trained_run(folder, tables, model="c", extra=None, folds=(0, 1)):
    for fold in folds:
        bundle = make_bundle(folder / f"fold{fold}", model, fold) / "bundle"
        edit_record(bundle, data_fingerprint=data_fingerprint(**tables))
        write_json(folder / f"fold{fold}" / "metrics.json", {"model": model, **({"extra": extra} if extra else {})})
    return folder


def test_models_are_named_with_their_folds(tmp_path, prepared):
    tables = read_prepared(prepared)
    runs = [trained_run(tmp_path / model, tables, model) for model in "cd"]
    models = read_models(runs, tables)
    assert models[["model", "fold"]].to_numpy().tolist() == [["c", 0], ["c", 1], ["d", 0], ["d", 1]]
    assert models["bundle"].iloc[3] == str(tmp_path / "d" / "fold1" / "bundle")
    assert read_models(runs, tables, folds=[1])[["model", "fold"]].to_numpy().tolist() == [["c", 1], ["d", 1]]
    with pytest.raises(RunError, match=r"no model of folds \[4\]"):
        read_models(runs, tables, folds=[4])
    with pytest.raises(RunError, match="has no fold"):
        read_models([prepared], tables)


def test_models_that_have_seen_unknown_images_are_refused(tmp_path, prepared):
    tables, extra = read_prepared(prepared), read_extra(prepared)
    other = {**tables, "folds": tables["folds"].assign(fold=1)}
    with pytest.raises(RunError, match="trained on another prepared run"):
        read_models([trained_run(tmp_path / "c", other)], tables)
    more = trained_run(tmp_path / "d", tables, extra=extra.identity())
    with pytest.raises(RunError, match="trained on extra images too; give the run"):
        read_models([more], tables)
    assert len(read_models([more], tables, extra=[extra])) == 2


def test_extra_images_are_identified_by_their_images_targets_and_boxes(prepared):
    extra = read_extra(prepared)
    identity = extra.identity()
    assert identity == read_extra(prepared).identity() and identity["images"] == len(extra.images)
    changed = (
        replace(extra, images=extra.images.assign(image_id=extra.images.image_id + "x")),
        replace(extra, images=extra.images.assign(none=0.25)),
        replace(extra, labels=extra.labels.assign(negative=0.25)),
        replace(extra, boxes=extra.boxes.assign(xmin=extra.boxes.xmin + 1)),
    )
    assert identity["longest_side"] == 50
    data, none = (
        [one.identity()[f"{name}_fingerprint"] == identity[f"{name}_fingerprint"] for one in changed]
        for name in ("data", "none")
    )
    assert data == [False, True, False, False] and none == [False, False, True, True]


def test_images_without_marked_opacities_do_not_train_a_detector(tmp_path):
    small = SmallXrays(8)
    prepared_run(tmp_path / "nih", small)
    metrics = json.loads((tmp_path / "nih" / "metrics.json").read_text())
    write_json(tmp_path / "nih" / "metrics.json", {**metrics, "dataset": "nih"})
    extra = read_extra(tmp_path / "nih")
    # An NIH image without a box is not a certain `none`: the target is unknown.
    assert np.isnan(XrayDataset(extra.images, extra.labels, extra.boxes, extra.cache, StudyRecipe()).none).all()
    nothing = read_extra(tmp_path / "nih", for_boxes=True)
    with pytest.raises(ValueError, match="NIH images have no boxes for a detector"):
        with_extra(small.images.head(0), small.labels, small.boxes, small, nothing, small.images)
