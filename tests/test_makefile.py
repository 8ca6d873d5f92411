"""`make` refuses an unfit Python or .venv in one sentence, before it installs anything."""

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
    """A stand-in for Python: says whether it is new enough, notes what else it is asked, and installs nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not new_enough)}\necho "$@" >> "{path}.asked"\nexit 1\n')
    path.chmod(0o755)
    return path


def make(project, chosen):
    # As from a shell, also where these tests run under `make test`.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    command = ["make", "lint", f"PYTHON={chosen}"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    *sentences, last = done.stderr.splitlines()
    assert last.startswith("make: ***")
    return sentences, done.stdout


def test_an_old_python_is_refused(project):
    old = python(project / "python3.10", new_enough=False)
    told, printed = make(project, old)
    assert told == [f"Python 3.11 or newer is needed, and {old} is not; name one: make PYTHON=/path/to/python3.12"]
    assert printed == "" and not Path(f"{old}.asked").exists() and not (project / ".venv").exists()


def test_where_there_is_no_python_one_is_asked_for(project):
    told, printed = make(project, "")
    assert told == ["Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12"] and printed == ""


def test_a_venv_of_an_old_python_is_refused(project):
    old = python(project / ".venv" / "bin" / "python", new_enough=False)
    told, printed = make(project, sys.executable)
    assert told == [".venv belongs to a Python that is older than 3.11 or gone; remove it (rm -rf .venv) and run make again"]
    assert printed == "" and not Path(f"{old}.asked").exists()


def ready(project, requirements):
    """Marks .venv as made of these, before the files were written."""
    path = project / ".venv" / ".ready"
    path.write_text(requirements)
    os.utime(path, (0, 0))


@pytest.mark.parametrize("line", ["pandas==2.3.3\n", "kaggle==2.2.4\n", "absl-py==1.4.0\n"])
def test_a_venv_of_other_requirements_is_refused(project, line):
    here = python(project / ".venv" / "bin" / "python")
    requirements = "".join((project / name).read_text() for name in SOURCES)
    assert line in requirements
    ready(project, requirements.replace(line, ""))
    told, printed = make(project, sys.executable)
    assert told == [".venv was made of other requirements; remove it (rm -rf .venv) and run make again"]
    assert printed == "" and not Path(f"{here}.asked").exists()


def test_a_venv_of_the_same_requirements_is_used_though_their_files_are_newer(project):
    here = python(project / ".venv" / "bin" / "python")
    ready(project, "".join((project / name).read_text() for name in SOURCES))
    _, printed = make(project, sys.executable)
    assert printed.startswith("Installing into .venv")
    assert Path(f"{here}.asked").read_text().startswith("-m pip install")  # the stand-in fails, and make ends
