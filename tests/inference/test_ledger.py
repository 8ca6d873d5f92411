"""The rows of a submission's ledger: seconds, files that were not decoded, warnings, and segmented lungs."""

from types import SimpleNamespace

import pytest

from kitlib.errors import CacheError
from kitlib.inference import ledger as ledgers
from kitlib.inference.cached_lungs import LungsReport
from kitlib.inference.ledger import Ledger
from kitlib.xrays.worker import Outcome

NO_LIMITS = SimpleNamespace(note="", slow=0)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that stands at 100 seconds."""
    monkeypatch.setattr(ledgers, "time", SimpleNamespace(monotonic=lambda: 100.0))


def decoding_rows(files, outcomes, limits=NO_LIMITS, error=None):
    """Return the files and the note of each row about the decoding of `files` files."""
    ledger = Ledger()
    ledger.note_decoding(SimpleNamespace(outcomes=outcomes, limits=limits, error=error), files)
    table = ledger.table()
    assert set(table.stage) <= {"decode"} and (table.seconds == 0).all()
    return list(zip(table.files, table.note, strict=True))


def test_a_row_has_the_seconds_since_its_stage_began():
    ledger = Ledger()
    ledger.note("small", 3, began=80.04, note="note")
    assert ledger.table().to_dict("records") == [{"stage": "small", "files": 3, "seconds": 20.0, "note": "note"}]


def test_failed_files_and_warnings_are_rows_the_most_frequent_warning_first():
    outcomes = [
        Outcome("a", "failed", "is empty"),
        Outcome("b", "decoded", warnings=("no view", "odd window")),
        Outcome("c", "decoded", warnings=("odd window", "small")),
        Outcome("d", "cached", warnings=("odd window", "small")),
    ]
    rows = [
        (1, "a keeps its placeholder prediction: is empty"),
        (3, "b and 2 more decoded with a warning: odd window"),
        (2, "c and 1 more decoded with a warning: small"),
        (1, "b decoded with a warning: no view"),
    ]
    assert decoding_rows(4, outcomes) == rows
    assert decoding_rows(4, outcomes, SimpleNamespace(note="were slow", slow=2)) == [*rows, (2, "were slow")]


def test_files_that_were_decoded_without_a_warning_have_no_row():
    assert decoding_rows(1, [Outcome("a", "decoded")]) == []


@pytest.mark.parametrize(
    ("decoded", "error", "note"),
    [
        ("a", None, "never decoded; time was up"),
        ("a", CacheError("the disk is full"), "never decoded; failed: CacheError: the disk is full"),
        ("", None, "never decoded; no model read them"),
    ],
)
def test_files_that_were_never_decoded_are_one_row(decoded, error, note):
    outcomes = [Outcome(image_id, "decoded") for image_id in decoded]
    assert decoding_rows(5, outcomes, error=error) == [(5 - len(decoded), note)]


def test_each_process_that_has_segmented_lungs_has_its_rows():
    ledger = Ledger()
    reports = [
        LungsReport(segmented=12, missed=2, overflowed=4, seconds=3.0, fault=""),
        LungsReport(segmented=5, missed=0, overflowed=0, seconds=2.0, fault=""),
        LungsReport(segmented=0, missed=0, overflowed=0, seconds=1.0, fault="failed: it is damaged"),
        LungsReport(segmented=1, missed=1, overflowed=0, seconds=1.0, fault="failed: no memory"),
    ]
    ledger.note_lungs(reports)
    missed = "images without plausible lungs are used uncropped"
    assert ledger.table().to_numpy().tolist() == [
        ["lungs", 12, 3.0, f"2 {missed}; 4 overflowed in half precision; segmented in float32"],
        ["lungs", 5, 2.0, ""],
        ["lungs", 0, 0.0, "failed: it is damaged"],
        ["lungs", 0, 0.0, "failed: no memory"],
        ["lungs", 1, 1.0, f"1 {missed}"],
    ]
