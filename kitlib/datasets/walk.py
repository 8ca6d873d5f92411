"""Lists all folders below a folder: follows links to folders once, and ignores files that systems and archivers add."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

ADDED = ("__macosx", "thumbs.db", "desktop.ini")  # files and folders that macOS's archiver and Windows add


def walk(
    root: Path, leave_out: Callable[[str, str], object] = lambda folder, reason: None, max_depth: int | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Yield pairs (folder, sorted names of the folder's files) for `root` and all folders below `root`.

    Hidden files and folders, and names in ADDED, are ignored. Links to folders are followed after all other folders, unless
    they lead to a folder that contains `root`. Every folder is read only once, so circular links do no harm. For each folder
    that is not read, `leave_out` is called with the folder's path and the reason: the folder cannot be read, is a link to a
    folder that has already been read, or is more than `max_depth` folders below `root`.
    """
    starts, read = [str(root)] if root.is_dir() else [], set()

    def cannot_be_read(error: OSError) -> None:
        leave_out(error.filename, f"the folder cannot be read ({error.strerror})")

    for start in starts:  # grows in the loop
        for folder, folders, names in os.walk(start, onerror=cannot_be_read):
            status = os.stat(folder)
            place = (status.st_dev, status.st_ino)
            is_too_deep = max_depth is not None and len(Path(folder).relative_to(root).parts) > max_depth
            if place in read or is_too_deep:
                folders.clear()
                is_link = place in read
                leave_out(
                    folder, "is a link to a folder that is read already" if is_link else f"is over {max_depth} folders deep"
                )
                continue
            read.add(place)
            folders[:] = sorted(filter(_is_shown, folders))
            yield Path(folder), sorted(filter(_is_shown, names))
            links = [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            # Following a link to a folder above `root` would also read all other data sets.
            starts += [link for link in links if not root.resolve().is_relative_to(os.path.realpath(link))]


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in ADDED
