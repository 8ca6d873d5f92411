"""Which prepared run the models of listed runs were trained on: found by fingerprints, never by a name alone."""

from pathlib import Path
from typing import Any

import pandas as pd

from kitlib.bundle import data_fingerprint
from kitlib.errors import InputNotFound, RunError
from kitlib.leaderboard.listing import ListedRun
from kitlib.paths import find_run
from kitlib.runs.finished_run import read_prepared


class PreparedRuns:
    """Tables of prepared runs, found by the data fingerprint of what was trained on them."""

    def __init__(self, runs: list[ListedRun]) -> None:
        self._unread = [run.folder for run in runs if run.kind == "prepared" and run.state == "finished"]
        self._found: dict[str, tuple[str, dict[str, pd.DataFrame]]] = {}

    def find(self, fingerprint: str, run: ListedRun) -> tuple[str, dict[str, pd.DataFrame]] | None:
        """The folds' fingerprint and the tables; also where `run` names its prepared run, not among those listed."""
        named = named_folder(run.parameters.get("prepare_run"), run)
        # The one that is named first: computing a fingerprint takes seconds.
        self._unread.sort(key=lambda folder: named is None or folder.resolve() != named.resolve())
        if named is not None and named not in self._unread:
            self._unread.insert(0, named)
        while fingerprint not in self._found and self._unread:
            try:
                tables = read_prepared(self._unread.pop(0))
            except (OSError, ValueError):
                continue  # it has a line of its own, which says so
            self._found[data_fingerprint(**tables)] = data_fingerprint(folds=tables["folds"]), tables
        return self._found.get(fingerprint)

    def find_whole(self, runs: tuple[ListedRun, ...]) -> tuple[str, dict[str, pd.DataFrame]]:
        """The same for ensembles and learners of nested folds, whose models were trained on parts of the prepared run.

        It is the run that they name, if its folds are those that they say, and if each nested model's data are the rest of
        it without the model's outer fold. Raises RunError where that is not so.
        """
        run = runs[0]
        folder = named_folder(run.parameters.get("prepare_run"), run)
        if folder is None:
            raise RunError(f"the prepared run {run.parameters.get('prepare_run')!r}, which it names, is not here")
        tables = read_prepared(folder)
        found = data_fingerprint(folds=tables["folds"])
        folds = tables["folds"]
        held: dict[str, str] = {}
        for each in runs:
            if each.metrics.get("folds_fingerprint") != found:
                raise RunError(f"{folder} has other folds than those it was made with")
            for name, metrics in each.folds.items():
                outer = str(name).partition("/")[0]
                if outer not in held:
                    held[outer] = data_fingerprint(**{**tables, "folds": folds[folds["fold"] != int(outer)]})
                if metrics.get("data_fingerprint") != held[outer]:
                    raise RunError(f"{folder} without fold {outer} is not what its fold {name} was trained on")
        return found, tables


def named_folder(name: Any, run: ListedRun) -> Path | None:
    """Where the run that `run` calls `name` is, also if its folder has been moved together with it."""
    if not name or not isinstance(name, str):
        return None
    for folder in (run.folder.parent / name, run.folder.parent / Path(name).name):
        if folder.is_dir():
            return folder
    try:
        return find_run(name)
    except InputNotFound:
        return None
