"""Files that appear whole or not at all: written beside their place, then renamed."""

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
    """Yield a path beside `path`; when the block ends without an error it takes the place of `path`.

    A killed process or a full disk leaves the previous file as it was. The name beside keeps the suffix, because several
    writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    # mkstemp makes files that only their owner can read; a submission must be readable like any other file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(beside, 0o666 & ~umask)
    try:
        yield Path(beside)
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, table: "pd.DataFrame") -> None:
    with replacing(path) as beside:
        table.to_csv(beside, index=False)


def write_json(path: str | Path, value: Any) -> None:
    """Indented, keys in the order given, NaN refused: other languages cannot read it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
