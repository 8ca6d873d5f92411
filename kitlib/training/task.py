"""The inputs of training (Task) and the results of a finished fold (TrainedFold)."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.deadline import Deadline
from kitlib.lungs.finders import StoredLungs
from kitlib.models.starting_weights import starting_weights_digest
from kitlib.recipes.fields import TrainingRecipe
from kitlib.runs.finished_run import ExtraImages
from kitlib.tables import check_table, read_table
from kitlib.xrays.cache import DecodedXrays
from kitlib.xrays.mask_store import MaskStore

TABLES = ("images", "labels", "boxes", "folds")
# Schemas of the tables whose file name is not the schema's name.
KINDS = {"test_scores": "class_scores", "training_scores": "class_scores"}


@dataclass(frozen=True)
class Task:
    """Everything that is needed to train one model on any fold: data, recipe, seed, limits and deadline.

    `tables` contains the tables "images", "labels", "boxes" and "folds" of a run of notebook 10; `cache` reads this run's
    decoded images. `limit_train` and `limit_validation` cap the number of training and validation images, keeping or
    dropping whole patients. `extra` has additional images, which are used only for training and to which the limits do not
    apply. `lungs` are stored lungs, for a recipe whose field `lungs` is "masks"; `masks` are the ground truth for a
    segmenter. With `in_sample`, a findings classifier also predicts its own training images. `workers` is the number of
    processes that load batches; -1 lets `kitlib.training.shared_memory.suitable_workers` choose it. Training raises
    ValueError if the model family cannot use `extra`, `lungs`, `masks` or `in_sample`. With `resume`, an interrupted run
    continues; without it, the run starts over.
    """

    tables: Mapping[str, pd.DataFrame]
    cache: DecodedXrays
    recipe: TrainingRecipe
    model_name: str
    seed: int = 0
    workers: int = -1
    limit_train: int | None = None
    limit_validation: int | None = None
    extra: ExtraImages | None = None
    lungs: StoredLungs | None = None
    masks: MaskStore | None = None
    in_sample: bool = False
    deadline: Deadline | None = None
    resume: bool = True

    def checked(self) -> "Task":
        """Return a copy of the task whose tables have been checked and converted by `kitlib.tables.check_table`.

        Raises ValueError if `workers` is below -1, or if the keys of `tables` are not "images", "labels", "boxes" and
        "folds". Raises TableError if a table is invalid.
        """
        if self.workers < -1:
            raise ValueError(f"`workers` is {self.workers}; expected -1 or more")
        if set(self.tables) != set(TABLES):
            raise ValueError(f"the keys of `tables` are {list(self.tables)}; expected {list(TABLES)}")
        return dataclasses.replace(self, tables={name: check_table(self.tables[name], name) for name in TABLES})

    def identity(self, fold: int) -> dict[str, Any]:
        """Return a dict, in JSON types, of all inputs on which the weights of the model for `fold` depend."""
        start = self.recipe.starting_weights
        return {
            "model": self.model_name,
            "fold": fold,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "limit_train": self.limit_train,
            "limit_validation": self.limit_validation,
            "longest_side": self.cache.longest_side,
            "data_fingerprint": data_fingerprint(**self.tables),
            "folds_fingerprint": data_fingerprint(folds=self.tables["folds"]),
            "starting_weights_sha256": starting_weights_digest(start) if start else "",
            **({"extra": self.extra.identity()} if self.extra is not None else {}),
            **(
                {"lungs_fingerprint": self.lungs.fingerprint, "segmenter": self.lungs.segmenter}
                if self.lungs is not None
                else {}
            ),
            **({"masks_fingerprint": self.masks.fingerprint()} if self.masks is not None else {}),
        }


@dataclass(frozen=True)
class TrainedFold:
    """Results of one finished fold, as read from its run folder.

    `tables` contains the model's predictions, keyed by file stem: `study_scores` and `image_scores` of a study classifier;
    `class_scores` and `test_scores` of a findings classifier; `detections` and `coverage` of a detector; `mask_scores` of a
    segmenter. These predictions are for images that the model was not trained on. On request, a findings classifier also
    writes `training_scores` for its training images. `metrics` is read from metrics.json; `history` has one row per epoch.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def masks(self) -> MaskStore:
        """Store of the masks that a segmenter has predicted for the images of the held-out fold."""
        return MaskStore(self.run_folder / "masks")


def read_trained(run_folder: str | Path) -> TrainedFold:
    """Read the results of one finished fold from its run folder.

    Raises FileNotFoundError if the folder has no metrics.json, which marks a finished run.
    """
    run_folder = Path(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    history = pd.read_csv(run_folder / "tables" / "history.csv")
    paths = sorted((run_folder / "tables").glob("*.parquet"))
    tables = {path.stem: read_table(KINDS.get(path.stem, path.stem), path) for path in paths}
    return TrainedFold(run_folder, metrics, history, tables)
