"""Packages that Kaggle's image lacks, installed inside a kernel from an attached dataset, without a network."""

import importlib
import importlib.metadata
import logging
import subprocess
import sys
import time

from kitlib.paths import find_input

logger = logging.getLogger(__name__)


def install_wheels(slug: str) -> list[str]:
    """Install from the dataset `slug` each wheel whose version is not there yet; returns them as name==version.

    Raises InputNotFound, or RuntimeError with what pip said.
    """
    folder, started = find_input(slug), time.monotonic()
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
    logger.info("installed in %.1f s: %s", time.monotonic() - started, ", ".join(missing) or "nothing, all is there")
    return missing
