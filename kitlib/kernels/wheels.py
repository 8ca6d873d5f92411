"""The wheels dataset: the packages that notebooks import and Kaggle's Docker image lacks, as pinned in requirements.txt."""

import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from kitlib.errors import KernelError
from kitlib.paths import project_root

logger = logging.getLogger(__name__)

# The packages that kernels install for training and inference. Tools that run plans or push kernels (Snakemake, Kaggle's
# client) are not needed on Kaggle.
INFERENCE = (
    "ultralytics",
    "ultralytics-thop",
    "ensemble-boxes",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "imagecodecs",
    "pebble",
)
# (wheel, its requirement) -> why kernels do not need the required package. Training and prediction do not import it.
UNNEEDED = {
    (
        "ultralytics",
        "nvidia-ml-py",
    ): "pynvml is imported only to choose an idle GPU (device=-1) or for the web service",
    ("ultralytics", "ultralytics-platform"): "a client of a web service, imported when one of its classes is used",
}
# Packages of the image that may be installed here at a later version, because Kaggle's client requires it and kernels do not
# depend on it: certifi only has root certificates, and kernels that submit have no network. kaggle_image.txt lists them with
# >=, so that pip accepts the later version.
UNTIED = ("certifi",)
IMAGE_PYTHON = (3, 12)
# The image is Ubuntu 22.04, whose glibc is 2.35.
IMAGE_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)]
IMAGE_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def image_pins() -> dict[str, str]:
    """Return the version of each package in Kaggle's Docker image, keyed by canonical name."""
    return read_pins(Path(__file__).with_name("kaggle_image.txt"))


def inference_pins(requirements: str | Path | None = None) -> dict[str, str]:
    """Return the versions of the packages in the wheels dataset (INFERENCE), keyed by canonical package name.

    The versions are read from the file `requirements` (default: requirements.txt). Raises KernelError for a package that the
    file does not pin, or that Kaggle's Docker image already has.
    """
    requirements = Path(requirements or project_root() / "requirements.txt")
    pins, image = read_pins(requirements), image_pins()
    for name in INFERENCE:
        if name not in pins:
            raise KernelError(f"{requirements} does not pin {name}; add `{name}==VERSION`")
        if name in image:
            raise KernelError(
                f"Kaggle's Docker image has {name} {image[name]}; remove {name} from kitlib.kernels.wheels.INFERENCE"
            )
    return {name: pins[name] for name in INFERENCE}


def read_pins(path: str | Path) -> dict[str, str]:
    """Return the versions in the `name==version` lines of a requirements file, keyed by canonical package name.

    A line `name>=version` is read as if it were `name==version`. Comments and options are skipped.
    """
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    pairs = (re.split("[=>]=", line, maxsplit=1) for line in lines if re.search("[=>]=", line) and not line.startswith("-"))
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def kaggle_wheels(pins: Mapping[str, str], cache: str | Path | None = None) -> list[Path]:
    """Return the sorted paths of wheels that Kaggle's Docker image can install, for the package versions in `pins`.

    Wheels that are not in the folder `cache` (default `build/wheels`) are downloaded into it. Raises KernelError if pip does
    not find a wheel.
    """
    options = ["--python-version", "{}.{}".format(*IMAGE_PYTHON), "--implementation", "cp"]
    for abi in ("cp312", "abi3", "none"):
        options += ["--abi", abi]
    for platform in IMAGE_PLATFORMS:
        options += ["--platform", platform]
    return _fetch_wheels(pins, Path(cache or project_root() / "build" / "wheels"), image_tags(), options)


def local_wheels(pins: Mapping[str, str], cache: str | Path | None = None) -> list[Path]:
    """Return the sorted paths of wheels that the running Python can install, for the package versions in `pins`.

    Wheels that are not in the folder `cache` are downloaded into it; its default is named after the Python, such as
    `build/wheels-cp311`. Raises KernelError if pip does not find a wheel.
    """
    name = f"wheels-cp{sys.version_info.major}{sys.version_info.minor}"
    return _fetch_wheels(pins, Path(cache or project_root() / "build" / name), frozenset(sys_tags()), [])


def image_tags() -> frozenset[Tag]:
    """Return the tags (Python, ABI and platform) of the wheels that Kaggle's Docker image can install."""
    compiled = cpython_tags(IMAGE_PYTHON, platforms=IMAGE_PLATFORMS)
    return frozenset([*compiled, *compatible_tags(IMAGE_PYTHON, "cp312", IMAGE_PLATFORMS)])


def parse_pins(wheels: Iterable[Path]) -> dict[str, str]:
    """Return the versions that the file names of `wheels` state, keyed by canonical package name.

    Raises KernelError for a file that is not a wheel.
    """
    return {name: version for name, version, _ in map(_parse_filename, wheels)}


def are_installable(wheels: Iterable[Path]) -> bool:
    """Return whether the running Python can install all of these wheels."""
    tags = frozenset(sys_tags())
    return all(_parse_filename(wheel)[2] & tags for wheel in wheels)


def check_wheels(wheels: Iterable[Path], image: Mapping[str, str]) -> None:
    """Raise KernelError if Kaggle's Docker image cannot install a wheel, or if a requirement of a wheel is not met.

    The message lists all these faults. `image` maps canonical package names to versions. A requirement is met by the image
    or by another wheel; markers are evaluated for the image, and requirements of extras are ignored.
    """
    wheels = sorted(wheels)
    attached = parse_pins(wheels)
    environment: dict[str, Any] = default_environment() | {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": "{}.{}.0".format(*IMAGE_PYTHON),
        "python_version": "{}.{}".format(*IMAGE_PYTHON),
        "sys_platform": "linux",
        "extra": "",
    }
    faults = []
    for wheel in wheels:
        name, _, tags = _parse_filename(wheel)
        if not tags & image_tags():
            faults.append(f"{wheel.name} is not built for Python 3.12 on Linux with glibc 2.35")
        metadata = _read_metadata(wheel)
        if metadata.requires_python and environment["python_full_version"] not in metadata.requires_python:
            faults.append(f"{wheel.name} requires Python {metadata.requires_python}")
        for requirement in metadata.requires_dist or []:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                faults += _find_unmet(name, requirement, attached, image)
    if faults:
        raise KernelError("the wheels cannot be installed in Kaggle's Docker image:\n  " + "\n  ".join(faults))


def _find_unmet(name: str, requirement: Requirement, attached: Mapping[str, str], image: Mapping[str, str]) -> list[str]:
    required = canonicalize_name(requirement.name)
    version = attached.get(required) or image.get(required)
    if version is None:
        if (name, required) in UNNEEDED:
            return []
        return [f"{name} requires {requirement}, which neither the image nor another wheel has; pin it and attach its wheel"]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    source = "an attached wheel" if required in attached else "the image"
    return [f"{name} requires {requirement}, but {source} has {required} {version}; pin a version of {name} that accepts it"]


def _read_metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        metadata_files = [
            entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA") and entry.count("/") == 1
        ]
        if len(metadata_files) != 1:
            raise KernelError(
                f"{wheel} has {len(metadata_files)} METADATA files, expected one; delete the wheel and build again"
            )
        return Metadata.from_email(archive.read(metadata_files[0]), validate=False)


def _parse_filename(wheel: Path) -> tuple[str, str, frozenset[Tag]]:
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise KernelError(
            f"{wheel} is not a wheel, and Kaggle cannot build a wheel without internet; attach only .whl files"
        ) from error
    return name, str(version), tags


def _fetch_wheels(pins: Mapping[str, str], cache: Path, tags: frozenset[Tag], options: list[str]) -> list[Path]:
    """Return the paths of wheels in `cache`, one per package in `pins`, each with one of the `tags`.

    Missing wheels are downloaded with pip and its `options`.
    """
    wheels = _find_cached(pins, cache, tags)
    missing = [f"{name}=={version}" for name, version in pins.items() if name not in wheels]
    if missing:
        logger.info("downloading %d wheels into %s: %s", len(missing), cache, ", ".join(missing))
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary_folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
            command += ["--disable-pip-version-check", *options, "--dest", temporary_folder, *missing]
            completed = subprocess.run(command, capture_output=True, text=True)
            if completed.returncode:
                raise KernelError(f"pip found no wheel for one or more of {', '.join(missing)}:\n{completed.stderr.strip()}")
            for wheel in Path(temporary_folder).iterdir():
                os.replace(wheel, cache / wheel.name)
        wheels = _find_cached(pins, cache, tags)
    absent_pins = [f"{name}=={version}" for name, version in pins.items() if name not in wheels]
    if absent_pins:
        available = ", ".join(sorted(wheel.name for wheel in cache.glob("*.whl")))
        raise KernelError(f"pip downloaded no usable wheel of {', '.join(absent_pins)}; wheels in {cache}: {available}")
    return sorted(wheels.values())


def _find_cached(pins: Mapping[str, str], cache: Path, tags: frozenset[Tag]) -> dict[str, Path]:
    parsed = ((wheel, *_parse_filename(wheel)) for wheel in sorted(cache.glob("*.whl")))
    return {name: wheel for wheel, name, version, fits in parsed if pins.get(name) == version and fits & tags}
