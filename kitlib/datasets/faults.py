"""Collects the faults of a data set: what is left out or changed while the data set is read, and why."""

from collections.abc import Iterable

import pandas as pd

from kitlib.tables import storable


class Faults:
    """Collects the faults of a data set: a row for everything that is left out or changed while the data set is read."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, file: str, row: str, problem: str) -> None:
        """Add one fault: the file, the row (an id or a path), and the problem, which also says how the fault was handled."""
        self.rows.append((storable(file), storable(row), storable(problem)))

    def add_summary(self, file: str, rows: Iterable[str], problem: str, others: str = "others") -> None:
        """Add one fault for all of `rows`, or none if `rows` is empty.

        The fault states the first row and, for example, "and 3 others have no file", where `others` is "others" and
        `problem` is "have no file".
        """
        if rows := sorted(rows):
            self.add(file, rows[0], f"and {len(rows) - 1} {others} {problem}")

    def table(self) -> pd.DataFrame:
        """Return the faults as a table with the columns file, row and problem."""
        return pd.DataFrame(self.rows, columns=["file", "row", "problem"])
