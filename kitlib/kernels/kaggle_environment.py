"""The stand-in for Kaggle's image: of the packages installed here, those that the image has, at its versions, and no others.

A package that the kernel needs and that neither the image nor the wheel dataset has is missing here too, and is noticed.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import venv
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kitlib.atomic import write_json
from kitlib.errors import KernelError
from kitlib.kernels.wheels import image_pins, read_pins
from kitlib.paths import project_root

logger = logging.getLogger(__name__)
KEY = "key.json"


def kaggle_packages(folder: str | Path | None = None, image: Mapping[str, str] | None = None) -> Path:
    """A folder of packages (default `build/stand-in`), made of hard links to those installed here; reused while they stay.

    `image` maps canonical names to versions. Raises KernelError for a package whose version is not the image's.
    """
    folder = Path(folder or project_root() / "build" / "stand-in")
    image = image_pins() if image is None else image
    kept = _kept(image)
    key = {"python": sys.version, "site": _site().as_posix(), "packages": {d.name: d.version for d in kept}}
    key["digest"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    known = folder / KEY
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        # Two rehearsals may start at once; the second takes what the first made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _link(kept, folder)
            write_json(known, key)
            logger.info("stand-in for Kaggle's image: %d packages in %s", len(kept), folder)
        _link_compiled(folder)
    return folder


def fresh_environment(folder: str | Path, packages: str | Path) -> Path:
    """An empty virtual environment on top of the stand-in's `packages`, which installing leaves alone; its Python."""
    folder = Path(folder)
    builder = venv.EnvBuilder(symlinks=True, with_pip=False)
    builder.create(folder)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "image.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n", encoding="utf-8")
    return folder / "bin" / "python"


def _site() -> Path:
    return Path(str(importlib.metadata.distribution("torch").locate_file(""))).resolve()


def _kept(image: Mapping[str, str]) -> list[importlib.metadata.Distribution]:
    """Installed packages at the image's version, and what the image's torch brings along.

    What kernels may import, requirements.txt and its dependencies, must be at the image's version. The tools beside it need
    not be: those that are not are left out.
    """
    distributions = importlib.metadata.distributions()
    installed: dict[str, importlib.metadata.Distribution] = {canonicalize_name(each.name): each for each in distributions}
    same = {name for name, found in installed.items() if found.version.split("+")[0] == image.get(name)}
    imported = with_dependencies(read_pins(project_root() / "requirements.txt"), installed)
    other = [
        f"{name} {installed[name].version} (the image has {image[name]})" for name in sorted(imported & set(image) - same)
    ]
    if other:
        raise KernelError(f"installed here at other versions than in Kaggle's image: {', '.join(other)}; run `make` again")
    absent = [name for name in ("pip", "papermill", "ipykernel") if name not in installed]
    if absent:
        raise KernelError(f"not installed here: {', '.join(absent)}; a rehearsal needs them, run `make` again")
    # The list is of the CPU variant: what torch's CUDA build asks for belongs to the GPU image although it is not listed.
    # What the image lists at another version was named above, or is a tool.
    brought = {name for name in with_dependencies(["torch"], installed) if name not in image}
    return [installed[name] for name in sorted(same | brought)]


def with_dependencies(names: Iterable[str], installed: Mapping[str, importlib.metadata.Distribution]) -> set[str]:
    """Those of `names` (canonical) that are installed, with all that they require here, as far as it is installed."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in installed:
            continue
        found.add(name)
        wanted = map(Requirement, installed[name].requires or [])
        waiting += [
            canonicalize_name(each.name) for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})
        ]
    return found


def _link(kept: list[importlib.metadata.Distribution], folder: Path) -> None:
    site, folders = _site(), set()
    for found in kept:
        for file in found.files or []:
            # Commands and data files lie outside of the packages' folder; a kernel only imports.
            if ".." in file.parts or file.suffix == ".pyc":
                continue
            target = folder / file
            if target.parent not in folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
            _link_file(site / file, target)


def _link_compiled(folder: Path) -> None:
    """Link what has been compiled since: a kernel cannot write it, and without it torch takes half a minute to import."""
    site, ending = str(_site()), f".{sys.implementation.cache_tag}.pyc"
    for parent, _, files in os.walk(folder):
        origin = f"{site}{parent.removeprefix(str(folder))}/__pycache__"
        if parent.endswith("__pycache__") or not os.path.isdir(origin):
            continue
        compiled = f"{parent}/__pycache__"
        have = os.listdir(compiled) if os.path.isdir(compiled) else []
        wanted = {file[:-3] + ending for file in files if file.endswith(".py")} & set(os.listdir(origin))
        for name in wanted.difference(have):
            os.makedirs(compiled, exist_ok=True)
            _link_file(Path(origin, name), Path(compiled, name))


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        # Both happen: the two OpenCV packages list the same files, and some lists name what was removed after installing.
        return
    except OSError:
        # another file system, or one without hard links
        shutil.copy2(source, target)
