"""Stand-in for Kaggle's Docker image: a folder with those installed packages that the image has at the same version.

A package that is neither in the image nor in the wheels dataset is missing in a rehearsal, as it is on Kaggle.
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
from kitlib.kernels.wheels import UNTIED, image_pins, read_pins
from kitlib.paths import project_root

logger = logging.getLogger(__name__)
KEY = "key.json"


def link_kaggle_packages(folder: str | Path | None = None, image: Mapping[str, str] | None = None) -> Path:
    """Fill `folder` with hard links to the installed packages that Kaggle's Docker image has too; return `folder`.

    The default folder is `build/stand-in`. An existing folder is reused if Python, the packages and this module are
    unchanged. `image` maps the canonical names of the image's packages to their versions (default: from kaggle_image.txt).
    Raises KernelError if a package that kernels may import is installed at another version than the image's, or if a package
    that rehearsals need is not installed.
    """
    folder = Path(folder or project_root() / "build" / "stand-in")
    image = image_pins() if image is None else image
    distributions = _matching_distributions(image)
    key = {
        "python": sys.version,
        "site": _site_packages().as_posix(),
        "packages": {d.name: d.version for d in distributions},
    }
    key["digest"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key_path = folder / KEY
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        # If two rehearsals start at once, the second waits and then uses the folder that the first has made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not key_path.is_file() or json.loads(key_path.read_text(encoding="utf-8")) != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _link_distributions(distributions, folder)
            write_json(key_path, key)
            logger.info("stand-in for Kaggle's Docker image: %d packages in %s", len(distributions), folder)
        _link_compiled(folder)
    return folder


def create_environment(folder: str | Path, packages: str | Path) -> Path:
    """Create a virtual environment in `folder` that can also import from the folder `packages`; return its Python's path.

    Installing into the environment does not change `packages`.
    """
    folder = Path(folder)
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(folder)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "image.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n", encoding="utf-8")
    return folder / "bin" / "python"


def _site_packages() -> Path:
    return Path(str(importlib.metadata.distribution("torch").locate_file(""))).resolve()


def _matching_distributions(image: Mapping[str, str]) -> list[importlib.metadata.Distribution]:
    """Return the installed packages that rehearsals may use, as distributions; `image` maps package names to versions.

    Returned are packages with the image's version, packages of the image in UNTIED with any version, and packages that torch
    requires and the image lacks. Kernels may import the packages in requirements.txt and their dependencies: raises
    KernelError if the version of one of these is not the image's. Other packages whose version differs are not returned.
    Raises KernelError if a package that rehearsals need is not installed.
    """
    distributions = importlib.metadata.distributions()
    installed: dict[str, importlib.metadata.Distribution] = {canonicalize_name(dist.name): dist for dist in distributions}
    matching = {
        name
        for name, dist in installed.items()
        if dist.version.split("+")[0] == image.get(name) or (name in UNTIED and name in image)
    }
    importable = find_dependencies(read_pins(project_root() / "requirements.txt"), installed)
    mismatched = [
        f"{name} {installed[name].version} (the image has {image[name]})"
        for name in sorted(importable & set(image) - matching)
    ]
    if mismatched:
        raise KernelError(f"installed versions differ from Kaggle's Docker image: {', '.join(mismatched)}; run `make` again")
    missing = [name for name in ("pip", "papermill", "ipykernel") if name not in installed]
    if missing:
        raise KernelError(f"a rehearsal needs packages that are not installed: {', '.join(missing)}; run `make` again")
    # kaggle_image.txt lists the CPU image. The GPU image also has the CUDA packages that torch requires. Listed packages are
    # excluded, because those at another version are tools; any others have raised an error above.
    torch_dependencies = {name for name in find_dependencies(["torch"], installed) if name not in image}
    return [installed[name] for name in sorted(matching | torch_dependencies)]


def find_dependencies(names: Iterable[str], installed: Mapping[str, importlib.metadata.Distribution]) -> set[str]:
    """Return the names of the installed packages among `names` and, recursively, of the installed packages they require.

    All names are canonical. `installed` maps the names of all installed packages to their distributions.
    """
    dependencies, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in dependencies or name not in installed:
            continue
        dependencies.add(name)
        requirements = map(Requirement, installed[name].requires or [])
        waiting += [
            canonicalize_name(requirement.name)
            for requirement in requirements
            if not requirement.marker or requirement.marker.evaluate({"extra": ""})
        ]
    return dependencies


def _link_distributions(distributions: list[importlib.metadata.Distribution], folder: Path) -> None:
    site, folders = _site_packages(), set()
    for distribution in distributions:
        for file in distribution.files or []:
            # A kernel only imports packages; it does not need their commands and data files outside of the packages folder.
            if ".." in file.parts or file.suffix == ".pyc":
                continue
            target = folder / file
            if target.parent not in folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
            _link_file(site / file, target)


def _link_compiled(folder: Path) -> None:
    """Add links to the .pyc files that Python has compiled since `folder` was filled.

    Without .pyc files, torch takes half a minute to import. Kernels write no .pyc files: their packages are read-only.
    """
    site, ending = str(_site_packages()), f".{sys.implementation.cache_tag}.pyc"
    for parent, _, files in os.walk(folder):
        origin = f"{site}{parent.removeprefix(str(folder))}/__pycache__"
        if parent.endswith("__pycache__") or not os.path.isdir(origin):
            continue
        compiled = f"{parent}/__pycache__"
        linked = os.listdir(compiled) if os.path.isdir(compiled) else []
        available = {file[:-3] + ending for file in files if file.endswith(".py")} & set(os.listdir(origin))
        for name in available.difference(linked):
            os.makedirs(compiled, exist_ok=True)
            _link_file(Path(origin, name), Path(compiled, name))


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        # The two OpenCV packages list the same files, and some packages list files that were removed after installing.
        return
    except OSError:
        # The folder is on another file system, or the file system has no hard links.
        shutil.copy2(source, target)
