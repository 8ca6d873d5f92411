"""Run a built kernel as Kaggle would: with the image's packages, Kaggle's folders, no network and a time limit."""

import base64
import json
import logging
import math
import os
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

import yaml

from kitlib.datasets.siim import read_test
from kitlib.errors import DatasetError, KernelError
from kitlib.kernels.kaggle_environment import create_environment, link_kaggle_packages
from kitlib.kernels.sandbox import no_sandbox_reason, sandbox_command
from kitlib.kernels.spec import KernelSpec
from kitlib.kernels.wheels import are_installable, local_wheels, parse_pins
from kitlib.notebook import first_problem
from kitlib.paths import project_root
from kitlib.processes import kill_family
from kitlib.scoring.score import score_files
from kitlib.scoring.validate import validate_rows

logger = logging.getLogger(__name__)

# Environment variables that the GPU and the libraries need; the kernel gets no other variables of this machine.
PASSED_VARIABLES = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
WORKING, REHEARSAL, ENVIRONMENT = Path("/kaggle/working"), Path("/rehearsal"), Path("/environment")
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


# Imports of every kernel before its first stage. Starting, writing a file and ending takes STARTS times as long as these.
IMPORTS, STARTS = "import papermill.cli, ipykernel.kernelapp, pandas", 1.5
LONGEST_START_S = 120.0  # upper limit for the time to start, even with a cold disk

USAGE = "usage.json"  # in the kernel's output: how many files each bundle has predicted, see SubmissionRun.usage


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

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
        """Whether the kernel finished in time, without problems, and with a result without faults."""
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
) -> Rehearsal:
    """Run `out`/kernel, built from `spec`, with the parameters for rehearsals; return how the run ended, as a Rehearsal.

    `inputs` is a folder with one subfolder per input, named by the input's slug. Only the inputs in the kernel's metadata
    are attached: `out`/wheels, `out`/weights, and the others from `inputs`. `layout`, a key of LAYOUTS, decides where they
    are mounted. The kernel is killed after `time_limit_s` seconds. `on_line` is called with each line that the kernel
    prints. `truth`, only for a submission, is a folder with train_study_level.csv and train_image_level.csv, against which
    the submission is scored. It is a fault if a bundle in `out`/weights has not predicted every readable file, because a
    valid file of placeholder predictions would pass otherwise; `allow_placeholders` turns this check off. The submission
    notebook writes usage.json for the check. Replaces `out`/working, `out`/rehearsal.log and `out`/rehearsal.ipynb. The
    project's folder and /tmp are hidden from the kernel, so links in inputs that lead there are broken. Raises KernelError
    if the rehearsal cannot start, for example if an input is missing.
    """
    out, inputs = Path(out).resolve(), Path(inputs).resolve()
    metadata = _read_metadata(spec, out)
    built_datasets = _find_built_datasets(out)
    folders = _find_inputs(metadata, built_datasets, inputs, LAYOUTS[layout])
    if truth and not spec.is_submission:
        raise KernelError(f"{spec.slug} makes no submission to score with the ground truth; leave the ground truth out")
    ids = _find_submission_ids(inputs / spec.competition) if spec.is_submission else ()
    packages = link_kaggle_packages()
    working, log, executed = out / "working", out / "rehearsal.log", out / "rehearsal.ipynb"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    executed.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=out, prefix=".rehearsal-", ignore_cleanup_errors=True) as temporary_folder:
        wheels = _installable_wheels(out / "wheels", Path(temporary_folder) / "wheels")
        attached = {mount_point: wheels if folder == out / "wheels" else folder for mount_point, folder in folders.items()}
        make_command = _unisolated_command if no_sandbox_reason() else _isolated_command
        notebook, options = out / "kernel" / metadata["code_file"], _papermill_options(spec)
        command, environment = make_command(Path(temporary_folder), packages, attached, notebook, working, executed, options)
        environment["KIT_TIME_LIMIT_S"] = f"{time_limit_s:g}"
        exit_code, seconds = run_with_limit(command, environment, working, time_limit_s, log, on_line)
    problem = _find_problem(exit_code, time_limit_s if seconds > time_limit_s else None, executed)
    result, unfinished, faults = _check_result(spec, working, ids)
    scores = score_files(truth, working / result) if truth and not faults else None
    if spec.is_submission and not allow_placeholders:
        faults += _find_unused_bundles(out / "weights" / "weights.json", working / USAGE)
    return Rehearsal(
        seconds=seconds,
        limit_s=time_limit_s,
        problem=problem,
        unfinished=unfinished and not problem,
        result=result,
        faults=() if unfinished and not problem else faults,
        scores=scores,
        not_isolated=no_sandbox_reason(),
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
        raise KernelError(f"{out} contains {metadata['id']}, not {spec.owner}/{spec.slug}; build the kernel first")
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
                    f"there are two copies of {source}: the one that was built, and one in {inputs}; remove one"
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
    """Return a folder of wheels that this Python can install: `wheels` or else `replacement_folder`.

    If the wheels in `wheels` are for another Python, `replacement_folder` is filled with wheels of the same versions for
    this one.
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


def _find_submission_ids(competition: Path) -> tuple[str, ...]:
    """Return the ids that a submission must have, read from the folder `competition`. Raises KernelError if it has none."""
    try:
        return read_test(competition, headers=False).submission_ids
    except DatasetError as error:
        raise KernelError(f"the rows of a submission are unknown: {error}") from error


def _check_result(spec: KernelSpec, working: Path, ids: tuple[str, ...]) -> tuple[str, bool, tuple[str, ...]]:
    """Return the path of the result below `working`, whether the run can be resumed, and a tuple of the result's faults.

    The result is submission.csv of a submission, metrics.json of another run, or "" for a notebook that makes no run.
    `ids` are the ids that a submission must have.
    """
    if spec.is_submission:
        result = working / "submission.csv"
        faults = (
            tuple(map(str, validate_rows(ids, result)))
            if result.is_file()
            else (f"{result.name} does not exist in {working}",)
        )
        return result.name, False, faults
    run = spec.run_folder(rehearsed=True)
    if run is None:
        return "", False, ()
    result, record = working / run / "metrics.json", working / run / "record.json"
    if result.is_file():
        return f"{run}/{result.name}", False, ()
    # A training run that ended at its session's deadline has left a record and checkpoints.
    unfinished = record.is_file() and any((working / run).rglob("checkpoints"))
    return f"{run}/{result.name}", unfinished, (f"{run}/{result.name} does not exist in {working}",)


def _find_unused_bundles(manifest: Path, usage: Path) -> tuple[str, ...]:
    """Return a fault for each bundle listed in `manifest` that has not predicted every readable file."""
    names = [entry["folder"] for entry in json.loads(manifest.read_text(encoding="utf-8"))["bundles"]]
    if not usage.is_file():
        return (f"{usage.name} does not exist in {usage.parent}, so it is unknown which of {', '.join(names)} were used",)
    used = {entry["bundle"]: entry for entry in json.loads(usage.read_text(encoding="utf-8"))}
    counts = [(name, used.get(name, {"predicted": 0, "readable": 0})) for name in names]
    return tuple(
        f"{name} predicted {count['predicted']} of {count['readable']} readable files; the ledger says why"
        for name, count in counts
        if not 0 < count["predicted"] == count["readable"]
    )


def _isolated_command(
    temporary_folder: Path,
    packages: Path,
    attached: dict[str, Path],
    notebook: Path,
    working: Path,
    executed: Path,
    options: list[str],
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the notebook in a sandbox, and the environment variables for the command.

    `temporary_folder` contains the sandbox's root, virtual environment and /tmp; the caller deletes it.
    """
    for name in ("root", "tmp/home"):
        (temporary_folder / name).mkdir(parents=True)
    create_environment(temporary_folder / "environment", "/image")
    python, mounted_notebook, mounted_executed = (
        ENVIRONMENT / "bin" / "python",
        REHEARSAL / notebook.name,
        REHEARSAL / "executed.ipynb",
    )
    command = sandbox_command(
        _papermill_command(python, mounted_notebook, mounted_executed, WORKING, options),
        root=temporary_folder / "root",
        read_only={f"/kaggle/input/{name}": folder for name, folder in attached.items()}
        | {"/image": packages, str(mounted_notebook): notebook},
        writable={
            str(WORKING): working,
            str(mounted_executed): executed,
            str(ENVIRONMENT): temporary_folder / "environment",
            "/tmp": temporary_folder / "tmp",
        },
        hidden=[project_root()],
        folder=str(WORKING),
    )
    return command, _environment(python, home="/tmp/home")


def _unisolated_command(
    temporary_folder: Path,
    packages: Path,
    attached: dict[str, Path],
    notebook: Path,
    working: Path,
    executed: Path,
    options: list[str],
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the notebook without a sandbox, and the environment variables for the command.

    The inputs are linked instead of mounted. This is the fallback for systems without private namespaces.
    """
    logger.warning(
        "The rehearsal is not isolated, because this system has no private namespaces (%s): the kernel could reach the "
        "network, write into its inputs and see this machine's files. Packages, time limit and output are as on Kaggle.",
        no_sandbox_reason(),
    )
    root = temporary_folder / "kaggle"
    for folder in (root / "input", temporary_folder / "tmp" / "home"):
        folder.mkdir(parents=True)
    for name, folder in attached.items():
        (root / "input" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "input" / name).symlink_to(folder, target_is_directory=True)
    (root / "working").symlink_to(working, target_is_directory=True)
    python = create_environment(temporary_folder / "environment", packages)
    environment = _environment(python, home=str(temporary_folder / "tmp" / "home"))
    environment |= {"KIT_KAGGLE_ROOT": str(root), "TMPDIR": str(temporary_folder / "tmp")}
    return _papermill_command(python, notebook, executed, working, options), environment


def _environment(python: Path, home: str) -> dict[str, str]:
    """Return environment variables like Kaggle's, without this machine's settings for pip, Python or libraries."""
    path = f"{python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        **{name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ},
        "HOME": home,
        "PATH": path,
        "LANG": "C.UTF-8",
        "PIP_CONFIG_FILE": os.devnull,
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KAGGLE_URL_BASE": "https://www.kaggle.com",
    }


def _papermill_options(spec: KernelSpec) -> list[str]:
    """Return papermill's options for the rehearsal's parameters, or [] if the kernel has no parameters for rehearsals.

    All parameters are passed, because papermill replaces the whole cell of injected parameters.
    """
    if not spec.rehearsal:
        return []
    parameters = yaml.safe_dump(spec.injected_parameters(rehearsed=True), sort_keys=False)
    return ["--parameters_base64", base64.b64encode(parameters.encode()).decode("ascii")]


def _papermill_command(python: Path, notebook: Path, executed: Path, working: Path, options: list[str]) -> list[str]:
    command = [str(python), "-m", "papermill", str(notebook), str(executed), "--cwd", str(working)]
    return [*command, "--no-progress-bar", "--log-output", "-k", "python3", *options]


def run_with_limit(
    command: list[str],
    environment: dict[str, str],
    working: Path,
    time_limit_s: float,
    log: Path,
    on_line: Callable[[str], None] | None,
) -> tuple[int, float]:
    """Run a command in the folder `working`, copying its output to the file `log`; return its exit code and its seconds.

    After `time_limit_s` seconds the command and all its child processes are killed. `on_line` is called with each line of
    output.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment | {"KIT_STARTED": str(started)},
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
