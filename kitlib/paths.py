"""The one place that knows where inputs are and where results go: on Kaggle, and elsewhere."""

import os
import tempfile
from pathlib import Path

from kitlib.errors import InputNotFound


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
    return run_path(name) if run_path(name).is_dir() else find_input(name)


def find_input(slug: str | Path, root: str | Path | None = None) -> Path:
    """The folder of the input `slug` below `root`, in any of Kaggle's mount layouts. A path (with a `/`) is taken as it is.

    `<root>/<slug>`, `<root>/competitions/<slug>`, `<root>/datasets/<owner>/<slug>`, and for a run saved by a kernel
    `<root>/<kernel>/<slug>` or `<root>/notebooks/<owner>/<kernel>/<slug>`; where several kernels have runs of one name,
    `<kernel>/<run>` tells them apart. Raises InputNotFound.
    """
    root, slug = Path(root) if root else inputs_root(), str(slug)
    if "/" in slug and Path(slug).is_dir():
        return Path(slug)
    layouts: tuple[str, ...] = (slug, f"competitions/{slug}", f"datasets/*/{slug}", f"notebooks/*/{slug}", f"*/{slug}")
    layouts += (f"datasets/*/*/{slug}", f"notebooks/*/*/{slug}")
    if Path(slug).is_absolute():
        layouts = ()
    for folder in (found for layout in layouts for found in sorted(root.glob(layout))):
        if folder.is_dir():
            return folder
    there = sorted(str(entry.relative_to(root)) for pattern in ("*", "*/*") for entry in root.glob(pattern))
    listing = "\n  ".join(there[:50]) if there else "nothing (the folder is missing or empty)"
    raise InputNotFound(f"no input {slug!r} below {root}. See inputs/README.md for how it is got. There is:\n  {listing}")
