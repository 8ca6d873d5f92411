"""Where inputs are read from and results are written to, on Kaggle and elsewhere."""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from kitlib.errors import BundleError, InputNotFound, RunNotFound
from kitlib.phantom_marker import holds_phantoms

logger = logging.getLogger(__name__)
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")  # suffixes of PyTorch's files
WEIGHTS = (".safetensors", ".npz", *PICKLES)
RUN_RECORD = "record.json"  # in the folder of every run, see kitlib.runs.record
RUN_MARKS = (RUN_RECORD, "metrics.json", "bundle", "model.json")  # a folder of a run or model has at least one of these


def kaggle_root() -> Path:
    """Return /kaggle, or the environment variable KIT_KAGGLE_ROOT, which a rehearsal sets if it cannot create /kaggle."""
    return Path(os.environ.get("KIT_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    """Return True inside a Kaggle kernel, or inside a rehearsal, which imitates Kaggle on this machine."""
    return (kaggle_root() / "working").is_dir()


def is_saved_version() -> bool:
    """Return True in the Kaggle session that saves a version of a kernel, False in the later rerun that is scored.

    Also returns False outside Kaggle, and in a rehearsal, because a rehearsal imitates the rerun.
    """
    return on_kaggle() and not os.environ.get("KAGGLE_IS_COMPETITION_RERUN")


def project_root() -> Path:
    """Return the project's root folder: the environment variable KIT_ROOT (in kernels), else the folder above `kitlib`."""
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
    """Return the folder of the existing run `name`, in `runs_root()` or in an attached input.

    `made_by` is the notebook that makes such runs, for the error message. Raises RunNotFound if the run does not exist, or
    if several inputs have a run of this name.
    """
    found = [run_path(name)] if run_path(name).is_dir() else _find_attached_run(str(name))
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise RunNotFound(
            f"{len(found)} inputs have a run {str(name)!r}; give KERNEL/{name}, or one of these paths:\n  {listing}"
        )
    if not found:
        # Only a few levels are searched, because data sets and decoded copies have many thousand folders.
        runs, attached = (
            sorted(
                path.parent for pattern in ("*", "*/*", "notebooks/*/*/*") for path in root.glob(f"{pattern}/{RUN_RECORD}")
            )
            for root in (runs_root(), inputs_root())
        )
        names = [str(path.relative_to(runs_root())) for path in runs] + list(map(str, attached))
        names = [*names[:50], f"and {len(names) - 50} more"] if len(names) > 50 else names
        listing = "\n  ".join(names) or f"none below {runs_root()} or {inputs_root()}"
        raise RunNotFound(f"no run {str(name)!r}; execute {made_by} first, or correct the name. Found:\n  {listing}")
    logger.info("reading the run %s", found[0])
    return found[0]


def find_input(slug: str | Path, root: str | Path | None = None) -> Path:
    """Return the folder of the input `slug` below `root` (default: `inputs_root()`), in any of Kaggle's mount layouts.

    `slug` has the form SLUG, OWNER/SLUG, or SLUG/FOLDER (a folder in an input). A `slug` with a `/` may instead be the path
    of an existing folder. Kaggle mounts an input at ROOT/SLUG, or at ROOT/competitions/SLUG, ROOT/datasets/OWNER/SLUG,
    ROOT/datasets/organizations/OWNER/SLUG, ROOT/models/OWNER/SLUG or ROOT/notebooks/OWNER/SLUG. If no input has this name,
    folders directly inside inputs are searched too, such as a run in a kernel's output. Phantoms (synthetic X-rays) are
    returned only if `slug` contains a `/`, so that nobody trains on phantoms by mistake when the real data are missing.
    Raises InputNotFound if there is no such input, or if there are several; the message lists the available inputs.
    """
    root, slug, phantoms = Path(root) if root else inputs_root(), str(slug), []
    if not slug.strip("/ "):
        raise InputNotFound("the name of the input is empty; give its SLUG, as shown in the notebook's list of inputs")
    for folders in _find_folders(slug, root):
        phantoms += [folder for folder in folders if "/" not in slug and holds_phantoms(folder)]
        if real := [folder for folder in folders if folder not in phantoms]:
            if len(real) > 1:
                listing = "\n  ".join(str(folder.relative_to(root)) for folder in real)
                raise InputNotFound(
                    f"{len(real)} inputs are called {slug!r} below {root}; give OWNER/SLUG, or the path of one:\n  {listing}"
                )
            logger.info("reading the input %s", real[0])
            return real[0]
    if phantoms:
        raise InputNotFound(
            f"no input {slug!r} below {root}, only phantoms (synthetic X-rays) of that name in {phantoms[0]}; "
            "inputs/README.md says how to get the real data. To read the phantoms, give their path instead of the name"
        )
    available = sorted(str(folder.relative_to(root)) for _, folder in _mounted(root))
    listing = "\n  ".join(available[:50]) if available else "nothing (the folder is missing or empty)"
    raise InputNotFound(f"no input {slug!r} below {root}; inputs/README.md says how to get it. Available:\n  {listing}")


def find_starting_weights(path: str | Path) -> Path:
    """Return the path of the weights file or bundle folder that `path` refers to.

    `path` is an existing file or folder; the name of a run or bundle (see `find_run`); an input or a file in an input, as
    SLUG or SLUG/FILE (see `find_input`); or a Kaggle Model, as OWNER/MODEL/FRAMEWORK/VARIATION/VERSION. For the folder of
    a run, the bundle in this folder is returned. For a folder without a bundle, such as one from the Hugging Face hub, the
    only .safetensors file is returned; if there is no .safetensors file, the only other weights file. Raises BundleError if
    `path` does not exist, or if the folder has no weights file, or several to choose from.
    """
    source = Path(path)
    if not source.exists():
        source = _find_file(str(path)) if source.suffix in WEIGHTS else _find_weights_folder(path)
    if source.is_file() or (source / "model.json").is_file():
        return source
    if (source / "bundle").is_dir():
        return source / "bundle"
    files = sorted(file for file in source.iterdir() if file.suffix in WEIGHTS)
    files = [file for file in files if file.suffix == ".safetensors"] or files
    if len(files) == 1:
        return files[0]
    listing = ", ".join(file.name for file in files[:10]) or "none"
    raise BundleError(
        f"{source} holds no bundle (its model.json is missing), so it must hold one weights file, but it has {len(files)}: "
        f"{listing}; give FOLDER/FILE, or another folder"
    )


def _find_file(name: str) -> Path:
    """Return the path of a weights file, where `name` is RUN/FILE or SLUG/FILE.

    Raises BundleError if there is no such file, with a list of the available ones, or if several inputs have the file.
    """
    folder, _, file = name.rpartition("/")
    if run_path(name).is_file():
        return run_path(name)
    for folders in _find_folders(folder, inputs_root()) if folder else ():
        if found := [parent / file for parent in folders if (parent / file).is_file()]:
            if len(found) > 1:
                raise BundleError(f"{len(found)} inputs have {name}: {', '.join(map(str, found))}; give OWNER/SLUG/FILE")
            return found[0]
    available = [str(path.relative_to(inputs_root())) for path in inputs_root().glob("*/*") if path.suffix in WEIGHTS]
    raise BundleError(
        f"weights file {name!r} does not exist, and nothing is downloaded; inputs/README.md says how to get weights. "
        f"Weights files in inputs: {', '.join(sorted(available)[:20]) or 'none'}"
    )


def _find_weights_folder(path: str | Path) -> Path:
    try:
        return find_run(path)
    except InputNotFound as error:
        raise BundleError(
            f"starting weights {str(path)!r} are neither a file, a folder nor a finished run: {error}"
        ) from error


def _find_folders(name: str, root: Path) -> Iterator[list[Path]]:
    """Yield lists of folders that `name` may refer to: first as a path, then as an input, then as a folder in an input."""
    if "/" in name:
        # Jupyter starts a notebook in its own folder, so a relative path may also be one from the project's root.
        yield [path for path in (Path(name), project_root() / name) if path.is_dir()][:1]
    if Path(name).is_absolute():
        return
    mounted, parts = _mounted(root), name.split("/")
    yield _existing(folder.joinpath(*parts[1:]) for _, folder in mounted if folder.name == parts[0])
    if len(parts) > 1:
        # If an input is mounted without its owner's name, any owner is accepted.
        owned = [folder for owner, folder in mounted if owner in (parts[0], "") and folder.name == parts[1]]
        yield _existing(folder.joinpath(*parts[2:]) for folder in owned)
    yield _existing(folder / name for _, folder in mounted)


def _mounted(root: Path) -> list[tuple[str, Path]]:
    """Return a pair (owner, folder) for each input below `root`; owner is "" if the mount path does not contain it."""
    patterns = ("competitions/*", "datasets/*/*", "datasets/organizations/*/*", "models/*/*", "notebooks/*/*", "*")
    groups = [root / name for name in ("competitions", "datasets", "models", "notebooks", "datasets/organizations")]
    folders = [folder for pattern in patterns for folder in sorted(root.glob(pattern)) if folder.is_dir()]
    inputs = [folder for folder in folders if folder not in groups and folder.parent != groups[-1]]
    return [("" if folder.parent in (root, groups[0]) else folder.parent.name, folder) for folder in inputs]


def _find_attached_run(name: str) -> list[Path]:
    """Return the folders that `name` may refer to. A `name` without `/` must be an input or a folder with a run's files."""
    mounted = {folder for _, folder in _mounted(inputs_root())}
    for folders in _find_folders(name, inputs_root()):
        if runs := [path for path in folders if "/" in name or path in mounted or _holds_run(path)]:
            return runs
    return []


def _holds_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in RUN_MARKS)


def _existing(folders: Iterable[Path]) -> list[Path]:
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
