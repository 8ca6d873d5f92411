"""The rows of a submission's ledger about decoding and lungs."""

import time
from types import SimpleNamespace

import pytest

from kitlib.errors import CacheError
from kitlib.inference.cached_lungs import LungsReport
from kitlib.inference.ledger import Ledger
from kitlib.xrays.worker import Outcome

NO_LIMITS = SimpleNamespace(note="", slow=0)
READ = [
    Outcome("a", "failed", "is empty"),
    Outcome("b", "decoded", warnings=("no view", "odd window")),
    Outcome("c", "decoded", warnings=("odd window", "small")),
    Outcome("d", "cached", warnings=("odd window", "small")),
]


def decoding_rows(files, outcomes, limits=NO_LIMITS, error=None):
    ledger = Ledger()
    ledger.note_decoding(SimpleNamespace(outcomes=outcomes, limits=limits, error=error), files)
    table = ledger.table()
    assert list(table.columns) == ["stage", "files", "seconds", "note"] and table.seconds.between(0, 60).all()
    assert set(table.stage) <= {"decode"}
    return list(zip(table.files, table.note, strict=True))


def test_failed_files_and_warnings_are_rows_the_most_frequent_warning_first():
    rows = [
        (1, "a keeps its placeholder prediction: is empty"),
        (3, "b and 2 more decoded with a warning: odd window"),
        (2, "c and 1 more decoded with a warning: small"),
        (1, "b decoded with a warning: no view"),
    ]
    assert decoding_rows(4, READ) == rows and decoding_rows(1, [Outcome("a", "decoded")]) == []
    assert decoding_rows(4, READ, SimpleNamespace(note="were slow", slow=2)) == [*rows, (2, "were slow")]


@pytest.mark.parametrize(
    ("outcomes", "error", "note"),
    [
        ([Outcome("a", "decoded")], None, "never decoded; time was up"),
        ([Outcome("a", "decoded")], CacheError("the disk is full"), "never decoded; failed: CacheError: the disk is full"),
        ([], None, "never decoded; no model read them"),
    ],
)
def test_files_that_were_never_decoded_are_one_row(outcomes, error, note):
    assert decoding_rows(5, outcomes, error=error) == [(5 - len(outcomes), note)]


def test_each_process_that_has_segmented_lungs_has_its_rows():
    ledger = Ledger()
    reports = [
        LungsReport(segmented=12, missed=2, overflowed=4, seconds=3.0, fault=""),
        LungsReport(segmented=5, missed=0, overflowed=0, seconds=2.0, fault=""),
        LungsReport(segmented=0, missed=0, overflowed=0, seconds=1.0, fault="failed: it is damaged"),
        LungsReport(segmented=1, missed=1, overflowed=0, seconds=1.0, fault="failed: no memory"),
    ]
    ledger.note_lungs(reports)
    table = ledger.table()
    missed = "images without plausible lungs are used uncropped"
    assert list(zip(table.stage, table.files, table.note, strict=True)) == [
        ("lungs", 12, f"2 {missed}; 4 overflowed in half precision; segmented in float32"),
        ("lungs", 5, ""),
        ("lungs", 0, "failed: it is damaged"),
        ("lungs", 0, "failed: no memory"),
        ("lungs", 1, f"1 {missed}"),
    ]
    assert table.seconds.tolist() == pytest.approx([3, 2, 0, 0, 1], abs=0.5)


def test_a_row_has_the_seconds_since_its_stage_began():
    ledger = Ledger()
    ledger.note("small", 3, time.monotonic() - 20, "note")
    (row,) = ledger.table().to_dict("records")
    assert row == {"stage": "small", "files": 3, "seconds": pytest.approx(20, abs=0.5), "note": "note"}
