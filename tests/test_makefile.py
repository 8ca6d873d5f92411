"""`make` refuses an unsuitable Python or .venv with a one-sentence message, before it installs anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PROJECT

ROOT = PROJECT
SOURCES = ("requirements.txt", "requirements-tools.txt", "kitlib/kernels/kaggle_image.txt")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "kitlib" / "kernels").mkdir(parents=True)
    for name in ("Makefile", *SOURCES):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def python(path, new_enough=True):
    """Write a fake Python that answers the version check, records all other calls in PATH.calls, and installs nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not new_enough)}\necho "$@" >> "{path}.calls"\nexit 1\n')
    path.chmod(0o755)
    return path


def make(project, chosen):
    # Without the variables of an outer `make test`.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    command = ["make", "lint", f"PYTHON={chosen}"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    *sentences, last = done.stderr.splitlines()
    assert last.startswith("make: ***")
    return sentences, done.stdout


def test_an_old_python_is_refused(project):
    old = python(project / "python3.10", new_enough=False)
    errors, printed = make(project, old)
    assert errors == [f"Python 3.11 or newer is required, and {old} is older; choose one: make PYTHON=/path/to/python3.12"]
    assert printed == "" and not Path(f"{old}.calls").exists() and not (project / ".venv").exists()


def test_a_missing_python_is_an_error(project):
    errors, printed = make(project, "")
    assert errors == ["Python 3.11 or newer is required; choose one: make PYTHON=/path/to/python3.12"] and printed == ""


def test_a_venv_of_an_old_python_is_refused(project):
    old = python(project / ".venv" / "bin" / "python", new_enough=False)
    errors, printed = make(project, sys.executable)
    assert errors == [
        "the Python of .venv is older than 3.11 or no longer exists; remove .venv (rm -rf .venv) and run make again"
    ]
    assert printed == "" and not Path(f"{old}.calls").exists()


def ready(project, requirements):
    """Mark .venv as made from `requirements`, with a time stamp older than the project's files."""
    path = project / ".venv" / ".ready"
    path.write_text(requirements)
    os.utime(path, (0, 0))


@pytest.mark.parametrize("line", ["pandas==2.3.3\n", "kaggle==2.2.5\n", "absl-py==1.4.0\n"])
def test_a_venv_of_other_requirements_is_refused(project, line):
    fake = python(project / ".venv" / "bin" / "python")
    requirements = "".join((project / name).read_text() for name in SOURCES)
    assert line in requirements
    ready(project, requirements.replace(line, ""))
    errors, printed = make(project, sys.executable)
    assert errors == [".venv was made from other requirements; remove it (rm -rf .venv) and run make again"]
    assert printed == "" and not Path(f"{fake}.calls").exists()


def test_a_venv_of_the_same_requirements_is_used_even_if_their_files_are_newer(project):
    fake = python(project / ".venv" / "bin" / "python")
    # A comment that has changed is no other requirement.
    ready(project, "# an older comment\n" + "".join((project / name).read_text() for name in SOURCES))
    _, printed = make(project, sys.executable)
    assert printed.startswith("Installing into .venv")
    assert Path(f"{fake}.calls").read_text().startswith("-m pip install")  # the fake Python fails, and make stops
