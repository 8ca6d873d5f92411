"""Where inputs are read from and results are written to, on Kaggle and elsewhere."""

import os
import tempfile
from pathlib import Path

from kitlib.errors import InputNotFound


def kaggle_root() -> Path:
    """Return /kaggle, or the environment variable KIT_KAGGLE_ROOT, which a rehearsal sets if it cannot create /kaggle."""
    return Path(os.environ.get("KIT_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    """Return True inside a Kaggle kernel or its rehearsal."""
    return (kaggle_root() / "working").is_dir()


def project_root() -> Path:
    """Return the project's root folder: the clone that contains `kitlib`, or in a Kaggle kernel the variable KIT_ROOT."""
    return Path(os.environ.get("KIT_ROOT", Path(__file__).resolve().parent.parent))


def inputs_root() -> Path:
    """Return the folder of all inputs: /kaggle/input on Kaggle, elsewhere `inputs/` in the project's root."""
    return kaggle_root() / "input" if on_kaggle() else project_root() / "inputs"


def runs_root() -> Path:
    """Return the folder of all runs: /kaggle/working (kept as output) on Kaggle, elsewhere `runs/` in the project's root."""
    return kaggle_root() / "working" if on_kaggle() else project_root() / "runs"


def scratch_root() -> Path:
    """Return the folder for temporary data such as decoded images. On Kaggle it is outside the 20 GB output folder."""
    return Path(tempfile.gettempdir()) / "kit" if on_kaggle() else project_root() / "runs" / "scratch"


def run_path(name: str | Path) -> Path:
    """Return the folder that the run `name` is written to: below `runs_root()`, unless `name` is an absolute path."""
    return runs_root() / name


def find_run(name: str | Path) -> Path:
    """Return the folder of the run `name`, in `runs_root()` or an input. Raises InputNotFound if it does not exist."""
    if run_path(name).is_dir():
        return run_path(name)
    try:
        return find_input(name)
    except InputNotFound:
        folders = sorted(path.name for path in runs_root().glob("*") if path.is_dir())
        raise InputNotFound(
            f"no run {str(name)!r} below {runs_root()} or among the inputs in {inputs_root()}; run the notebook that makes "
            f"it first, or correct the name. Folders in {runs_root().name}: {', '.join(folders[:50]) or 'none'}"
        ) from None


def find_input(slug: str | Path, root: str | Path | None = None) -> Path:
    """Return the folder of the input `slug` below `root` (default: `inputs_root()`), in any of Kaggle's mount layouts.

    If `slug` contains a `/` and is the path of an existing folder, it is returned unchanged. Otherwise these are searched:
    `<root>/<slug>`, `<root>/competitions/<slug>`, `<root>/datasets/<owner>/<slug>`, and for a run saved by a kernel
    `<root>/<kernel>/<slug>` and `<root>/notebooks/<owner>/<kernel>/<slug>`. If several kernels have saved a run called
    `slug`, `<kernel>/<slug>` selects one. Raises InputNotFound if nothing is found; the message lists the inputs that exist.
    """
    root, slug = Path(root) if root else inputs_root(), str(slug)
    if "/" in slug and Path(slug).is_dir():
        return Path(slug)
    layouts: tuple[str, ...] = (slug, f"competitions/{slug}", f"datasets/*/{slug}", f"notebooks/*/{slug}", f"*/{slug}")
    layouts += (f"datasets/*/*/{slug}", f"notebooks/*/*/{slug}")
    if Path(slug).is_absolute():
        layouts = ()
    for folder in (match for layout in layouts for match in sorted(root.glob(layout))):
        if folder.is_dir():
            return folder
    available = sorted(str(entry.relative_to(root)) for pattern in ("*", "*/*") for entry in root.glob(pattern))
    listing = "\n  ".join(available[:50]) if available else "nothing (the folder is missing or empty)"
    raise InputNotFound(f"no input {slug!r} below {root}; inputs/README.md says how to get it. Available:\n  {listing}")
