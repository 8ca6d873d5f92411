"""What is to be trained, and what a finished training has left."""

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
# Tables of a run whose file has another name than their kind.
KINDS = {"test_scores": "class_scores", "training_scores": "class_scores"}


@dataclass(frozen=True)
class Task:
    """One model to train on every fold: on which images, by which recipe, until when.

    `tables` are images, labels, boxes and folds of a prepared run, `cache` its decoded images. Limits are numbers of images,
    whole patients; they do not touch `extra` images, which are trained on as well and never validated on. `lungs` finds
    lungs for a recipe whose lungs are "masks"; `masks` are the drawn ones that a segmenter learns from. With `in_sample` a
    classifier also predicts its own training images. A family that cannot use one of these refuses it. With `resume` an
    interrupted run goes on where it stopped; without, it is started over.
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
        """The same with its tables checked (see kitlib.tables). Raises ValueError for tables that are not these four."""
        if set(self.tables) != set(TABLES):
            raise ValueError(f"tables are {', '.join(self.tables)}; wanted {', '.join(TABLES)}")
        return dataclasses.replace(self, tables={name: check_table(self.tables[name], name) for name in TABLES})

    def identity(self, fold: int) -> dict[str, Any]:
        """All that the weights of this fold's model follow from, in JSON's types."""
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
    """A finished training of one fold, as its folder holds it.

    `tables` are its predictions by the name of their file, of images that the model has not seen: study_scores and
    image_scores, class_scores and test_scores (and, if asked for, training_scores, of images that it has seen), detections
    and coverage, or mask_scores.
    """

    run_folder: Path
    metrics: dict[str, Any]
    history: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def masks(self) -> MaskStore:
        """The label images that a segmenter has drawn of its fold."""
        return MaskStore(self.run_folder / "masks")


def read_trained(run_folder: str | Path) -> TrainedFold:
    """The results of a finished run. Raises FileNotFoundError without metrics.json, which marks one."""
    run_folder = Path(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    history = pd.read_csv(run_folder / "tables" / "history.csv")
    paths = sorted((run_folder / "tables").glob("*.parquet"))
    tables = {path.stem: read_table(KINDS.get(path.stem, path.stem), path) for path in paths}
    return TrainedFold(run_folder, metrics, history, tables)
