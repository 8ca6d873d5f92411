"""Runs the kit's tests marked `gpu`: training and prediction of every model family, in the given precision."""

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer
from part import PROJECT, figures

MARK = "pytest.mark.gpu"
SMALL = "test_a_segmenter_learns_two_dark_ellipses"
CLOSING = re.compile(r"\d+ (?:passed|failed|error)")


def files_with(text: str) -> list[str]:
    """Return the test files that contain `text`."""
    return [str(path) for path in sorted((PROJECT / "tests").rglob("test_*.py")) if text in path.read_text(encoding="utf-8")]


def main(precision: str, small: bool = False) -> None:
    environment = os.environ | {"KIT_PRECISION": precision, "KIT_TEST_GPU": "1"}
    # The tests launch many small GPU kernels, so several processes on different cores are faster than one.
    processes = min(6, (os.cpu_count() or 1) // 2)
    side_by_side = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
    # Only these files: others import packages for notebooks and the page, which a GPU machine may lack.
    chosen = [*files_with(f"def {SMALL}("), "-k", SMALL] if small else files_with(MARK)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-rf", "--tb=short"]
    command += ["--durations=10", *side_by_side, *chosen]
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            if CLOSING.search(line):
                figures(line.strip(" =\n"))
    sys.exit(tests.returncode)


if __name__ == "__main__":
    typer.run(main)
