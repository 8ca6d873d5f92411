"""Where inputs are read from and results are written to, on Kaggle and elsewhere."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kitlib.errors import BundleError, InputNotFound, RunNotFound
from kitlib.phantom_marker import holds_phantoms

logger = logging.getLogger(__name__)
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
RUN_RECORD = "record.json"  # in the folder of every run, see kitlib.runs.record


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


def find_run(name: str | Path, made_by: str = "the notebook that makes it") -> Path:
    """Return the folder of the run `name`, in `runs_root()` or an input.

    `made_by` names the notebook that makes such runs. Raises RunNotFound if the run does not exist.
    """
    folder = run_path(name) if run_path(name).is_dir() else next(_find_folders(name, inputs_root()), None)
    if folder is None:
        # Not at any depth: data sets and decoded copies have many thousand folders.
        runs, attached = (
            sorted(
                path.parent for pattern in ("*", "*/*", "notebooks/*/*/*") for path in root.glob(f"{pattern}/{RUN_RECORD}")
            )
            for root in (runs_root(), inputs_root())
        )
        names = [str(path.relative_to(runs_root())) for path in runs] + list(map(str, attached))
        names = [*names[:50], f"and {len(names) - 50} more"] if len(names) > 50 else names
        listing = "\n  ".join(names) or f"none below {runs_root()} or {inputs_root()}"
        raise RunNotFound(f"no run {str(name)!r}; run {made_by} first, or correct the name. Runs:\n  {listing}")
    logger.info("reads the run %s", folder)
    return folder


def find_input(slug: str | Path, root: str | Path | None = None) -> Path:
    """Return the folder of the input `slug` below `root` (default: `inputs_root()`), in any of Kaggle's mount layouts.

    If `slug` contains a `/` and is the path of an existing folder, it is returned unchanged. Otherwise these are searched:
    `<root>/<slug>`, `<root>/competitions/<slug>`, `<root>/datasets/<owner>/<slug>`, and for a run saved by a kernel
    `<root>/<kernel>/<slug>` and `<root>/notebooks/<owner>/<kernel>/<slug>`. If several kernels have saved a run called
    `slug`, `<kernel>/<slug>` selects one. Phantoms are only returned if `slug` contains a `/`, so that nobody trains on them
    for want of the real data. Raises InputNotFound if nothing is found; the message lists the inputs that exist.
    """
    root, slug, phantoms = Path(root) if root else inputs_root(), str(slug), []
    for folder in _find_folders(slug, root):
        if "/" in slug or not holds_phantoms(folder):
            logger.info("reads the input %s", folder)
            return folder
        phantoms.append(folder)
    if phantoms:
        raise InputNotFound(
            f"no input {slug!r} below {root}, only phantoms (synthetic X-rays) of that name in {phantoms[0]}; "
            "inputs/README.md says how to get the real data. To read the phantoms, give their path instead of the name"
        )
    available = sorted(str(entry.relative_to(root)) for pattern in ("*", "*/*") for entry in root.glob(pattern))
    listing = "\n  ".join(available[:50]) if available else "nothing (the folder is missing or empty)"
    raise InputNotFound(f"no input {slug!r} below {root}; inputs/README.md says how to get it. Available:\n  {listing}")


def find_starting_weights(path: str | Path) -> Path:
    """Return the path of a weights file or a bundle folder; for a run folder, return the path of the bundle inside it.

    `path` is an existing path, or the name of a run or bundle that `find_run` looks up. Raises BundleError if nothing is
    found.
    """
    source = Path(path)
    if not source.exists():
        if source.suffix in (".safetensors", ".npz", *PICKLES):
            raise BundleError(
                f"weights file {source} does not exist; inputs/README.md says how to get it; nothing is downloaded"
            )
        try:
            source = find_run(path)
        except InputNotFound as error:
            raise BundleError(
                f"starting weights {str(path)!r} are neither a file, a folder nor a finished run: {error}"
            ) from error
    return source / "bundle" if (source / "bundle").is_dir() else source


def _find_folders(slug: str | Path, root: Path) -> Iterator[Path]:
    """Yield the folders that `slug` may mean: the path itself or, below `root`, the places that `find_input` lists."""
    slug = str(slug)
    if "/" in slug:
        # Jupyter starts a notebook in its own folder, so a relative path may also be one from the project's root.
        yield from (path for path in (Path(slug), project_root() / slug) if path.is_dir())
    if Path(slug).is_absolute():
        return
    layouts: tuple[str, ...] = (slug, f"competitions/{slug}", f"datasets/*/{slug}", f"notebooks/*/{slug}", f"*/{slug}")
    layouts += (f"datasets/*/*/{slug}", f"notebooks/*/*/{slug}")
    yield from (match for layout in layouts for match in sorted(root.glob(layout)) if match.is_dir())
