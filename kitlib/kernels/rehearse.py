"""Run a built kernel as Kaggle would: with Kaggle's packages and folders, without network, and with a time limit."""

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitlib.competitions.contract import Competition
from kitlib.errors import DatasetError, KernelError, SubmissionError
from kitlib.kernels.kaggle_environment import link_kaggle_packages
from kitlib.kernels.launch import (
    IMAGES,
    BuiltNotebook,
    container_name,
    docker_command,
    end_container,
    papermill_options,
    stand_in_command,
)
from kitlib.kernels.result import USAGE, check_result, find_unused_bundles, list_bundles
from kitlib.kernels.sandbox import no_sandbox_reason
from kitlib.kernels.spec import KernelSpec
from kitlib.kernels.wheels import are_installable, local_wheels, parse_pins
from kitlib.notebook import first_problem
from kitlib.processes import kill_family

logger = logging.getLogger(__name__)

# Kaggle mounts inputs below /kaggle/input either at their slug or at their kind, owner and slug; both layouts occur.
LAYOUTS = {
    "plain": dict.fromkeys(("competition_sources", "dataset_sources", "model_sources", "kernel_sources"), "{slug}"),
    "nested": {
        "competition_sources": "competitions/{slug}",
        "dataset_sources": "datasets/{owner}/{slug}",
        "model_sources": "models/{owner}/{slug}",
        "kernel_sources": "notebooks/{owner}/{slug}",
    },
}


# Imports of every kernel before its first stage. A kernel that only writes a file takes STARTS times as long as its imports.
IMPORTS, STARTS = "import papermill.cli, ipykernel.kernelapp, pandas", 1.5
LONGEST_START_S = 120.0  # upper limit for the time to start, even with a cold disk


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal, which runs a built kernel on this machine as Kaggle would.

    `working` is the folder with the kernel's output, `log` has its printed lines and `executed` is its executed notebook.
    """

    seconds: float
    limit_s: float
    problem: str  # why the notebook did not run to its end; empty if it did
    unfinished: bool  # the notebook ended at its session's deadline as intended, and its run can be resumed
    result: str  # path, below `working`, of the file that a finished kernel writes; empty if the notebook makes no run
    faults: tuple[str, ...]  # faults of the result; a missing file is a fault
    scores: dict[str, float] | None  # scores of a valid submission if the ground truth was passed
    not_isolated: str  # why the kernel could not run in a sandbox; empty if it did
    working: Path
    log: Path
    executed: Path

    @property
    def in_time(self) -> bool:
        """Whether the kernel ended within its time limit."""
        return self.seconds <= self.limit_s

    @property
    def passed(self) -> bool:
        """Whether the kernel ran to its end in time, does not have to be resumed, and wrote a result without faults."""
        return self.in_time and not self.problem and not self.faults and not self.unfinished


def rehearse(
    spec: KernelSpec,
    out: str | Path,
    inputs: str | Path,
    time_limit_s: float,
    truth: str | Path | None = None,
    on_line: Callable[[str], None] | None = None,
    layout: str = "plain",
    allow_placeholders: bool = False,
    docker: bool = False,
) -> Rehearsal:
    """Run `out`/kernel, built from `spec`, with the parameters for rehearsals; return how the run ended, as a Rehearsal.

    `inputs` is a folder with one subfolder per input, named by the input's slug. Only the inputs in the kernel's metadata
    are attached: `out`/wheels, `out`/weights, and the others from `inputs`. `layout`, "plain" or "nested", sets the paths at
    which inputs are mounted (see LAYOUTS). The kernel is killed after `time_limit_s` seconds. `on_line` is called with each
    line that the kernel prints. `truth` is the path of the ground truth, with which the submission is scored. Placeholder
    predictions must not pass, so the rehearsal of a submission fails if a bundle (trained model) in `out`/weights has not
    predicted every readable file. The numbers of files are read from usage.json, which the submission notebook writes.
    `allow_placeholders` turns this check off.

    If `docker` is False, the kernel runs in a sandbox, with only those installed packages that Kaggle's image also has.
    Otherwise it runs in a container of `spec.docker_image` (default: Kaggle's public image), which must have been pulled.
    Replaces `out`/working, `out`/rehearsal.log and `out`/rehearsal.ipynb. The project's folder and /tmp are hidden from the
    kernel, so links from inputs to these folders are broken. Raises KernelError if the rehearsal cannot start, for example
    if an input is missing, or if `truth` is given for a kernel that makes no submission.
    """
    out, inputs = Path(out).resolve(), Path(inputs).resolve()
    metadata = _read_metadata(spec, out)
    built_datasets = _find_built_datasets(out)
    folders = _find_inputs(metadata, built_datasets, inputs, LAYOUTS[layout])
    if truth and not spec.is_submission:
        raise KernelError(f"{spec.slug} makes no submission, so there is nothing to score; leave the ground truth out")
    ids = _find_submission_ids(spec.rules, inputs / spec.competition) if spec.is_submission else ()
    packages = None if docker else link_kaggle_packages()
    working, log, executed = out / "working", out / "rehearsal.log", out / "rehearsal.ipynb"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    executed.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=out, prefix=".rehearsal-", ignore_cleanup_errors=True) as temporary_folder:
        wheels = out / "wheels" if docker else _installable_wheels(out / "wheels", Path(temporary_folder) / "wheels")
        attached = {mount_point: wheels if folder == out / "wheels" else folder for mount_point, folder in folders.items()}
        path, options = out / "kernel" / metadata["code_file"], papermill_options(spec)
        notebook = BuiltNotebook(path, attached, working, executed, options, Path(temporary_folder))
        if packages:
            command, environment = stand_in_command(notebook, packages)
            exit_code, seconds = run_with_limit(command, environment, working, time_limit_s, log, on_line)
        else:
            gpu = metadata["enable_gpu"] and bool(shutil.which("nvidia-smi"))
            image = spec.docker_image or IMAGES["gpu" if metadata["enable_gpu"] else "cpu"]
            name = container_name()
            command, environment = docker_command(notebook, image, name, gpu)
            try:
                exit_code, seconds = run_with_limit(command, environment, working, time_limit_s, log, on_line)
            finally:
                end_container(name, image, working)
    problem = _find_problem(exit_code, time_limit_s if seconds > time_limit_s else None, executed)
    result, unfinished, faults = check_result(spec, working, ids)
    scores = spec.rules.score_files(truth, working / result) if truth and not faults else None
    if spec.is_submission and not allow_placeholders:
        faults += find_unused_bundles(list_bundles(out / "weights"), working / USAGE)
    return Rehearsal(
        seconds=seconds,
        limit_s=time_limit_s,
        problem=problem,
        unfinished=unfinished and not problem,
        result=result,
        faults=() if unfinished and not problem else faults,
        scores=scores,
        not_isolated="" if docker else no_sandbox_reason(),
        working=working,
        log=log,
        executed=executed,
    )


def _read_metadata(spec: KernelSpec, out: Path) -> dict[str, Any]:
    metadata_path = out / "kernel" / "kernel-metadata.json"
    if not metadata_path.is_file():
        raise KernelError(f"{metadata_path} does not exist; build the kernel first")
    metadata = json.loads(metadata_path.read_text(encoding="utf-8"))
    if metadata["id"] != f"{spec.owner}/{spec.slug}":
        raise KernelError(f"{out} contains the kernel {metadata['id']}; build {spec.owner}/{spec.slug} there first")
    if metadata["enable_internet"]:
        logger.warning("On Kaggle this kernel has internet access, but its rehearsal has none.")
    return metadata


def _find_built_datasets(out: Path) -> dict[str, Path]:
    """Return the folders of the datasets in `out`, which were built with the kernel, keyed by OWNER/SLUG."""
    metadata_paths = {folder: folder / "dataset-metadata.json" for folder in (out / "wheels", out / "weights")}
    return {
        json.loads(file.read_text(encoding="utf-8"))["id"]: folder
        for folder, file in metadata_paths.items()
        if file.is_file()
    }


def _find_inputs(
    metadata: dict[str, Any], built_datasets: dict[str, Path], inputs: Path, layout: dict[str, str]
) -> dict[str, Path]:
    """Return the folders of the kernel's inputs, keyed by the path, below /kaggle/input, at which each is mounted.

    Raises KernelError if inputs are missing, with a message that lists all of them, or if a dataset exists both in the build
    and in `inputs`.
    """
    folders, missing = {}, []
    for kind, pattern in layout.items():
        for source in metadata[kind]:
            # The slug of a Model has four parts: MODEL/FRAMEWORK/VARIATION/VERSION.
            owner, _, slug = source.partition("/") if "/" in source else ("", "", source)
            folder = inputs / slug
            if source in built_datasets and folder.is_dir():
                raise KernelError(
                    f"there are two copies of {source}: {built_datasets[source]}, which was built with the kernel, and "
                    f"{folder}; remove one of them"
                )
            folder = built_datasets.get(source, folder)
            if not folder.is_dir():
                advice = "that kernel's output, or a link to its rehearsal's working/"
                advice = advice if kind == "kernel_sources" else "see inputs/README.md"
                missing.append(f"{folder}, for {source} in {kind} ({advice})")
            folders[pattern.format(owner=owner, slug=slug)] = folder
    if missing:
        raise KernelError("inputs of the kernel are missing: " + "; ".join(missing))
    return folders


def _installable_wheels(wheels: Path, replacement_folder: Path) -> Path:
    """Return the folder `wheels` if this Python can install the wheels in it, otherwise `replacement_folder`.

    In the second case, `replacement_folder` is created and filled with wheels of the same versions for this Python.
    """
    wheel_files = sorted(wheels.glob("*.whl"))
    if are_installable(wheel_files):
        return wheels
    logger.warning(
        "This Python cannot install the wheels for Kaggle's Python 3.12; using wheels of the same versions for this Python."
    )
    replacement_folder.mkdir()
    for wheel in local_wheels(parse_pins(wheel_files)):
        shutil.copyfile(wheel, replacement_folder / wheel.name)
    return replacement_folder


def _find_submission_ids(competition: Competition, folder: Path) -> tuple[str, ...]:
    """Return the ids that a submission must have, read from the data in `folder`. Raises KernelError if that fails."""
    try:
        return tuple(competition.read_test(folder).submission_ids)
    except (DatasetError, SubmissionError) as error:
        raise KernelError(f"the data in {folder} do not show the ids that a submission needs: {error}") from error


def run_with_limit(
    command: list[str],
    environment: dict[str, str],
    working: Path,
    time_limit_s: float,
    log: Path,
    on_line: Callable[[str], None] | None,
) -> tuple[int, float]:
    """Run a command in the folder `working`, copying its output to the file `log`; return its exit code and its duration.

    The duration is in seconds. After `time_limit_s` seconds the command and all its child processes are killed. `on_line` is
    called with each line of output.
    """
    started = time.monotonic()
    variables = {"KIT_STARTED": str(started), "KIT_TIME_LIMIT_S": f"{time_limit_s:g}"}
    process = subprocess.Popen(
        command,
        env=environment | variables,
        cwd=working,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None  # for mypy: stdout=PIPE
    timer = threading.Timer(time_limit_s, kill_family, [process.pid])
    timer.start()
    try:
        with log.open("w", encoding="utf-8") as log_file:
            for line in process.stdout:
                log_file.write(line)
                log_file.flush()
                if on_line:
                    on_line(line.rstrip("\n"))
        return process.wait(), time.monotonic() - started
    finally:
        timer.cancel()
        kill_family(process.pid)
        process.wait()


def _find_problem(exit_code: int, exceeded_limit_s: float | None, executed: Path) -> str:
    if exceeded_limit_s is not None:
        return f"the time limit was reached{_explain_short_limit(exceeded_limit_s)}"
    text = executed.read_text(encoding="utf-8")
    cell = first_problem(executed) if text else "papermill wrote no notebook"
    # The notebook of a killed kernel may look as if all cells were completed.
    return cell or (f"papermill's exit code is {exit_code}" if exit_code else "")


def _explain_short_limit(limit_s: float) -> str:
    """Return text that states the shortest time limit that is possible on this machine; "" if `limit_s` is long enough."""
    if limit_s > LONGEST_START_S:
        return ""
    started = time.monotonic()
    if subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True).returncode:
        return ""
    imports_s = time.monotonic() - started
    smallest_s = math.ceil(STARTS * imports_s)
    if limit_s >= smallest_s:
        return ""
    return (
        f"; no limit below about {smallest_s} s can hold on this machine, because importing papermill, the notebook's "
        f"kernel and pandas alone takes {imports_s:.1f} s"
    )
