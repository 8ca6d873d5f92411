"""Folds trained side by side, and one model trained by two processes, give the results of a single process."""

import dataclasses
import math
import multiprocessing
import os
import signal
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from kitlib.bundle import read_bundle
from kitlib.deadline import Deadline, SessionOver
from kitlib.errors import TrainingError
from kitlib.recipes.fields import DetectorRecipe
from kitlib.settings import override
from kitlib.training.driver import train_fold
from kitlib.training.train_folds import train_folds
from tests.small_tasks import small_task
from tests.small_xrays import RECIPE, SmallXrays

TIMES = ["seconds", "images_per_s"]
QUICK = override(RECIPE, epochs=2)
# Without batch norm and dropout, an image's gradient does not depend on the other images of the batch.
ALONE = override(RECIPE, backbone="test_convnext", image_size=64, dropout=0.0, optimizer="sgd", batch_size=8, blur_p=0.0)


pytestmark = pytest.mark.usefixtures("quick_processes")


def task(recipe=QUICK, **options):
    return small_task(SmallXrays(16), recipe, **options)


def assert_equal_runs(first, second, tolerance=0.0):
    found, expected = (read_bundle(run.run_folder / "bundle")[1] for run in (first, second))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)
    histories = (run.history.drop(columns=TIMES) for run in (first, second))
    pd.testing.assert_frame_equal(*histories, check_exact=not tolerance, atol=10 * tolerance)


def test_folds_side_by_side_equal_folds_one_after_the_other(tmp_path, capfd, real_processes):
    alone = [train_fold(task(), fold, tmp_path / f"alone{fold}") for fold in (0, 1)]
    together = train_folds(task(), [0, 1], tmp_path / "together", at_once=2)
    for first, second in zip(together, alone, strict=True):
        assert_equal_runs(first, second)
    # Log lines of each fold are printed here, and all output is in its log file.
    output = capfd.readouterr().out
    for fold in (0, 1):
        assert f"fold {fold}: epoch 2 of 2, loss" in output
        assert "epoch 1 of 2" in (tmp_path / "together" / f"fold{fold}" / "train.log").read_text()


def deadly(task, fold, run_folder):
    if fold == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if fold == 2:
        raise ValueError("out of luck")
    return train_fold(task, fold, run_folder)


def with_folds(task, count):
    folds = task.tables["folds"]
    return dataclasses.replace(task, tables={**task.tables, "folds": folds.assign(fold=np.arange(len(folds)) % count)})


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_fold_that_does_not_exist_is_refused_before_any_training(tmp_path, at_once):
    with pytest.raises(ValueError, match=r"the prepared run has no fold 7, 9; choose from \[0, 1\]"):
        train_folds(task(), [0, 9, 7], tmp_path, at_once=at_once)
    assert list(tmp_path.iterdir()) == []


def test_folds_that_fail_or_are_killed_are_named_and_stop_no_other(tmp_path):
    with pytest.raises(TrainingError) as failed:
        train_folds(with_folds(task(), 3), [2, 1, 0], tmp_path, at_once=2, train=deadly)
    message = str(failed.value)
    assert "2 of 3 folds failed, the others are finished" in message
    assert "fold 2: ValueError: out of luck" in message
    assert f"fold 1: killed, without output\n  log: {tmp_path}/fold1/train.log" in message
    assert (tmp_path / "fold0" / "metrics.json").is_file()


def test_folds_that_the_session_stops_are_left_out_with_a_note(tmp_path, capfd):
    finished = train_folds(task(), [0], tmp_path, at_once=1)
    over = Deadline(1, started=time.monotonic() - 2)
    again = train_folds(task(deadline=over), [0, 1], tmp_path, at_once=1)
    assert [run.metrics for run in again] == [run.metrics for run in finished]
    output = capfd.readouterr().out
    assert "fold 1 stopped after 0 of 2 epochs" in output
    assert (
        "1 of 2 folds are not finished. To continue, run this notebook again" in output
        and f"resume_from to '{tmp_path.name}'" in output
    )


def noted(task, fold, run_folder):
    """Replace training: with a deadline, fold 1 fails and fold 0 is stopped."""
    with open(run_folder.parent / "begun.txt", "a") as begun:
        begun.write(f"{fold} {torch.get_num_threads()} {task.resume}\n")
    if task.deadline is not None and fold == 1:
        raise ValueError("no such fold")
    if task.deadline is not None and fold == 0:
        raise SessionOver(run_folder, 0, 2)
    if not (run_folder / "metrics.json").is_file():
        (run_folder / "metrics.json").write_text("{}")
    return fold


def begun(folder):
    return (folder / "begun.txt").read_text().splitlines()


@pytest.mark.parametrize("at_once", [1, 2])
def test_after_a_fold_that_the_session_stops_no_other_is_begun(tmp_path, at_once, capfd):
    (tmp_path / "fold5").mkdir()
    (tmp_path / "fold5" / "metrics.json").write_text("{}")
    folds = [0, 3, 5, 4] if at_once == 1 else [0, 0, 3, 5, 4]
    found = train_folds(with_folds(task(deadline=Deadline(600)), 6), folds, tmp_path, at_once=at_once, train=noted)
    # A finished fold is read.
    assert found == [5]
    assert {line.split()[0] for line in begun(tmp_path)} == {"0", "5"}
    assert f"{len(folds) - 1} of {len(folds)} folds are not finished" in capfd.readouterr().out


def test_an_error_lists_folds_that_the_session_has_stopped(tmp_path):
    with pytest.raises(TrainingError, match=r"1 of 2 folds failed, the session's end stopped folds 0:\nfold 1: ValueError"):
        train_folds(task(deadline=Deadline(600)), [0, 1], tmp_path, at_once=2, train=noted)


def test_folds_side_by_side_share_the_threads_and_are_started_over_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for fold in (2, 3):
        (tmp_path / f"fold{fold}" / "checkpoints").mkdir(parents=True)
        (tmp_path / f"fold{fold}" / "metrics.json").write_text("{}")
    assert train_folds(with_folds(task(resume=False), 4), [2, 3], tmp_path, at_once=2, train=noted) == [2, 3]
    # Each fold is trained in a process with half of the threads, and then read in this process.
    assert sorted(begun(tmp_path)) == ["2 2 True", "2 5 True", "3 2 True", "3 5 True"]
    assert list(tmp_path.glob("*/checkpoints")) == []


def endless(task, fold, run_folder):
    (run_folder.parent / f"{fold}.begun").write_text(str(os.getpid()))
    time.sleep(600)


def test_the_folds_of_a_killed_notebook_do_not_train_on(tmp_path):
    spawned = multiprocessing.get_context("spawn")
    parent = spawned.Process(target=train_folds, args=(task(), [0, 1], tmp_path), kwargs={"at_once": 2, "train": endless})
    parent.start()
    end = time.monotonic() + 120
    while len(pids := [path.read_text() for path in tmp_path.glob("*.begun")]) < 2 or not all(pids):
        assert time.monotonic() < end and parent.exitcode is None
        time.sleep(0.1)
    children = [psutil.Process(int(number)) for number in pids]
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_two_processes_resume_a_model_as_one_process_does(tmp_path):
    alone = train_fold(task(ALONE), 1, tmp_path / "alone")
    assert train_folds(task(ALONE, deadline=OneEpoch()), [1], tmp_path / "together", at_once=1) == []
    (run,) = train_folds(task(ALONE), [1], tmp_path / "together", processes=2)
    # Sums are taken in another order.
    assert_equal_runs(run, alone, tolerance=1e-5)
    pd.testing.assert_frame_equal(run.tables["study_scores"], alone.tables["study_scores"], atol=1e-4)
    assert len(list((tmp_path / "together" / "fold1" / "processes").rglob("stderr.log"))) == 2


class OneEpoch(Deadline):
    """Deadline that allows exactly one epoch."""

    def __init__(self):
        self.asked = 0

    def left(self):
        self.asked += 1
        return math.inf if self.asked == 1 else 0.0


@pytest.mark.parametrize(("gpus", "at_once", "processes", "started"), [(2, 0, 1, 2), (8, 0, 1, 3), (0, 3, 1, 3)])
def test_as_many_folds_train_side_by_side_as_there_are_gpus(tmp_path, monkeypatch, gpus, at_once, processes, started):
    begun = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("kitlib.training.train_folds._train_side_by_side", lambda *given: begun.append(given[-1]))
    assert train_folds(with_folds(task(), 3), [0, 1, 2], tmp_path, at_once, processes) == []  # none is finished
    assert begun == [started]


@pytest.mark.parametrize(("gpus", "at_once", "processes"), [(0, 0, 1), (2, 1, 1), (2, 0, 2), (2, 1, 2)])
def test_other_folds_train_one_after_the_other(tmp_path, monkeypatch, gpus, at_once, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("kitlib.training.train_folds.train_together", lambda *given: (*given[2:4], given[4]))
    found = train_folds(
        with_folds(task(), 3), [0, 2], tmp_path, at_once, processes, train=lambda _, fold, folder: (fold, folder, 1)
    )
    assert found == [(fold, tmp_path / f"fold{fold}", processes) for fold in (0, 2)]


def test_trainings_that_processes_cannot_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`at_once` is 2 and `processes` is 2, but only one"):
        train_folds(task(), [0, 1], tmp_path, at_once=2, processes=2)
    for at_once, processes in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=rf"`at_once` is {at_once} and `processes` is {processes}; expected >= 0"):
            train_folds(task(), [0, 1], tmp_path, at_once=at_once, processes=processes)
    with pytest.raises(ValueError, match="2 processes cannot share a batch of 7 images evenly"):
        train_folds(task(override(ALONE, batch_size=7)), [1], tmp_path, processes=2)
    with pytest.raises(ValueError, match="several processes cannot train stages of the backbone that are unfrozen later"):
        train_folds(task(override(ALONE, frozen_backbone=True, unfreeze_every=2)), [1], tmp_path, processes=2)
    with pytest.raises(ValueError, match="a yolo cannot be trained by several processes"):
        train_folds(task(DetectorRecipe(family="yolo", batch_size=4)), [1], tmp_path, processes=2)
