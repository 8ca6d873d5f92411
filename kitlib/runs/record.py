"""The record of a run: record.json (parameters, versions, time, memory), and metrics.json, which marks a finished run."""

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
from kitlib.paths import RUN_RECORD, project_root, run_path

RECORD, METRICS = RUN_RECORD, "metrics.json"
DIGEST_FILE = "whole_library.sha256"  # digest of the whole library, stored in the part of kitlib that a kernel contains

# Packages whose versions can change pixels, weights or figures.
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

# Kaggle's Docker image is identified by two files that its Dockerfile writes and an environment variable of its notebooks.
IMAGE_VARIABLE, IMAGE_FILES = "KAGGLE_DOCKER_IMAGE", {"commit": "/etc/git_commit", "built": "/etc/build_date"}

# ru_maxrss is in KiB on Linux, in bytes on macOS.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024

# Names under which IPython stores a notebook's history in its globals.
HISTORY = ("In", "Out")


def start_run(name: str | Path, values: Mapping[str, Any]) -> Path:
    """Create the folder of the run `name` and return it; write a new record.json into it and delete an old metrics.json.

    `values` is the result of `globals()` in a notebook that has not computed anything yet. Values that JSON can represent
    are recorded as the run's parameters, except those whose names are private or in capitals.
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
            "image": _docker_image(),
            "kaggle_run_type": os.environ.get("KAGGLE_KERNEL_RUN_TYPE"),
            "git_commit": git_commit(project_root()),
            "kitlib_digest": kitlib_digest(),
            "versions": package_versions(),
        },
    )
    return folder


def finish_run(run: str | Path, metrics: Mapping[str, Any]) -> None:
    """Add wall time, memory and GPU to record.json, then write `metrics` as metrics.json, with null for NaN and infinity.

    Raises RunError if record.json is missing or damaged, for example because `start_run` was not called for this run.
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
    """Return a dictionary of this process's package versions, and its peak memory and GPU so far, in JSON types.

    Memory is in MB of 10^6 bytes. `peak_memory_mb` is the peak of this process. `peak_child_memory_mb` is the highest peak
    of a child process that has ended. It is None unless it exceeds `peak_memory_mb`, because the system starts a child's
    peak at its parent's, so that a lower peak is unknown. `gpu` is a text with the names of the GPUs that torch has used;
    `peak_gpu_memory_mb` is the peak memory of torch tensors on the GPU with the highest peak. Both are None if torch has
    used no GPU.
    """
    peak, child_peak = _peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_BYTES
    return {
        "versions": package_versions(),
        "peak_memory_mb": round(peak / 1e6),
        "peak_child_memory_mb": round(child_peak / 1e6) if child_peak > peak else None,
        **_gpu_record(),
    }


def _peak_bytes() -> int:
    # VmHWM is the peak of this program alone; ru_maxrss includes the peak of the process that it was forked from.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


def package_versions() -> dict[str, str]:
    """Return the versions of kitlib and of the installed packages that can change results (PACKAGES), keyed by name."""
    versions = {"kitlib": kitlib.__version__}
    for name in PACKAGES:
        try:
            versions[name] = _version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def _version(name: str) -> str:
    # Cached, because version() parses a file each time. Errors are not cached: a kernel may install the package later.
    return version(name)


def kitlib_digest() -> str:
    """Return the SHA-256 digest, in hexadecimal digits, of kitlib's Python and YAML files.

    A kernel contains only the kitlib files that it imports. There, the digest is read from the file
    whole_library.sha256, which holds the digest of the whole library that the kernel was built from.
    """
    digest, folder = hashlib.sha256(), Path(kitlib.__file__).parent
    if (folder / DIGEST_FILE).is_file():
        return (folder / DIGEST_FILE).read_text(encoding="ascii")
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def git_commit(folder: str | Path) -> str | None:
    """Return the commit of the git clone `folder`, with "+changes" added if tracked files are modified; None if git fails.

    Also returns None if `folder` is not the root of a clone.
    """
    # Without this check, git would report a repository that merely contains the folder.
    if not (Path(folder) / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: str | Path, *arguments: str) -> str:
    # Without optional locks, because another process may be committing.
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


def _docker_image() -> dict[str, str]:
    image = {"platform": platform.platform()}
    if os.environ.get(IMAGE_VARIABLE):
        image["name"] = os.environ[IMAGE_VARIABLE]
    for key, path in IMAGE_FILES.items():
        if Path(path).is_file():
            image[key] = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return image


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    # Names in capitals are imported constants, not parameters.
    public = {name: value for name, value in values.items() if not (name.startswith("_") or name.isupper())}
    return {name: _without_nan(value) for name, value in public.items() if name not in HISTORY and _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)


def _without_nan(value: Any) -> Any:
    """Return `value` with NaN and infinity, which JSON cannot represent, replaced by None, and tuples by lists."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
