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
    """One model to train on every fold: data, recipe, seed, limits and deadline.

    `tables` holds the tables images, labels, boxes and folds of a prepared run; `cache` reads its decoded images.
    `limit_train` and `limit_validation` cap the number of images, keeping or dropping whole patients; they do not apply to
    the `extra` images, which are used for training and never for validation. `lungs` are the stored lungs that are used if
    `recipe.lungs` is "masks"; `masks` are the ground truth for a segmenter. With `in_sample`, a classifier also predicts its
    own training images. Training raises ValueError if the model family cannot use one of these inputs. With `resume`, an
    interrupted run continues; without it, the run starts over.
    """

    tables: Mapping[str, pd.DataFrame]
    cache: DecodedXrays
    recipe: TrainingRecipe
    model_name: str
    seed: int = 0
    workers: int = 0
    limit_train: int | None = None
    limit_validation: int | None = None
    extra: ExtraImages | None = None
    lungs: StoredLungs | None = None
    masks: MaskStore | None = None
    in_sample: bool = False
    deadline: Deadline | None = None
    resume: bool = True
    progress: bool = True

    def checked(self) -> "Task":
        """Return a copy of the task with checked tables (see kitlib.tables). Raises ValueError if a table is missing."""
        if set(self.tables) != set(TABLES):
            raise ValueError(f"tables are {', '.join(self.tables)}; expected {', '.join(TABLES)}")
        return dataclasses.replace(self, tables={name: check_table(self.tables[name], name) for name in TABLES})

    def identity(self, fold: int) -> dict[str, Any]:
        """Return a dict, in JSON types, with everything that determines the weights of this fold's model."""
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

    `tables` holds the model's predictions, keyed by file name: study_scores and image_scores; class_scores and test_scores;
    detections and coverage; or mask_scores. These are for images that the model was not trained on; only training_scores,
    if requested, is for its training images.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def masks(self) -> MaskStore:
        """Label images that a segmenter has predicted for its fold."""
        return MaskStore(self.run_folder / "masks")


def read_trained(run_folder: str | Path) -> TrainedFold:
    """Read the results of a finished run. Raises FileNotFoundError if it has no metrics.json, which marks a finished run."""
    run_folder = Path(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    history = pd.read_csv(run_folder / "tables" / "history.csv")
    paths = sorted((run_folder / "tables").glob("*.parquet"))
    tables = {path.stem: read_table(KINDS.get(path.stem, path.stem), path) for path in paths}
    return TrainedFold(run_folder, metrics, history, tables)
