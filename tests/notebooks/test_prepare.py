"""Notebook 10 on sets of lung masks and of diagnoses: what later stages read, what is put aside, what is flagged."""

import numpy as np
import pandas as pd

from kitlib.competitions.registry import find_competition
from kitlib.notebook import run_notebook
from kitlib.paths import project_root
from kitlib.phantoms.challenges import write_challenge
from kitlib.phantoms.diagnoses import plan_diagnoses, write_diagnoses
from kitlib.phantoms.lungs import write_lungs
from kitlib.runs.finished_run import read_metrics, read_prepared
from kitlib.training.lungs import with_masks
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.mask_store import MaskStore
from tests.executed_notebook import check_shown

NOTEBOOK = project_root() / "notebooks" / "10_prepare.ipynb"


def test_masks_lie_beside_the_decoded_copy(tmp_path, quick_processes):
    folder, run = write_lungs(tmp_path, "montgomery", images=6, side=96, seed=1, workers=1, progress=False), tmp_path / "run"
    (folder / "MontgomerySet" / "ManualMask" / "leftMask" / "MCUCXR_0002_0.png").write_text("no image")
    parameters = {"dataset": "montgomery", "competition": str(folder), "run_folder": str(run)}
    parameters |= {"longest_side": 64, "n_folds": 2, "workers": 1, "packed": True}
    run_notebook(NOTEBOOK, tmp_path / "10.ipynb", parameters, run / "metrics.json")
    tables, masks = read_prepared(run), MaskStore(run / "masks")
    cache = XrayCache(run / "xrays", 64)
    assert len(tables["images"]) == 6 and "MCUCXR_0002_0" not in masks
    kept, folds = with_masks(tables["images"], tables["folds"], masks)
    assert len(kept) == len(folds) == len(masks) == 5 and set(kept.convention) == {"lung_fields"}
    for image_id in masks.ids:
        codes = masks.read(image_id)
        assert codes.shape == cache.read(image_id).pixels.shape and set(np.unique(codes)) == {0, 1}
    faults = pd.read_csv(run / "faults.csv")
    assert faults.row.tolist() == ["MCUCXR_0002_0"] and faults.problem.str.endswith("the image gets no mask").all()
    metrics = read_metrics(run)
    # A mask that cannot be read is there, and of no use.
    assert (metrics["masks"], metrics["masked"], metrics["mask_faults"]) == (6, 5, 1)
    assert (run / "figures" / "examples.png").is_file()


def test_two_sets_as_one_with_a_test_set_put_aside_and_folds_by_source(tmp_path, quick_processes):
    parts = {"seed": 4, "images": 30, "side": 48, "progress": False}
    children, adults = (write_diagnoses(tmp_path, layout, **parts) for layout in ("kermany", "covid_chestxray"))
    run = tmp_path / "run"
    parameters = {"dataset": "kermany", "competition": str(children), "pool": {"covid_chestxray": str(adults)}}
    parameters |= {"classes": "flannel", "run_folder": str(run), "longest_side": 48, "folds_by": "source", "test_share": 0.2}
    # More than there are: nothing is left out, of either set.
    parameters |= {"workers": 1, "limit_train": 1000}
    run_notebook(NOTEBOOK, tmp_path / "10.ipynb", parameters, run / "metrics.json")
    assert "0 images are in no fold" in (tmp_path / "10.ipynb").read_text()
    tables, metrics = read_prepared(run), read_metrics(run)
    images, folds = tables["images"], tables["folds"]
    assert list(tables["labels"]) == ["id", "COVID-19", "viral", "bacterial", "normal"]
    assert set(folds.id) == set(images.image_id[images.split == "train"])
    placed = folds.merge(images, left_on="id", right_on="image_id")
    assert placed.groupby("source").fold.unique().map(list).to_dict() == {"ieee8023": [0], "kermany": [1]}
    assert (metrics["n_folds"], metrics["folds_by"], metrics["classes"]) == (2, "source", "flannel")
    # 29 and 29 images are readable; each set's phantoms have one image of a patient again as another's.
    assert abs((images.split == "test").mean() - 0.2) < 0.05
    again = plan_diagnoses("covid_chestxray", 30, seed=4)
    place = next(index for index, image in enumerate(again) if image.is_copy)
    ids = [f"phantom-{image.patient:04d}-{image.follow_up}" for image in again[place - 1 : place + 1]]
    assert len(set(images.set_index("image_id").split[ids])) == 1
    flags = pd.read_csv(run / "data_sheet" / "flags.csv")
    assert metrics["data_sheet_flags"] == len(flags)
    assert ("one source", "COVID-19") in set(zip(flags.kind, flags.which, strict=True))
    assert pd.read_csv(run / "data_sheet" / "source.csv").drop(columns="class").to_numpy().sum() == len(images)
    assert (run / "figures" / "data_sheet.png").is_file()
    check_shown(tmp_path / "10.ipynb", pictures=3)
    # What the scheme has no class for, and what could not be read.
    faults = pd.read_csv(run / "faults.csv")
    assert faults.problem.str.contains("no class in").sum() == 2 and faults.file.str.startswith("kermany: ").sum() == 1


def test_competitions_by_name_readers_boxes_are_merged_and_run_lengths_become_masks(tmp_path, quick_processes):
    """The data sets are named by their competitions."""
    parts = {"seed": 4, "workers": 1, "progress": False}
    write_challenge(tmp_path / "inputs", "vinbigdata", images=24, side=64, **parts)
    write_challenge(tmp_path / "inputs", "siim-acr", images=8, **parts)
    for name in ("vinbigdata", "siim-acr"):
        parameters = {"dataset": name, "competition": str(tmp_path / "inputs" / find_competition(name).slug)}
        parameters |= {"run_folder": str(tmp_path / name), "longest_side": 64, "n_folds": 2, "workers": 1}
        run_notebook(NOTEBOOK, tmp_path / "10.ipynb", parameters, tmp_path / name / "metrics.json")
    tables, merging = read_prepared(tmp_path / "vinbigdata"), pd.read_csv(tmp_path / "vinbigdata" / "merging.csv")
    # The three readers' boxes differ by a few per cent, and each finding keeps one.
    assert merging.merged.sum() == len(tables["boxes"]) < merging.drawn.sum() / 2
    assert tables["boxes"].readers.max() == 3 and (merging.readers > 2).all()
    tables, masks = read_prepared(tmp_path / "siim-acr"), MaskStore(tmp_path / "siim-acr" / "masks")
    positive = {image_id for image_id in masks.ids if masks.read(image_id).any()}
    assert (
        len(masks) == 8 and positive == set(tables["labels"].id[tables["labels"].Pneumothorax == 1]) and len(positive) == 2
    )
    assert read_metrics(tmp_path / "siim-acr")["dataset"] == "siim_acr"
