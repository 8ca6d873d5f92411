"""Run one notebook through papermill, and believe it only when everything about it says success.

Papermill alone is not enough: an unknown parameter is injected with a log line, `sys.exit(0)` in a cell and a killed kernel
can leave a notebook that looks finished.
"""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kitlib.atomic import write_text
from kitlib.errors import NotebookError
from kitlib.paths import project_root
from kitlib.processes import kill_family

logger = logging.getLogger(__name__)
WITHOUT = "(as a training does whose session is over: run it again, and it goes on)"


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Raise ValueError if the notebook's `parameters` cell does not have one of these names."""
    import papermill  # a process that does one command of a plan does not wait for it

    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"{notebook.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known)}")


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: dict[str, Any],
    result: str | Path,
    on_cell: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    time_limit_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Execute `notebook` with `parameters`; the executed copy goes to `output`, the log beside it.

    `result` is a file that the notebook's last cell writes: an old one is removed first, and the run has failed unless it
    is there afterwards. `on_cell(done, total)` is called as cells start. `threads` bounds the CPU threads of the
    notebook's libraries, `variables` are added to its environment, and after `time_limit_s` it is killed. Raises
    ValueError for an unknown parameter, NotebookError for everything else.
    """
    notebook, output, result = Path(notebook), Path(output), Path(result)
    check_parameters(notebook, parameters)
    result.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings, log = output.with_suffix(".parameters.yaml"), output.with_suffix(".log")
    write_text(settings, yaml.safe_dump(parameters, sort_keys=False))
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "-f", str(settings)]
    command += ["--cwd", str(project_root()), "--no-progress-bar", "--log-output", "-k", "python3"]
    environment = {**os.environ, **(variables or {}), **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        cwd=project_root(),
        env=environment,
    )
    cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + 1  # papermill adds the injected one
    reader = threading.Thread(target=_keep_log, args=(process.stdout, log, cells, on_cell))
    reader.start()
    try:
        code, late = process.wait(time_limit_s), ""
    except subprocess.TimeoutExpired as expired:
        code, late = -1, f"stopped after its {expired.timeout / 60:g} minutes"
    finally:
        # Also where this process is told to end: the notebook's kernel would go on by itself.
        kill_family(process.pid)
        process.wait()
    reader.join()
    problem = late or (first_problem(output) if output.is_file() else "papermill wrote no notebook")
    if code or problem or not result.is_file():
        problem = problem or (f"papermill's exit code is {code}" if code else f"it ended without writing {result} {WITHOUT}")
        raise NotebookError(f"{notebook.name}: {problem}\n  executed copy: {output}\n  log: {log}\n{log_tail(log)}")


def _keep_log(lines: Iterable[str], log: Path, cells: int, on_cell: Callable[[int, int], None] | None) -> None:
    with log.open("w", encoding="utf-8") as kept:
        for line in lines:
            started = re.search(r"Executing Cell (\d+)", line)
            # Whatever happens here, the rest is read: a notebook whose output nobody takes waits for ever.
            try:
                kept.write(line)
                kept.flush()
                if started and on_cell:
                    on_cell(int(started[1]), cells)
            except Exception:
                logger.exception("a line of %s's output is not kept, or not told of", log)


def first_problem(executed: Path) -> str:
    """The first cell that failed or never ran, in words; empty where all completed."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    # papermill marks a failed notebook with cells of its own, which would shift the count
    own = [cell for cell in cells if not any(tag.startswith("papermill-error") for tag in cell["metadata"].get("tags", []))]
    for number, cell in enumerate(own, start=1):
        status = cell["metadata"].get("papermill", {}).get("status")
        errors = [out for out in cell.get("outputs", []) if out["output_type"] == "error"]
        if errors:
            return f"cell {number} raised {errors[0]['ename']}: {errors[0]['evalue']}"
        if cell["cell_type"] == "code" and status != "completed":
            return f"cell {number} is {status}"
    return ""


def log_tail(log: Path, lines: int = 15) -> str:
    """A log's last lines, each marked as a quotation."""
    return "\n".join("  | " + line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
