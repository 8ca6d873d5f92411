"""What a run folder says of how it came about: record.json, and metrics.json, which marks a finished run."""

import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kitlib
from kitlib.atomic import write_json
from kitlib.errors import RunError
from kitlib.paths import project_root, run_path

RECORD, METRICS = "record.json", "metrics.json"
DIGEST_FILE = "whole_library.sha256"  # in the part of kitlib that a kernel carries

# Packages that pixels, weights or figures depend on.
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ultralytics",
    "pytorch-lightning",
    "torchmetrics",
    "albumentations",
    "opencv-python",
    "safetensors",
    "pydicom",
    "pylibjpeg",
    "imagecodecs",
    "pillow",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "ensemble-boxes",
    "papermill",
)

# How Kaggle's image tells which it is: its Dockerfile writes the two files, and its notebooks have the variable.
IMAGE_VARIABLE, IMAGE_FILES = "KAGGLE_DOCKER_IMAGE", {"commit": "/etc/git_commit", "built": "/etc/build_date"}

# ru_maxrss is in KiB on Linux, in bytes on macOS.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024

# IPython's history of a notebook, in its globals.
HISTORY = ("In", "Out")


def start_run(name: str | Path, values: Mapping[str, Any]) -> Path:
    """The folder of the run `name`, made if need be, with a new record.json and without metrics.json.

    Of `values`, a notebook's `globals()` before anything was computed, the parameters are kept: what JSON can say, under a
    public name in small letters.
    """
    folder = run_path(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)
    write_json(
        folder / RECORD,
        {
            "parameters": _parameters(values),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "started_unix": round(time.time(), 3),
            "host": platform.node(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "python": platform.python_version(),
            "image": _image(),
            "kaggle_run_type": os.environ.get("KAGGLE_KERNEL_RUN_TYPE"),
            "git_commit": git_commit(project_root()),
            "kitlib_digest": kitlib_digest(),
            "versions": package_versions(),
        },
    )
    return folder


def finish_run(run: str | Path, metrics: Mapping[str, Any]) -> None:
    """Complete the record with wall time, memory and GPU, then write `metrics` as metrics.json; NaN becomes null.

    Raises RunError where `start_run` has not been called.
    """
    path = Path(run) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        started = float(record["started_unix"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is missing or damaged ({error!r}); call start_run before finish_run") from error
    write_json(path, {**record, "wall_s": round(time.time() - started, 2), **process_record()})
    write_json(Path(run) / METRICS, _without_nan(dict(metrics)))


def process_record() -> dict[str, Any]:
    """Versions, peak memory and GPU of this process so far, in JSON's types; memory in MB of 10^6 bytes.

    `peak_memory_mb` is this process's, `peak_child_memory_mb` that of the largest of its children that have ended, None
    where none was larger than this process (a started program counts as large as what started it);
    `gpu` and `peak_gpu_memory_mb` (tensors of torch, the fullest GPU) are None where torch has used none.
    """
    own, children = _peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_BYTES
    return {
        "versions": package_versions(),
        "peak_memory_mb": round(own / 1e6),
        "peak_child_memory_mb": round(children / 1e6) if children > own else None,
        **_gpu_record(),
    }


def _peak_bytes() -> int:
    # What a program started with in its parent's place counts in ru_maxrss too, but not here.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


def package_versions() -> dict[str, str]:
    """Versions of kitlib and of the installed packages that figures depend on."""
    found = {"kitlib": kitlib.__version__}
    for name in PACKAGES:
        try:
            found[name] = _version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _version(name: str) -> str:
    return version(name)  # reads and parses a file each time; errors are not kept: a kernel installs wheels as it goes


def kitlib_digest() -> str:
    """SHA-256 (hex) over kitlib's Python files and the YAML that they read.

    A kernel carries only the part of them that it imports, and beside it the digest of the library that it was built from.
    """
    digest, folder = hashlib.sha256(), Path(kitlib.__file__).parent
    if (folder / DIGEST_FILE).is_file():
        return (folder / DIGEST_FILE).read_text(encoding="ascii")
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def git_commit(folder: str | Path) -> str | None:
    """The commit of the clone `folder`, with `+changes` where its files differ from it; None where git cannot tell."""
    # Without this, git would go on to a repository that merely contains the folder.
    if not (Path(folder) / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: str | Path, *arguments: str) -> str:
    # Only looking: another process may be committing, and must not find the index locked.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=environment).stdout.strip()


def _gpu_record() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {"gpu": None, "peak_gpu_memory_mb": None}
    peaks = {index: torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
    used = [index for index, peak in peaks.items() if peak]
    if not used:
        return {"gpu": None, "peak_gpu_memory_mb": None}
    names = ", ".join(torch.cuda.get_device_name(index) for index in used)
    return {"gpu": names, "peak_gpu_memory_mb": round(max(peaks.values()) / 1e6)}


def _image() -> dict[str, str]:
    told = {"platform": platform.platform()}
    if os.environ.get(IMAGE_VARIABLE):
        told["name"] = os.environ[IMAGE_VARIABLE]
    for key, path in IMAGE_FILES.items():
        if Path(path).is_file():
            told[key] = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return told


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    # Names in capitals are constants that a notebook has imported.
    public = {name: value for name, value in values.items() if not (name.startswith("_") or name.isupper())}
    return {name: _without_nan(value) for name, value in public.items() if name not in HISTORY and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _without_nan(value: Any) -> Any:
    """`value` with null for what JSON's numbers cannot be."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
