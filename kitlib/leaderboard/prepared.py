"""Finds the prepared run (notebook 10) that the models of a run were trained on, and checks it by fingerprints."""

from pathlib import Path

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.errors import RunError
from kitlib.leaderboard.listing import ListedRun
from kitlib.runs.finished_run import read_prepared
from kitlib.runs.run_kinds import named_folder


class PreparedRuns:
    """Finds the prepared run (notebook 10) that a model was trained on.

    Searches the listed runs `runs`, and the run in the parameter `prepare_run` of the model's run. `find` reads each
    prepared run at most once.
    """

    def __init__(self, runs: list[ListedRun]) -> None:
        prepared = [run for run in runs if run.kind == "prepared" and run.state == "finished"]
        self._unread = [run.folder.resolve() for run in prepared]
        self._read: set[Path] = set()
        self._by_fingerprint: dict[str, tuple[str, dict[str, pd.DataFrame]]] = {}

    def find(self, fingerprint: str, run: ListedRun) -> tuple[str, dict[str, pd.DataFrame]] | None:
        """Find the prepared run whose data have this `fingerprint`; return the fingerprint of its folds, and its tables.

        Searches first the prepared run that the parameter `prepare_run` of `run` names (it need not be listed), then the
        listed runs. Returns None if no prepared run matches.
        """
        named = named_folder(run.parameters.get("prepare_run"), run.folder)
        # The run in the parameter is read first, because it most likely matches and computing a fingerprint takes seconds.
        if named is not None and named.resolve() not in self._read:
            self._unread.insert(0, named.resolve())
        while fingerprint not in self._by_fingerprint and self._unread:
            folder = self._unread.pop(0)
            if folder in self._read:
                continue
            self._read.add(folder)
            try:
                tables = read_prepared(folder)
            except (OSError, ValueError):
                continue  # the leaderboard has a row for that run, whose remark states the error
            self._by_fingerprint[data_fingerprint(**tables)] = data_fingerprint(folds=tables["folds"]), tables
        return self._by_fingerprint.get(fingerprint)

    def find_for_nested(self, runs: tuple[ListedRun, ...]) -> tuple[str, dict[str, pd.DataFrame]]:
        """Find the prepared run that `runs` were trained on; return the fingerprint of its folds, and its tables.

        `runs` are one run of an ensemble, or all runs that trained nested folds of one model. Each network was trained on
        only a part of the prepared run, so `find` cannot find it; the parameter `prepare_run` of the first of `runs` names
        it. Raises RunError if the prepared run does not exist, if its folds have another fingerprint than those of one of
        `runs`, or if a network's training data are not the prepared run's data minus the outer fold.
        """
        run = runs[0]
        folder = named_folder(run.parameters.get("prepare_run"), run.folder)
        if folder is None:
            name = run.parameters.get("prepare_run")
            raise RunError(f"the parameter prepare_run is {name!r}, but this prepared run does not exist")
        tables = read_prepared(folder)
        fingerprint = data_fingerprint(folds=tables["folds"])
        folds = tables["folds"]
        fingerprint_without: dict[str, str] = {}
        for trained in runs:
            if trained.metrics.get("folds_fingerprint") != fingerprint:
                raise RunError(f"{trained.name} was trained with other folds than those in {folder}")
            for name, metrics in trained.folds.items():
                outer = str(name).partition("/")[0]
                if outer not in fingerprint_without:
                    part = {**tables, "folds": folds[folds["fold"] != int(outer)]}
                    fingerprint_without[outer] = data_fingerprint(**part)
                if metrics.get("data_fingerprint") != fingerprint_without[outer]:
                    raise RunError(f"fold {name} of {trained.name} has training data other than {folder} minus fold {outer}")
        return fingerprint, tables
