"""Tests in folders named like the rooms of kitlib that they test, and `notebooks`; shared helpers are in this folder."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# Real X-rays on this project's own machines; tests that need them are marked `real_data`.
REAL_DATA = PROJECT.parent / "shared" / "data"
