"""The wheel dataset: what the kit's notebooks import and Kaggle's image lacks, at the pins of requirements.txt."""

import logging
import os
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

# Training needs no more than inference. What carries out plans and pushes kernels (Snakemake, Kaggle's client) stays here.
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
# (wheel, requirement): why the kernel does without it. Both were seen not to be imported by training and running a detector.
HARMLESS = {
    (
        "ultralytics",
        "nvidia-ml-py",
    ): "pynvml is imported only to choose an idle GPU (device=-1) or for the web service",
    ("ultralytics", "ultralytics-platform"): "a client of a web service, imported when one of its classes is asked for",
}
IMAGE_PYTHON = (3, 12)
# The image is Ubuntu 22.04, whose glibc is 2.35.
IMAGE_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)]
IMAGE_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def image_pins() -> dict[str, str]:
    """Version of each package of Kaggle's image, by canonical name."""
    return read_pins(Path(__file__).with_name("kaggle_image.txt"))


def inference_pins(requirements: str | Path | None = None) -> dict[str, str]:
    """Versions of `INFERENCE` in requirements.txt. Raises KernelError for one that is not pinned or that the image has."""
    requirements = Path(requirements or project_root() / "requirements.txt")
    pins, image = read_pins(requirements), image_pins()
    for name in INFERENCE:
        if name not in pins:
            raise KernelError(f"{requirements} does not pin {name}; add `{name}==VERSION`")
        if name in image:
            raise KernelError(f"Kaggle's image has {name} {image[name]}; take it out of kitlib.kernels.wheels.INFERENCE")
    return {name: pins[name] for name in INFERENCE}


def read_pins(path: str | Path) -> dict[str, str]:
    """`name==version` lines of a requirements file by canonical name; comments and options are skipped."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("-"))
    return {canonicalize_name(name.strip()): version.strip() for name, version in pairs}


def kaggle_wheels(pins: Mapping[str, str], cache: str | Path | None = None) -> list[Path]:
    """Wheels of `pins` for Kaggle's image, from the cache (default `build/wheels`), else downloaded into it; sorted."""
    chosen = ["--python-version", "{}.{}".format(*IMAGE_PYTHON), "--implementation", "cp"]
    for abi in ("cp312", "abi3", "none"):
        chosen += ["--abi", abi]
    for platform in IMAGE_PLATFORMS:
        chosen += ["--platform", platform]
    return _cached(pins, Path(cache or project_root() / "build" / "wheels"), image_tags(), chosen)


def running_wheels(pins: Mapping[str, str], cache: str | Path | None = None) -> list[Path]:
    """The same for the interpreter that runs this (default cache `build/wheels-cp311` and the like)."""
    name = f"wheels-cp{sys.version_info.major}{sys.version_info.minor}"
    return _cached(pins, Path(cache or project_root() / "build" / name), frozenset(sys_tags()), [])


def image_tags() -> frozenset[Tag]:
    """Wheel tags that Kaggle's image can install."""
    compiled = cpython_tags(IMAGE_PYTHON, platforms=IMAGE_PLATFORMS)
    return frozenset([*compiled, *compatible_tags(IMAGE_PYTHON, "cp312", IMAGE_PLATFORMS)])


def pins_of(wheels: Iterable[Path]) -> dict[str, str]:
    """Names and versions that files of wheels say in their names. Raises KernelError for anything but a wheel."""
    return {name: version for name, version, _ in map(_parse, wheels)}


def suits_running(wheels: Iterable[Path]) -> bool:
    """Whether the interpreter that runs this can install every one of these wheels."""
    tags = frozenset(sys_tags())
    return all(_parse(wheel)[2] & tags for wheel in wheels)


def check_wheels(wheels: Iterable[Path], image: Mapping[str, str]) -> None:
    """Raise KernelError with every fault: a wheel the image cannot install, or a requirement that nothing there satisfies.

    `image` maps canonical names to versions. Requirements of extras do not count; markers are those of the image.
    """
    wheels = sorted(wheels)
    attached = pins_of(wheels)
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
        name, _, tags = _parse(wheel)
        if not tags & image_tags():
            faults.append(f"{wheel.name} is not for Python 3.12 on Linux with glibc 2.35")
        metadata = _metadata(wheel)
        if metadata.requires_python and environment["python_full_version"] not in metadata.requires_python:
            faults.append(f"{wheel.name} wants Python {metadata.requires_python}")
        for requirement in metadata.requires_dist or []:
            if requirement.marker is None or requirement.marker.evaluate(environment):
                faults += _unmet(name, requirement, attached, image)
    if faults:
        raise KernelError("the wheels do not suit Kaggle's image:\n  " + "\n  ".join(faults))


def _unmet(name: str, requirement: Requirement, attached: Mapping[str, str], image: Mapping[str, str]) -> list[str]:
    wanted = canonicalize_name(requirement.name)
    there = attached.get(wanted) or image.get(wanted)
    if there is None:
        if (name, wanted) in HARMLESS:
            return []
        return [f"{name} wants {requirement}, which neither the image nor another wheel has; pin it and attach its wheel"]
    if requirement.specifier.contains(there, prereleases=True):
        return []
    place = "an attached wheel" if wanted in attached else "the image"
    return [f"{name} wants {requirement}, {place} has {wanted} {there}; pin a version of {name} that accepts it"]


def _metadata(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as opened:
        inside = [entry for entry in opened.namelist() if entry.endswith(".dist-info/METADATA") and entry.count("/") == 1]
        if len(inside) != 1:
            raise KernelError(f"{wheel} holds {len(inside)} METADATA files, a wheel has one; delete it and build again")
        return Metadata.from_email(opened.read(inside[0]), validate=False)


def _parse(wheel: Path) -> tuple[str, str, frozenset[Tag]]:
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise KernelError(f"{wheel} is no wheel, and Kaggle cannot build one offline: attach only .whl files") from error
    return name, str(version), tags


def _cached(pins: Mapping[str, str], cache: Path, tags: frozenset[Tag], options: list[str]) -> list[Path]:
    found = _find(pins, cache, tags)
    missing = [f"{name}=={version}" for name, version in pins.items() if name not in found]
    if missing:
        logger.info("downloading %d wheels into %s: %s", len(missing), cache, ", ".join(missing))
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as beside:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
            command += ["--disable-pip-version-check", *options, "--dest", beside, *missing]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise KernelError(f"pip finds no wheel for one of {', '.join(missing)}:\n{done.stderr.strip()}")
            for wheel in Path(beside).iterdir():
                os.replace(wheel, cache / wheel.name)
        found = _find(pins, cache, tags)
    absent = [f"{name}=={version}" for name, version in pins.items() if name not in found]
    if absent:
        got = ", ".join(sorted(wheel.name for wheel in cache.glob("*.whl")))
        raise KernelError(f"pip gave other versions than the pins {', '.join(absent)}; in {cache}: {got}")
    return sorted(found.values())


def _find(pins: Mapping[str, str], cache: Path, tags: frozenset[Tag]) -> dict[str, Path]:
    parsed = ((wheel, *_parse(wheel)) for wheel in sorted(cache.glob("*.whl")))
    return {name: wheel for wheel, name, version, fits in parsed if pins.get(name) == version and fits & tags}
