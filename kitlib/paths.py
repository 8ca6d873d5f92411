"""The one place that knows where inputs are and where results go: on Kaggle, and elsewhere."""

import os
import tempfile
from pathlib import Path


class InputNotFound(FileNotFoundError):
    """No folder for an input; the message lists what is there."""


def kaggle_root() -> Path:
    """`/kaggle`, or KIT_KAGGLE_ROOT where a rehearsal cannot make that folder."""
    return Path(os.environ.get("KIT_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    return (kaggle_root() / "working").is_dir()


def project_root() -> Path:
    """The folder that holds `kitlib` (a clone), or KIT_ROOT where the library was unpacked from a kernel."""
    return Path(os.environ.get("KIT_ROOT", Path(__file__).resolve().parent.parent))


def inputs_root() -> Path:
    return kaggle_root() / "input" if on_kaggle() else project_root() / "inputs"


def runs_root() -> Path:
    """Where run folders are made: kept by Kaggle as the kernel's output, or `runs/` of the project."""
    return kaggle_root() / "working" if on_kaggle() else project_root() / "runs"


def scratch_root() -> Path:
    """For what need not be kept (decoded images): outside Kaggle's 20 GB output folder."""
    return Path(tempfile.gettempdir()) / "kit" if on_kaggle() else project_root() / "runs" / "scratch"


def run_path(name: str | Path) -> Path:
    """Where the run `name` is written: below the runs' root, unless it is an absolute path."""
    return runs_root() / name


def find_run(name: str | Path) -> Path:
    """A finished run to read: made here, or attached as a Kaggle input. Raises InputNotFound."""
    return run_path(name) if run_path(name).is_dir() else find_input(str(name))


def find_input(slug: str, root: str | Path | None = None) -> Path:
    """The folder of the dataset or competition `slug` in any of Kaggle's three mount layouts, below `root`.

    An existing path is returned as it is. Otherwise: `<root>/<slug>`, `<root>/competitions/<slug>` and
    `<root>/datasets/<owner>/<slug>`. Raises InputNotFound.
    """
    root = Path(root) if root else inputs_root()
    direct = [Path(slug), root / slug, root / "competitions" / slug]
    owned = sorted((root / "datasets").glob(f"*/{Path(slug).name}")) if (root / "datasets").is_dir() else []
    for folder in (*direct, *owned):
        if folder.is_dir():
            return folder
    there = sorted(str(entry.relative_to(root)) for pattern in ("*", "*/*") for entry in root.glob(pattern))
    listing = "\n  ".join(there[:50]) if there else "nothing (the folder is missing or empty)"
    raise InputNotFound(f"no input {slug!r} below {root}. See inputs/README.md for how it is got. There is:\n  {listing}")
