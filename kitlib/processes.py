"""End a process with all that it has started."""

import psutil


def kill_family(process: int) -> None:
    """Kill the process and its descendants, also one that leads a process group of its own, as a notebook's kernel does."""
    try:
        first = psutil.Process(process)
        first.suspend()  # so that it starts no further child while its family is counted
        family = [*first.children(recursive=True), first]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
