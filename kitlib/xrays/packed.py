"""Reads single files from a tar archive without unpacking it; used for a packed cache of decoded X-rays."""

import mmap
from pathlib import Path

from kitlib.errors import CacheError

BLOCK = 512  # bytes; a member is a header of one block, followed by its content, padded to whole blocks
FILE_KINDS, LONG_NAME = (b"0", b"\0"), b"x"


class PackedEntries:
    """Read access to the files in the tar archive `path`, which Python's `tarfile` wrote.

    The constructor raises CacheError if the archive is incomplete or not a tar archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._places = _find_members(path)  # offset and size of each file's content, by name
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be read: {error}; copy the file again, or prepare the run again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """Return the names of all files."""
        return list(self._places)

    def read(self, name: str) -> bytes:
        """Return the content of the file `name`. Raises KeyError if the archive has no such file."""
        offset, size = self._places[name]
        with open(self.path, "rb") as archive:
            archive.seek(offset)
            return archive.read(size)


def _find_members(path: Path) -> dict[str, tuple[int, int]]:
    # Parsed here, because tarfile takes ten times as long to list an archive.
    places, long_name = {}, ""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as archive:
        position = 0
        while (header := archive[position : position + BLOCK]) != bytes(BLOCK):
            if len(header) < BLOCK or header[257:262] != b"ustar":
                raise ValueError(f"no tar header at byte {position}")
            size, kind, start = int(header[124:136].rstrip(b"\0 "), 8), header[156:157], position + BLOCK
            if size < 0:
                raise ValueError(f"the size of the file at byte {position} is negative")
            position = start + -(-size // BLOCK) * BLOCK
            if position > len(archive):
                raise ValueError(f"the archive ends before byte {position}")
            if kind == LONG_NAME:  # a name of more than 100 bytes is stored in a separate member: "length path=name\n"
                records = archive[start : start + size].decode().splitlines()
                long_name = next((record.partition("path=")[2] for record in records if " path=" in record), "")
            else:
                if kind in FILE_KINDS:
                    places[long_name or header[:100].rstrip(b"\0").decode()] = (start, size)
                long_name = ""
    return places
