"""Training of one model on one fold, whatever its family: the one way from a task to a finished run folder."""

from collections.abc import Callable
from pathlib import Path

from kitlib.device import memory_format, seed_everything, training_device
from kitlib.models.families import family_of
from kitlib.training import data_parallel
from kitlib.training.fold_folder import finish_fold, open_run, save_trained
from kitlib.training.strategy import Strategy
from kitlib.training.task import Task, TrainedFold, read_trained


def train_fold(task: Task, fold: int, run_folder: str | Path) -> TrainedFold | None:
    """Train on all folds but `fold`, keep the recipe's epoch, predict what the model has not seen with it.

    `run_folder` gets all of it: bundle, tables, figures and, last, metrics.json. An interrupted run goes on where it was and
    gives what an uninterrupted one gives; a finished one is read back. None in all but the first of several processes that
    train together. Raises TrainingError if the folder holds a run of other data or settings, SessionOver at the task's
    deadline, and ValueError for a task that cannot be trained, before anything is written.
    """
    run_folder, task = Path(run_folder), task.checked()
    family = family_of(task.recipe)
    strategy = _strategies()[family.name](task, fold, run_folder)
    identity = task.identity(fold)
    finished, device = open_run(run_folder, identity, task.resume), training_device()
    if finished:
        strategy.complete(device)
        return read_trained(run_folder)
    seed_everything(task.seed)
    model = family.network(task.recipe, strategy.classes).to(memory_format=memory_format(device))
    start = strategy.start(model)
    strategy.make_examples()
    fitted = strategy.fit(model, device)
    if not data_parallel.is_first():
        return None
    save_trained(run_folder, model, family.name, strategy.classes, identity, fitted)
    counts = {
        "starting_weights": start,
        "train_images": len(strategy.train),
        "validation_images": len(strategy.validation),
        **strategy.predict(device),
    }
    finish_fold(run_folder, identity, counts, fitted, device)
    return read_trained(run_folder)


def _strategies() -> dict[str, Callable[[Task, int, Path], Strategy]]:
    """How each of kitlib.models.families.FAMILIES is trained."""
    from kitlib.training.faster_rcnn import FasterRCNNStrategy
    from kitlib.training.findings import FindingsStrategy, PatchStrategy
    from kitlib.training.lungs import SegmenterStrategy
    from kitlib.training.study import StudyStrategy

    def yolo(task: Task, fold: int, run_folder: Path) -> Strategy:
        from kitlib.training.yolo import YoloStrategy  # ultralytics takes seconds to import

        return YoloStrategy(task, fold, run_folder)

    return {
        "study": StudyStrategy,
        "findings": FindingsStrategy,
        "patches": PatchStrategy,
        "faster_rcnn": FasterRCNNStrategy,
        "yolo": yolo,
        "segmenter": SegmenterStrategy,
    }
