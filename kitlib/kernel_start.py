"""What a kernel does before it has kitlib: install the attached wheels without a network, unpack the embedded library.

The source of this file is the first cell of a built kernel, so it needs nothing but the standard library.
"""

import base64
import importlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

# A deadline counts from here, not from when the models are there. In seconds of time.monotonic().
os.environ.setdefault("KIT_STARTED", str(time.monotonic()))


def attached_folder(slug: str) -> Path:
    """Where Kaggle has put the dataset `slug`, in any of its layouts. Raises FileNotFoundError with what is there."""
    root = Path(os.environ.get("KIT_KAGGLE_ROOT", "/kaggle")) / "input"
    for folder in (root / slug, *sorted((root / "datasets").glob(f"*/{slug}"))):
        if folder.is_dir():
            return folder
    there = "\n  ".join(sorted(str(entry) for pattern in ("*", "*/*") for entry in root.glob(pattern))[:50])
    raise FileNotFoundError(f"the dataset {slug!r} is not attached. Below {root} there is:\n  {there or 'nothing'}")


def install_wheels(slug: str) -> list[str]:
    """Install from the dataset `slug` each wheel whose version is not there yet; returns them as name==version."""
    folder, started = attached_folder(slug), time.time()
    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = None
        if there != version:
            missing.append(f"{name}=={version}")
    if missing:
        # --no-deps: otherwise pip would replace the image's own torch and OpenCV.
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
        command += ["--disable-pip-version-check", "--root-user-action=ignore", "--find-links", str(folder), *missing]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"pip cannot install {', '.join(missing)} from {folder}:\n{done.stdout}")
        importlib.invalidate_caches()
    print(f"installed in {time.time() - started:.1f} s: {', '.join(missing) or 'nothing, all is there'}")
    return missing


def unpack_library(packed: str) -> Path:
    """Put the embedded library (base64 of a zip) into a new folder, first on the path of this and of started processes."""
    folder = Path(tempfile.mkdtemp(prefix="kit-"))
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(packed))) as opened:
        opened.extractall(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ["KIT_ROOT"] = str(folder)
    return folder
