"""Runs a command in a sandbox: private mounts, processes and network, and chosen folders at chosen paths.

Uses Linux namespaces (util-linux's `unshare`), not Docker. If users may create namespaces, no root rights are needed. This
file is also the program that sets up the sandbox from inside, and therefore imports only the standard library.
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

# Folders that are not shared with the machine: /proc is private; /tmp is empty, and read-only unless it is in `writable`.
PRIVATE_FOLDERS = ("proc", "tmp")
# linux/mount.h, asm/unistd.h (one number on all architectures) and net/if.h
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def sandbox_command(
    command: Sequence[str],
    root: str | Path,
    read_only: Mapping[str, str | Path],
    writable: Mapping[str, str | Path],
    hidden: Sequence[str | Path] = (),
    folder: str = "/",
) -> list[str]:
    """Return the command line that runs `command` in a sandbox.

    `root` is an empty folder on which the sandbox's file system is mounted. `read_only` and `writable` map absolute paths in
    the sandbox to files and folders outside. The rest of this machine's file system is visible and read-only, except the
    folders in `hidden`. The only network interface is the loopback. `folder` is the working directory. Killing the process
    of the returned command kills every process in the sandbox. Raises RuntimeError if this system has no private namespaces.
    """
    unshare, reason = _find_unshare()
    if unshare is None:
        raise RuntimeError(f"no private namespaces on this system: {reason}")
    plan = {
        "command": list(command),
        "root": str(root),
        "read_only": {target: os.path.realpath(source) for target, source in read_only.items()},
        "writable": {target: os.path.realpath(source) for target, source in writable.items()},
        "hidden": [os.path.realpath(path) for path in hidden],
        "keep": [os.path.realpath(sys.base_prefix)],
        "folder": folder,
    }
    return [*unshare, *_sandbox_program(plan)]


def no_sandbox_reason() -> str:
    """Return the reason why this system cannot run a sandbox, or "" if it can."""
    return _find_unshare()[1]


@functools.cache
def _find_unshare() -> tuple[list[str] | None, str]:
    """Return (command, "") with an `unshare` command that works on this system, or (None, reason) if none works."""
    if not shutil.which("unshare"):
        return None, "the program `unshare` (package util-linux) is not installed"
    reason = ""
    # As root, a sandbox without a user namespace is tried first, because some systems forbid user namespaces.
    for user_options in [[], ["--map-root-user"]] if os.geteuid() == 0 else [["--map-root-user"]]:
        command = ["unshare", *user_options, "--mount", "--net", "--pid", "--fork", "--kill-child=KILL"]
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
            completed = subprocess.run([*command, *_sandbox_program(plan)], capture_output=True, text=True)
        if completed.returncode == 0:
            return command, ""
        reason = (completed.stderr.strip().splitlines() or [f"exit code {completed.returncode}"])[-1]
    return None, reason


def _sandbox_program(plan: dict[str, Any]) -> list[str]:
    return [sys.executable, "-I", __file__, json.dumps(plan)]


def _enter_sandbox(plan: dict[str, Any]) -> None:
    """Mount the sandbox's file system on plan["root"] and change root to it.

    Runs as the first process of the new namespaces.
    """
    root = Path(plan["root"])
    _mount("-t", "tmpfs", "tmpfs", root)
    for entry in sorted(Path("/").iterdir()):
        target = root / entry.name
        if entry.is_symlink():
            target.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            target.mkdir()
            if entry.name not in PRIVATE_FOLDERS:
                _mount("--rbind", entry, target)
    for path in plan["hidden"]:
        if (root / path[1:]).is_dir():
            _mount("-t", "tmpfs", "tmpfs", root / path[1:])
    for path in plan["keep"]:
        if any(Path(path).is_relative_to(hidden) for hidden in plan["hidden"]):
            _make_mount_point(path, root)
            _mount("--rbind", path, root / path[1:])
    for target, source in plan["read_only"].items():
        _make_mount_point(source, root, target)
        _mount("--rbind", source, root / target[1:])
    for target, source in plan["writable"].items():
        _make_mount_point(source, root, target)
    _make_read_only(root)
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "tmpfs", "tmpfs", root / "dev" / "shm")
    for target, source in plan["writable"].items():
        _mount("--rbind", source, root / target[1:])
    _bring_loopback_up()
    os.chroot(root)
    os.chdir(plan["folder"])


def _make_mount_point(source: str, root: Path, path: str | None = None) -> None:
    """Create an empty folder or file to mount `source` on. Its path below `root` is `path` or, by default, `source`."""
    target = root / (path or source)[1:]
    if os.path.isdir(source):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _make_read_only(folder: Path) -> None:
    """Make the mount at `folder` and all mounts below it read-only, keeping other mount flags. Raises OSError on failure."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = struct.pack("QQQQ", RDONLY, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(folder), AT_RECURSIVE, attributes, len(attributes)):
        raise OSError(ctypes.get_errno(), "mount_setattr (Linux 5.12 or newer)", str(folder))


def _bring_loopback_up() -> None:
    with socket.socket() as connection:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(connection, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(connection, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _run_as_init(command: list[str]) -> int:
    """Run a command as the sandbox's first process, which must also reap orphaned processes.

    Returns the command's exit code or, as a shell does, 128 plus the number of the signal that killed the command.
    """
    child = os.posix_spawnp(command[0], command, os.environ)
    while True:
        process, status = os.wait()
        if process == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sandbox_plan = json.loads(sys.argv[1])
    _enter_sandbox(sandbox_plan)
    sys.exit(_run_as_init(sandbox_plan["command"]))
