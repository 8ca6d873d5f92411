"""Atomic writes: a file is written under a temporary name and renamed when complete, so it is never half-written."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # decode workers start without pandas
    import pandas as pd


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file written there replaces `path` if the block ends without an error.

    A killed process or a full disk leaves the previous file unchanged. The temporary path has the suffix of `path`,
    because several libraries choose the file format by the suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary_path = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    # mkstemp makes files that only their owner can read; a submission must be readable like any other file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary_path, 0o666 & ~umask)
    try:
        yield Path(temporary_path)
        with open(temporary_path, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary_path, path)
    finally:
        Path(temporary_path).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to the file `path` as UTF-8, atomically."""
    with replacing(path) as temporary_path:
        temporary_path.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, table: "pd.DataFrame") -> None:
    """Write a table to the file `path` as CSV without the table's index, atomically."""
    with replacing(path) as temporary_path:
        table.to_csv(temporary_path, index=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically, without sorting its keys. Raises ValueError for NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
