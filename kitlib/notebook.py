"""Run one notebook through papermill, and check that all cells were executed and that its result was written.

Papermill alone is not enough: it accepts an unknown parameter with only a line in the log, and `sys.exit(0)` in a cell or a
killed kernel leaves a notebook that looks finished.
"""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from kitlib.atomic import write_text
from kitlib.errors import NotebookError
from kitlib.parameters import check_parameters
from kitlib.paths import project_root
from kitlib.processes import kill_family

logger = logging.getLogger(__name__)
NO_KERNEL = "Kernel died before replying to kernel_info"  # in the log of a notebook whose kernel did not start
EPOCH = re.compile(r"epoch \d+ of \d+, ")  # in a line of kitlib.training.progress
WITHOUT = "(a training stops like this when its session ends: run it again to resume)"


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: dict[str, Any],
    result: str | Path,
    on_cell: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[str], None] | None = None,
    threads: int | None = None,
    time_limit_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Execute `notebook` with `parameters`; write the executed copy to `output` and a log next to it.

    `result` is the file that the notebook's last cell writes. The file is deleted before the run; if it does not exist
    afterwards, the run has failed. `on_cell(number, total)` is called when a cell starts, with the cell's number from 1.
    `on_epoch` is called with each line that a training logs about its epochs. `threads` limits the CPU threads of the
    notebook's libraries. `variables` are added to the environment variables. The notebook is killed after `time_limit_s`
    seconds. Raises SettingsError for an unknown parameter or a value of a wrong type, NotebookError for every other failure.
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
    # papermill adds a cell with the parameters.
    cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + 1
    read_log = partial(_keep_log, log, cells, on_cell, on_epoch)
    code, timeout = _execute(command, environment, read_log, time_limit_s)
    if code and NO_KERNEL in log_tail(log):
        # Kernels that start at the same moment may choose the same port. No cell has run, so a second start is safe.
        code, timeout = _execute(command, environment, read_log, time_limit_s)
    problem = timeout or (first_problem(output) if output.is_file() else "papermill wrote no notebook")
    if code or problem or not result.is_file():
        problem = problem or (f"papermill's exit code is {code}" if code else f"it ended without writing {result} {WITHOUT}")
        raise NotebookError(f"{notebook.name}: {problem}\n  executed copy: {output}\n  log: {log}\n{log_tail(log)}")


def _execute(
    command: list[str],
    environment: Mapping[str, str],
    read_log: Callable[[Iterable[str]], None],
    time_limit_s: float | None,
) -> tuple[int, str]:
    """Run papermill; return its exit code and, if it reached the time limit, a message that says so (otherwise "")."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        cwd=project_root(),
        env=environment,
    )
    reader = threading.Thread(target=read_log, args=(process.stdout,))
    reader.start()
    try:
        return process.wait(time_limit_s), ""
    except subprocess.TimeoutExpired as expired:
        return -1, f"stopped at its time limit of {expired.timeout / 60:g} minutes"
    finally:
        # Also when this process is told to exit, because the notebook's kernel would keep running.
        kill_family(process.pid)
        process.wait()
        reader.join()


def _keep_log(
    log: Path,
    cells: int,
    on_cell: Callable[[int, int], None] | None,
    on_epoch: Callable[[str], None] | None,
    lines: Iterable[str],
) -> None:
    with log.open("w", encoding="utf-8") as opened:
        for line in lines:
            started = re.search(r"Executing Cell (\d+)", line)
            # Keep reading whatever happens here: a notebook whose output is not read blocks forever.
            try:
                opened.write(line)
                opened.flush()
                if started and on_cell:
                    on_cell(int(started[1]), cells)
                elif EPOCH.search(line) and on_epoch:
                    on_epoch(line.strip())
            except Exception:
                logger.exception("could not write a line to %s, or report the progress", log)


def first_problem(executed: Path) -> str:
    """Return a description of the first cell that failed or did not run, or "" if all cells completed."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    # papermill inserts cells into a failed notebook, which would shift the numbers.
    tags_of = [cell["metadata"].get("tags", []) for cell in cells]
    cells = [c for c, tags in zip(cells, tags_of, strict=True) if not any(tag.startswith("papermill-error") for tag in tags)]
    for number, cell in enumerate(cells, start=1):
        status = cell["metadata"].get("papermill", {}).get("status")
        errors = [out for out in cell.get("outputs", []) if out["output_type"] == "error"]
        if errors:
            return f"cell {number} raised {errors[0]['ename']}: {errors[0]['evalue']}"
        if cell["cell_type"] == "code" and status != "completed":
            return f"cell {number} did not complete (status: {status})"
    return ""


def log_tail(log: Path, lines: int = 15) -> str:
    """Return the last `lines` lines of a log file as one text, with "  | " before each line."""
    return "\n".join("  | " + line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
