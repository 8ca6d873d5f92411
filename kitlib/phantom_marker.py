"""Markers of phantoms (synthetic X-rays): a JSON file next to a folder says that the folder is not a real data set."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
SHARED_MARKER = ".phantom.json"  # name of the phantom competition's marker; those of other sets have their folder's name


def digest_tables(folder: Path, names: Sequence[str]) -> str:
    """Return a digest (16 hex digits) of the contents of the files `names` in `folder`; missing files are skipped."""
    tables = [folder / name for name in names]
    return hashlib.sha256(b"".join(table.read_bytes() for table in tables if table.is_file())).hexdigest()[:16]


def holds_phantoms(folder: Path) -> bool:
    """Return whether `folder` contains phantoms (synthetic X-rays), according to a marker file next to the folder.

    The marker has the folder's name, the names of the folder's tables, and the tables' digest. If a real data set has been
    unpacked over the phantoms, the digest no longer matches, and the result is False.
    """
    for marker in (folder.with_name(SHARED_MARKER), folder.with_name(f".{folder.name}.json")):
        if marker.is_file():
            try:
                recorded = json.loads(marker.read_bytes())
                names = recorded.get("table_names")
            except (ValueError, AttributeError, OSError) as error:
                logger.warning("ignored the damaged phantom marker %s (%s); %s may count as real", marker, error, folder)
                continue
            if recorded.get("folder") == folder.name and names is not None:
                return digest_tables(folder, names) == recorded.get("tables")
    return False
