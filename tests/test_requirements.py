"""The installed packages have no conflicts by pip's rules, and those that kernels import have the image's versions.

pip runs without an index, so that it resolves with the installed packages and downloads nothing.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from kitlib.kernels.kaggle_environment import find_dependencies
from kitlib.kernels.wheels import UNTIED, image_pins, read_pins

ROOT = Path(__file__).resolve().parent.parent
KERNELS, TOOLS = ROOT / "requirements.txt", ROOT / "requirements-tools.txt"
# Conflicts that are accepted: Snakemake and its interface require packaging below 26, but kernels import the image's 26.0.
ACCEPTED = {("snakemake", "packaging"), ("snakemake-interface-common", "packaging")}

CONFLICTING = (("packaging", KERNELS), ("snakemake", TOOLS))


def pip(*arguments):
    """Run pip without an index and without this machine's settings, which may name other indexes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed():
    return {canonicalize_name(package.name): package for package in importlib.metadata.distributions()}


@pytest.fixture(scope="module")
def imported(installed):
    """Names of the packages that kernels may import."""
    return find_dependencies(read_pins(KERNELS), installed)


@pytest.mark.parametrize("requirements", [KERNELS, TOOLS], ids=lambda path: path.name)
def test_every_line_pins_the_installed_version(requirements, installed):
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("-c ")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = read_pins(requirements)
    assert len(pins) == len(lines)
    assert {name: installed[name].version.split("+")[0] for name in pins} == pins


def test_pip_resolves_the_requirements_without_a_conflict():
    done = pip("install", "--dry-run", "--requirement", str(KERNELS))
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_pip_refuses_requirements_that_conflict():
    """Shows that the test above can fail: Snakemake does limit packaging's version."""
    done = pip("install", "--dry-run", *(f"{name}=={read_pins(path)[name]}" for name, path in CONFLICTING))
    assert done.returncode == 1
    assert "snakemake" in done.stderr and "packaging" in done.stderr


def test_the_tools_leave_no_conflict_but_the_accepted_ones():
    conflicts = [line.split() for line in pip("check").stdout.splitlines() if line != "No broken requirements found."]
    # "snakemake 9.27.1 has requirement packaging<26,>=24.0, but you have packaging 26.0."
    assert {(canonicalize_name(words[0]), canonicalize_name(words[-2])) for words in conflicts} == ACCEPTED


def test_packages_that_kernels_import_have_the_versions_of_the_image(installed, imported):
    image = image_pins()
    versions = {name: installed[name].version.split("+")[0] for name in imported & set(image) - set(UNTIED)}
    assert len(versions) > 80  # of about 140; the others are not in the image
    assert versions == {name: image[name] for name in versions}


def test_lines_with_a_star_are_the_packages_that_the_image_lacks():
    """The command for a notebook on Kaggle in docs/kaggle.md installs these."""
    lines = KERNELS.read_text(encoding="utf-8").splitlines()
    starred = {canonicalize_name(line.split("==")[0]) for line in lines if "# *" in line and "==" in line}
    assert starred == set(read_pins(KERNELS)) - set(image_pins())


def test_kernels_import_none_of_the_tools(imported):
    assert set(read_pins(TOOLS)) & imported == set(UNTIED)
