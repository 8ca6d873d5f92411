"""Shared by all parts of `benchmarks/gpu.sh`: puts the project on the import path, and prints figures for the table."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Inserted in reverse order of priority: the kit comes first, then the other benchmarks, then the tests' small data.
for folder in (PROJECT / "tests", PROJECT / "benchmarks", PROJECT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def figures(text: str) -> None:
    """Print the figures that the table shows for this part. The last call counts, also if the part is stopped later."""
    print(f"figures: {text}", flush=True)
