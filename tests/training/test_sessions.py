"""Trainings interrupted by a deadline, a crash or a kill, and resumed in a new session from a read-only input."""

import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from kitlib.bundle import STATED, read_bundle, save_bundle
from kitlib.deadline import Deadline, SessionOver, epoch_fits
from kitlib.errors import TrainingError
from kitlib.paths import find_starting_weights
from kitlib.settings import override
from kitlib.training import yolo as train_yolo
from kitlib.training.fold_folder import continue_from
from kitlib.training.loop import pl
from tests.small_tasks import train_small
from tests.small_xrays import RECIPE, SmallXrays
from tests.training.test_detector import FASTER_RCNN, YOLO
from tests.training.test_findings import RECIPE as FINDINGS
from tests.training.test_findings import SmallFindings
from tests.training.test_loop import FLAT, train_slope

EPOCHS = 3
MIXED = {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9, "nominal_batch": 8}
# Per family: data, a recipe with the options that it supports, and its tables of predictions.
FAMILIES = {
    "study": (SmallXrays, override(RECIPE, **MIXED, segmentation=0.5), ("study_scores", "image_scores")),
    "findings": (SmallFindings, override(FINDINGS, **MIXED), ("class_scores", "test_scores")),
    "faster_rcnn": (SmallXrays, override(FASTER_RCNN, ema_decay=0.9, nominal_batch=8), ("detections",)),
    # With three batches per step and two per epoch, gradients are accumulated across the end of an epoch.
    "yolo": (SmallXrays, override(YOLO, nominal_batch=12), ("detections",)),
}


class EndsAfter(Deadline):
    """Deadline after a number of epochs, which is checked before the first epoch and after each epoch."""

    def __init__(self, epochs):
        super().__init__(1.0)
        self.asked, self.epochs = 0, epochs

    def left(self):
        self.asked += 1
        return float("inf") if self.asked <= self.epochs else 0.0


def train(family, folder, **options):
    data, recipe, _ = FAMILIES[family]
    options = {"recipe": override(recipe, epochs=EPOCHS), "model_name": family} | options
    return train_small(folder, data(32 if family == "findings" else 16), **options)


def assert_equal_runs(one, other, tables):
    weights, others = (read_bundle(run.run_folder / "bundle")[1] for run in (one, other))
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    history = [run.history.drop(columns=["seconds", "images_per_s"]) for run in (one, other)]
    pd.testing.assert_frame_equal(*history, check_exact=True)
    for name in tables:
        pd.testing.assert_frame_equal(one.tables[name], other.tables[name], check_exact=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    done = {}

    def run(family, **changes):
        """Train the family's recipe with `changes`, once for all tests."""
        key = family, *changes.items()
        if key not in done:
            recipe = override(FAMILIES[family][1], epochs=EPOCHS, **changes)
            done[key] = train(family, tmp_path_factory.mktemp(family), recipe=recipe)
        return done[key]

    return run


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def as_input(run):
    """Make the run read-only, like an attached Kaggle input, and return its contents."""
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return contents(run)


def new_session():
    """Change the random state, as in a new process."""
    torch.manual_seed(12345)
    np.random.seed(12345)  # noqa: NPY002


def session(family, run, done, more):
    """Train `more` epochs in `run`, which has `done` epochs, until the deadline ends the session."""
    new_session()
    after = done + more
    with pytest.raises(SessionOver, match=f"the session ends after {after} of {EPOCHS} epochs") as over:
        train(family, run / "fold1", deadline=EndsAfter(more))
    assert (over.value.done, over.value.epochs, over.value.run_folder) == (after, EPOCHS, run / "fold1")
    assert not (run / "fold1" / "metrics.json").exists()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sessions_that_end_at_any_epoch_give_what_one_session_gives(tmp_path, uninterrupted, family):
    # Before the first epoch, after it, and (in the same folder, with nothing copied) after the second.
    first, second, third = (tmp_path / place / "run" for place in ("input", "input2", "working"))
    session(family, first, done=0, more=0)
    before = as_input(first)
    assert continue_from(first, second) == [f"fold1: resumes from {first / 'fold1'}"]
    session(family, second, done=0, more=1)
    session(family, second, done=1, more=1)
    assert contents(first) == before
    before = as_input(second)
    assert continue_from(second, third) == [f"fold1: resumes from {second / 'fold1'}"]
    new_session()
    resumed = train(family, third / "fold1", deadline=EndsAfter(1))
    assert contents(second) == before
    assert_equal_runs(resumed, uninterrupted(family), FAMILIES[family][2])


def test_a_finished_training_needs_no_time_for_another_epoch(tmp_path, uninterrupted):
    assert train("study", uninterrupted("study").run_folder, deadline=EndsAfter(0)).metrics["epochs"] == EPOCHS


def test_another_epoch_must_fit_with_half_its_length_to_spare():
    deadline = Deadline(100.0)
    assert epoch_fits(None, [1e9]) and epoch_fits(deadline, [])
    # 1.5 times the longest epoch, not the last: 90 of the 100 seconds, and 105
    assert epoch_fits(deadline, [60.0, 10.0]) and not epoch_fits(deadline, [70.0, 10.0])
    assert not epoch_fits(Deadline(1.0, started=time.monotonic() - 2), [])


def dying_writer(path, whole):
    """Write half of the bytes `whole` to a file, and kill this process."""
    Path(path).write_bytes(whole[: len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_writing(patch, moment, epoch):
    """Make this process kill itself while it writes the checkpoint of `epoch` (from 1)."""
    seen = {"checkpoints": 0}
    save, save_tensors, save_weights, replace = pl.Trainer.save_checkpoint, torch.save, train_yolo.save_file, os.replace

    def saving(trainer, path, *rest, **options):
        seen["checkpoints"] += 1
        if seen["checkpoints"] == epoch and moment == "half written":
            save(trainer, path, *rest, **options)
            dying_writer(path, Path(path).read_bytes())
        return save(trainer, path, *rest, **options)

    def saving_tensors(state, path, *rest, **options):
        save_tensors(state, path, *rest, **options)
        if isinstance(path, Path):  # ultralytics' checkpoint; Lightning saves to memory first
            seen["checkpoints"] += 1
            if seen["checkpoints"] == epoch and moment == "half written":
                dying_writer(path, path.read_bytes())

    def saving_weights(weights, path, *rest):
        save_weights(weights, path, *rest)
        if seen["checkpoints"] == epoch - 1 and moment == "best half written":
            dying_writer(path, Path(path).read_bytes())

    def replacing(beside, path):
        if Path(path).name == "last.ckpt" and seen["checkpoints"] == epoch and moment == "not renamed":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(beside, path)

    patch.setattr(pl.Trainer, "save_checkpoint", saving)
    patch.setattr(torch, "save", saving_tensors)
    patch.setattr("kitlib.training.yolo.save_file", saving_weights)
    patch.setattr("kitlib.training.loop.save_file", saving_weights)
    patch.setattr(os, "replace", replacing)


def train_and_die(family, folder, moment, epoch):
    with pytest.MonkeyPatch.context() as patch:
        killed_in_writing(patch, moment, epoch)
        train(family, folder, recipe=override(FAMILIES[family][1], epochs=EPOCHS, keep="last"))


@pytest.mark.parametrize(
    ("family", "moment"),
    [("study", "half written"), ("study", "best half written"), ("study", "not renamed"), ("yolo", "half written")],
)
def test_a_kill_while_writing_leaves_the_previous_checkpoint_intact(tmp_path, uninterrupted, family, moment):
    last = override(FAMILIES[family][1], epochs=EPOCHS, keep="last")  # every epoch writes its weights
    process = multiprocessing.get_context("fork").Process(target=train_and_die, args=(family, tmp_path / "cut", moment, 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0  # counted from 0: the first one
    new_session()
    resumed = train(family, tmp_path / "cut", recipe=last)
    assert_equal_runs(resumed, uninterrupted(family, keep="last"), FAMILIES[family][2])
    # Half-written files are removed.
    left = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.is_file()}
    assert left == {"run.json", "last.ckpt", "best.safetensors"}


def test_kills_at_any_moment_change_nothing(tmp_path):
    slow = override(FLAT, epochs=30, ema_decay=0.9, patience=30, learning_rate=0.01, nominal_batch=4 * FLAT.batch_size)
    whole, fitted = train_slope(tmp_path / "whole", slow)
    kills, moments = 0, np.random.default_rng(0).uniform(0.05, 0.3, 100)
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(target=train_slope, args=(tmp_path / "cut", slow))
        process.start()
        # Wait for CPU time and not for wall time, so that a busy machine makes progress too.
        while process.exitcode is None and sum(psutil.Process(process.pid).cpu_times()[:2]) < moment:
            time.sleep(0.005)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 2
    resumed, again = train_slope(tmp_path / "cut", slow)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert again.history.score.tolist() == fitted.history.score.tolist()


def stopped(folder, **options):
    with pytest.raises(SessionOver):
        train("study", folder, deadline=EndsAfter(1), **options)
    return folder


def test_an_earlier_session_does_not_overwrite_a_later_one(tmp_path):
    first, run = tmp_path / "first", tmp_path / "run"
    stopped(first / "fold1")
    with pytest.raises(SessionOver):
        train("study", run / "fold1", deadline=EndsAfter(2))
    further = contents(run)
    line = f"fold1: not copied, because {run} already has at least as many of its epochs as {first}"
    assert continue_from(first, run) == [line]
    assert contents(run) == further
    assert continue_from(run, first) == [f"fold1: resumes from {run / 'fold1'}"]
    assert not list(first.glob(".*"))
    with pytest.raises(TrainingError, match=r"no fold to resume \(fold\*/checkpoints/run\.json\), but contains: first, run"):
        continue_from(tmp_path, run)


def test_a_session_of_other_settings_folds_or_data_is_refused_with_each_difference(tmp_path):
    resumed = partial(train, "study", stopped(tmp_path), deadline=EndsAfter(9))
    recipe = override(FAMILIES["study"][1], epochs=EPOCHS)
    with pytest.raises(
        TrainingError, match=r"recipe\.dropout: 0\.5 recorded, 0\.1 requested; recipe\.mixup: 0\.4 recorded, 0\.0 requested"
    ):
        resumed(recipe=override(recipe, dropout=0.1, mixup=0.0))
    with pytest.raises(TrainingError, match="seed: 0 recorded, 1 requested"):
        resumed(seed=1)

    class Refolded(SmallXrays):
        def __post_init__(self):
            super().__post_init__()
            self.fold_table = self.fold_table.assign(fold=self.fold_table.fold.replace({0: 2}))

    with pytest.raises(
        TrainingError, match=r"data_fingerprint: '\w+' recorded, '\w+' requested; folds_fingerprint: '\w+' recorded"
    ):
        train_small(tmp_path, Refolded(16), recipe, model_name="study")


def test_starting_weights_are_identified_by_content_and_not_by_path(tmp_path, uninterrupted):
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    shutil.copytree(uninterrupted("study").run_folder / "bundle", begun)
    starting = partial(override, RECIPE, epochs=EPOCHS)
    run = stopped(tmp_path / "run", recipe=starting(starting_weights=str(begun)))
    begun.rename(elsewhere)
    assert find_starting_weights(elsewhere) == elsewhere
    with pytest.raises(SessionOver, match="after 2 of 3 epochs"):
        train("study", run, recipe=starting(starting_weights=str(elsewhere)), deadline=EndsAfter(1))
    # Writes other weights to the first path.
    record, weights = read_bundle(elsewhere)
    stated = {key: record[key] for key in STATED}
    save_bundle(begun, {name: weight + 1 for name, weight in weights.items()}, stated)
    with pytest.raises(TrainingError, match=r"starting_weights_sha256: '\w{64}' recorded, '\w{64}' requested"):
        train("study", run, recipe=starting(starting_weights=str(begun)))
