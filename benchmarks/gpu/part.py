"""What every part of `benchmarks/gpu.sh` has: the project on its path, and figures for the table."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# The kit, before the other benchmarks, which the GPU is measured with, before the tests' small data.
for folder in (PROJECT / "tests", PROJECT / "benchmarks", PROJECT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def figures(text: str) -> None:
    """Say what the table is to show of this part. The last word counts, so that a part that is stopped has one, too."""
    print(f"figures: {text}", flush=True)
