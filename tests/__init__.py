"""Tests, in folders named as the rooms of kitlib that they test, and `notebooks`; what several of them share lies here."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
# Real X-rays on this project's own machines; tests that need them are marked `real_data`.
REAL_DATA = PROJECT.parent / "shared" / "data"
