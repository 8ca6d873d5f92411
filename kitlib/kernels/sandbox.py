"""A command in a room of its own: private mounts, processes and network, with chosen folders at chosen places.

Linux namespaces through util-linux's `unshare`; no image, no daemon, no root where the system lets users make namespaces.
This file is also the program that furnishes the room from inside, so it needs nothing but the standard library.
"""

import ctypes
import fcntl
import functools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Not this machine's: a private /proc, and an empty /tmp (read-only unless `writable` names one).
FRESH = ("proc", "tmp")
# linux/mount.h, asm/unistd.h (one number on all architectures) and net/if.h
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def sandboxed(
    command: Sequence[str],
    root: str | Path,
    read_only: Mapping[str, str | Path],
    writable: Mapping[str, str | Path],
    hidden: Sequence[str | Path] = (),
    folder: str = "/",
) -> list[str]:
    """The command that runs `command` in a room.

    `root` is an empty folder on which the room is built. `read_only` and `writable` map absolute places in the room to files
    and folders outside. All else of this machine is there, read-only, except the folders in `hidden`. There is no
    network but the loopback. `folder` is the working directory. Killing the command kills everything in the room.
    """
    unshare, reason = _probe()
    if unshare is None:
        raise RuntimeError(f"no private namespaces on this system: {reason}")
    plan = {
        "command": list(command),
        "root": str(root),
        "read_only": {place: os.path.realpath(source) for place, source in read_only.items()},
        "writable": {place: os.path.realpath(source) for place, source in writable.items()},
        "hidden": [os.path.realpath(path) for path in hidden],
        "keep": [os.path.realpath(sys.base_prefix)],
        "folder": folder,
    }
    return [*unshare, *_program(plan)]


def no_sandbox_reason() -> str:
    """Why this system allows no room, empty where it does."""
    return _probe()[1]


@functools.cache
def _probe() -> tuple[list[str] | None, str]:
    if not shutil.which("unshare"):
        return None, "the program `unshare` (package util-linux) is missing"
    reason = ""
    # As root without a user namespace first: some systems forbid those.
    for mapped in [[], ["--map-root-user"]] if os.geteuid() == 0 else [["--map-root-user"]]:
        command = ["unshare", *mapped, "--mount", "--net", "--pid", "--fork", "--kill-child=KILL"]
        with tempfile.TemporaryDirectory() as root:
            plan = {
                "command": ["true"],
                "root": root,
                "read_only": {},
                "writable": {},
                "hidden": [],
                "keep": [],
                "folder": "/",
            }
            tried = subprocess.run([*command, *_program(plan)], capture_output=True, text=True)
        if tried.returncode == 0:
            return command, ""
        reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    return None, reason


def _program(plan: dict[str, Any]) -> list[str]:
    return [sys.executable, "-I", __file__, json.dumps(plan)]


def _furnish(plan: dict[str, Any]) -> None:
    """Build the room on plan["root"] and move into it. Runs as the first process of the new namespaces."""
    root = Path(plan["root"])
    _mount("-t", "tmpfs", "tmpfs", root)
    for entry in sorted(Path("/").iterdir()):
        place = root / entry.name
        if entry.is_symlink():
            place.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            place.mkdir()
            if entry.name not in FRESH:
                _mount("--rbind", entry, place)
    for path in plan["hidden"]:
        if (root / path[1:]).is_dir():
            _mount("-t", "tmpfs", "tmpfs", root / path[1:])
    for path in plan["keep"]:
        if any(Path(path).is_relative_to(hidden) for hidden in plan["hidden"]):
            _make_place(path, root)
            _mount("--rbind", path, root / path[1:])
    for place, source in plan["read_only"].items():
        _make_place(source, root, place)
        _mount("--rbind", source, root / place[1:])
    for place, source in plan["writable"].items():
        _make_place(source, root, place)
    _make_read_only(root)
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "tmpfs", "tmpfs", root / "dev" / "shm")
    for place, source in plan["writable"].items():
        _mount("--rbind", source, root / place[1:])
    _bring_loopback_up()
    os.chroot(root)
    os.chdir(plan["folder"])


def _make_place(source: str, root: Path, place: str | None = None) -> None:
    """What `source` can be mounted on: an empty folder, or an empty file."""
    target = root / (place or source)[1:]
    if os.path.isdir(source):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _make_read_only(folder: Path) -> None:
    """The mount at `folder` and all below it, keeping their other flags."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("QQQQ", RDONLY, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(folder), AT_RECURSIVE, attributes, len(attributes)):
        raise OSError(ctypes.get_errno(), "mount_setattr (Linux 5.12 or newer)", str(folder))


def _bring_loopback_up() -> None:
    with socket.socket() as opened:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(opened, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(opened, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _run(command: list[str]) -> int:
    """Run as the room's first process, which also has to collect the orphans; gives the exit code as a shell does."""
    child = os.posix_spawnp(command[0], command, os.environ)
    while True:
        process, status = os.wait()
        if process == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _furnish(given)
    sys.exit(_run(given["command"]))
