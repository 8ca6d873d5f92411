"""Notebook 10 on a set of lung masks: what a segmenter reads lies beside the decoded copy, what is broken in faults.csv."""

import numpy as np
import pandas as pd

from kitlib.cache import XrayCache
from kitlib.mask_store import MaskStore
from kitlib.paths import project_root
from kitlib.phantom_lungs import write_lungs
from kitlib.run_notebook import run_notebook
from kitlib.runs import read_metrics, read_prepared
from kitlib.train_lungs import with_masks

NOTEBOOK = project_root() / "notebooks" / "10_prepare.ipynb"


def test_masks_lie_beside_the_decoded_copy(tmp_path):
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
    assert faults.row.tolist() == ["MCUCXR_0002_0"] and faults.problem.str.endswith("the image has no mask").all()
    metrics = read_metrics(run)
    # A mask that cannot be read is there, and of no use.
    assert (metrics["masks"], metrics["masked"], metrics["mask_faults"]) == (6, 5, 1)
    assert (run / "figures" / "examples.png").is_file()
