"""Trains one model of any family on one fold: all steps from a task to a finished run folder."""

from collections.abc import Callable
from pathlib import Path

from kitlib.device import memory_format, seed_everything, training_device
from kitlib.models.families import family_of
from kitlib.training import data_parallel
from kitlib.training.fold_folder import finish_fold, open_run, save_trained
from kitlib.training.gpu_memory import explaining_memory
from kitlib.training.shared_memory import explaining_timeouts
from kitlib.training.strategy import Strategy
from kitlib.training.task import Task, TrainedFold, read_trained


def train_fold(task: Task, fold: int, run_folder: str | Path) -> TrainedFold | None:
    """Train a model on all folds but `fold`, predict the images in `fold`, and return the results.

    Writes to `run_folder`: the bundle with the weights of the kept epoch, tables (among them the predictions), figures and,
    last, metrics.json. An interrupted run is resumed, with the same result as an uninterrupted run; for a finished run, the
    results are only read. If several processes train a fold together, only rank 0 returns the results, and the others return
    None. Raises TrainingError if the folder contains a run with other data or settings, or if the memory is too small for a
    batch; SessionOver at the task's deadline; ValueError, before anything is written, if the task cannot be trained.
    """
    run_folder, task = Path(run_folder), task.checked()
    family = family_of(task.recipe)
    strategy = _strategies()[family.name](task, fold, run_folder)
    identity = task.identity(fold)
    is_finished, device = open_run(run_folder, identity, task.resume), training_device()
    if is_finished:
        strategy.complete(device)
        return read_trained(run_folder)
    seed_everything(task.seed)
    model = family.network(task.recipe, strategy.classes).to(memory_format=memory_format(device))
    starting_weights = strategy.start(model)
    strategy.make_examples()
    with explaining_timeouts(), explaining_memory(task.recipe):
        result = strategy.fit(model, device)
    if not data_parallel.is_first_process():
        return None
    save_trained(run_folder, model, family.name, strategy.classes, identity, result, device)
    counts = {
        "starting_weights": starting_weights,
        "train_images": len(strategy.train),
        "validation_images": len(strategy.validation),
        **strategy.predict(device),
    }
    finish_fold(run_folder, identity, counts, result, device)
    return read_trained(run_folder)


def _strategies() -> dict[str, Callable[[Task, int, Path], Strategy]]:
    """Return the strategy of each model family in kitlib.models.families.FAMILIES, keyed by the family's name."""
    from kitlib.training.findings import FindingsStrategy, PatchStrategy
    from kitlib.training.lungs import SegmenterStrategy
    from kitlib.training.pyramid_detector import PyramidDetectorStrategy
    from kitlib.training.study import StudyStrategy

    def yolo(task: Task, fold: int, run_folder: Path) -> Strategy:
        from kitlib.training.yolo import YoloStrategy  # ultralytics takes seconds to import

        return YoloStrategy(task, fold, run_folder)

    return {
        "study": StudyStrategy,
        "findings": FindingsStrategy,
        "patches": PatchStrategy,
        "faster_rcnn": PyramidDetectorStrategy,
        "retinanet": PyramidDetectorStrategy,
        "yolo": yolo,
        "segmenter": SegmenterStrategy,
        "sparse_segmenter": SegmenterStrategy,
    }
