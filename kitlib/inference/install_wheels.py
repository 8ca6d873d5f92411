"""Installs the wheels in an attached dataset, without network access: packages that Kaggle's Docker image lacks."""

import importlib
import importlib.metadata
import logging
import subprocess
import sys
import time

from kitlib.paths import find_input

logger = logging.getLogger(__name__)


def install_wheels(slug: str) -> list[str]:
    """Install the wheels in the dataset `slug`; return the packages that were installed, each as "name==version".

    A wheel is skipped if its version is installed already. Raises InputNotFound if the dataset is not attached, and
    RuntimeError with pip's output if pip fails.
    """
    folder, started = find_input(slug), time.monotonic()
    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != version:
            missing.append(f"{name}=={version}")
    if missing:
        # --no-deps keeps pip from replacing the torch and OpenCV of Kaggle's image.
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
        command += ["--disable-pip-version-check", "--root-user-action=ignore", "--find-links", str(folder), *missing]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if process.returncode:
            raise RuntimeError(f"pip cannot install {', '.join(missing)} from {folder}:\n{process.stdout}")
        importlib.invalidate_caches()
    logger.info("installed in %.1f s: %s", time.monotonic() - started, ", ".join(missing) or "nothing, all were installed")
    return missing
