"""The marker of a folder of phantoms: a JSON file next to the folder, which tells them from a real data set."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
SHARED_MARKER = ".phantom.json"  # name of the phantom competition's marker; those of other sets have their folder's name


def digest_tables(folder: Path, names: Sequence[str]) -> str:
    """Return a digest of the files `names` in `folder`, as far as they exist."""
    tables = [folder / name for name in names]
    return hashlib.sha256(b"".join(table.read_bytes() for table in tables if table.is_file())).hexdigest()[:16]


def holds_phantoms(folder: Path) -> bool:
    """Return whether `folder` contains the phantoms that a marker next to it describes.

    The marker has the folder's name, the names of its tables, and their digest, which changes if a real data set is unpacked
    where phantoms had been.
    """
    for marker in (folder.with_name(SHARED_MARKER), folder.with_name(f".{folder.name}.json")):
        if marker.is_file():
            try:
                recorded = json.loads(marker.read_bytes())
                names = recorded.get("table_names")
            except (ValueError, AttributeError, OSError) as error:
                logger.warning("%s is damaged (%s); %s is taken for real data", marker, error, folder)
                continue
            if recorded.get("folder") == folder.name and names is not None:
                return digest_tables(folder, names) == recorded.get("tables")
    return False
