"""A built kernel run as Kaggle would run it: its image's packages, its folders, no network, a clock that ends it."""

import base64
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kitlib.errors import KernelError
from kitlib.kernels.kaggle_environment import fresh_environment, kaggle_packages
from kitlib.kernels.sandbox import no_sandbox_reason, sandboxed
from kitlib.kernels.spec import KernelSpec
from kitlib.kernels.wheels import pins_of, running_wheels, suits_running
from kitlib.notebook import first_problem
from kitlib.paths import project_root
from kitlib.processes import kill_family
from kitlib.scoring.score import score_files
from kitlib.scoring.validate import validate

logger = logging.getLogger(__name__)

# Settings of this machine that its GPU or its libraries cannot do without; all others stay outside.
PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
WORKING, REHEARSAL, ENVIRONMENT = Path("/kaggle/working"), Path("/rehearsal"), Path("/environment")
# Where Kaggle mounts a kernel's inputs below /kaggle/input: each by its slug, or by kind and owner. Both occur.
LAYOUTS = {
    "plain": {"competition_sources": "{slug}", "dataset_sources": "{slug}", "kernel_sources": "{slug}"},
    "nested": {
        "competition_sources": "competitions/{slug}",
        "dataset_sources": "datasets/{owner}/{slug}",
        "kernel_sources": "notebooks/{owner}/{slug}",
    },
}


@dataclass(frozen=True)
class Rehearsal:
    """How it went. The kernel's output is in `working`, what it printed in `log`, its executed notebook in `executed`."""

    seconds: float
    limit_s: float
    problem: str  # why the notebook did not run to its end; empty if it did
    unfinished: bool  # it ended as it should when its session did, before its run was finished
    result: str  # the file that a finished kernel leaves, below `working`; empty where the notebook names none
    faults: tuple[str, ...]  # of that file; that there is none is one
    scores: dict[str, float] | None  # of a valid submission where the truth is known
    not_isolated: str  # what the system did not allow, empty if all was private
    working: Path
    log: Path
    executed: Path

    @property
    def in_time(self) -> bool:
        return self.seconds <= self.limit_s

    @property
    def passed(self) -> bool:
        return self.in_time and not self.problem and not self.faults and not self.unfinished


def rehearse(
    spec: KernelSpec,
    out: str | Path,
    inputs: str | Path,
    time_limit_s: float,
    truth: str | Path | None = None,
    on_line: Callable[[str], None] | None = None,
    layout: str = "plain",
) -> Rehearsal:
    """Run `out`/kernel, built of `spec`, with its rehearsal's parameters; stop it after `time_limit_s`.

    What it names as its inputs is attached and nothing else: `out`/wheels, `out`/weights, and for everything else the folder
    of that slug in `inputs`, at the places of `layout` (of LAYOUTS). Replaces `out`/working, `out`/rehearsal.log and
    `out`/rehearsal.ipynb. `on_line` gets each line that the kernel prints. `truth`, for a kernel that submits, is a folder
    with train_study_level.csv and train_image_level.csv. A link in an input that leads into the project's folder or below
    /tmp is broken for the kernel, which sees neither. Raises KernelError where it cannot begin.
    """
    out, inputs = Path(out).resolve(), Path(inputs).resolve()
    metadata = _metadata(spec, out)
    built = _built(out)
    folders = _folders(metadata, built, inputs, LAYOUTS[layout])
    if truth and not spec.submits:
        raise KernelError(f"{spec.slug} submits nothing that the truth could score; leave the truth out")
    sample = inputs / spec.competition / "sample_submission.csv"
    if spec.submits and not sample.is_file():
        raise KernelError(f"there is no {sample}; the inputs are a folder that holds {spec.competition}/")
    packages = kaggle_packages()
    working, log, executed = out / "working", out / "rehearsal.log", out / "rehearsal.ipynb"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    executed.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=out, prefix=".rehearsal-", ignore_cleanup_errors=True) as private:
        wheels = _fitting_wheels(out / "wheels", Path(private) / "wheels")
        attached = {place: wheels if folder == out / "wheels" else folder for place, folder in folders.items()}
        prepare = _open_command if no_sandbox_reason() else _isolated_command
        code, options = out / "kernel" / metadata["code_file"], _options(spec)
        command, environment = prepare(Path(private), packages, attached, code, working, executed, options)
        environment["KIT_TIME_LIMIT_S"] = f"{time_limit_s:g}"
        exit_code, seconds = run_until(command, environment, working, time_limit_s, log, on_line)
    problem = _problem(exit_code, seconds > time_limit_s, executed)
    result, unfinished, faults = _left(spec, working, sample)
    return Rehearsal(
        seconds=seconds,
        limit_s=time_limit_s,
        problem=problem,
        unfinished=unfinished and not problem,
        result=result,
        faults=() if unfinished and not problem else faults,
        scores=score_files(truth, working / result) if truth and not faults else None,
        not_isolated=no_sandbox_reason(),
        working=working,
        log=log,
        executed=executed,
    )


def _metadata(spec: KernelSpec, out: Path) -> dict[str, Any]:
    described = out / "kernel" / "kernel-metadata.json"
    if not described.is_file():
        raise KernelError(f"there is no {described}; build the kernel first")
    metadata = json.loads(described.read_text(encoding="utf-8"))
    if metadata["id"] != f"{spec.owner}/{spec.slug}":
        raise KernelError(f"{out} holds {metadata['id']}, not {spec.owner}/{spec.slug}; build the kernel first")
    if metadata["enable_internet"]:
        logger.warning("On Kaggle this kernel has the internet; its rehearsal has none.")
    return metadata


def _built(out: Path) -> dict[str, Path]:
    """The datasets that were built with the kernel, by OWNER/SLUG."""
    told = {folder: folder / "dataset-metadata.json" for folder in (out / "wheels", out / "weights")}
    return {json.loads(file.read_text(encoding="utf-8"))["id"]: folder for folder, file in told.items() if file.is_file()}


def _folders(metadata: dict[str, Any], built: dict[str, Path], inputs: Path, layout: dict[str, str]) -> dict[str, Path]:
    """The inputs' folders by their places below /kaggle/input. Raises KernelError with all that are missing."""
    folders, missing = {}, []
    for kind, place in layout.items():
        for source in metadata[kind]:
            owner, _, slug = source.rpartition("/")
            folder = inputs / slug
            if source in built and folder.is_dir():
                raise KernelError(f"the kernel wants {source}, which was built and lies in {inputs} too: remove one")
            folder = built.get(source, folder)
            if not folder.is_dir():
                got = "that kernel's output, or a link to its rehearsal's working/"
                got = got if kind == "kernel_sources" else "see inputs/README.md"
                missing.append(f"{folder} for {source} of its {kind}: {got}")
            folders[place.format(owner=owner, slug=slug)] = folder
    if missing:
        raise KernelError("the kernel's inputs are not all there: there is no " + "; no ".join(missing))
    return folders


def _fitting_wheels(wheels: Path, replaced: Path) -> Path:
    """The folder `wheels` or, where its wheels do not fit this Python, `replaced` with the same versions that do."""
    found = sorted(wheels.glob("*.whl"))
    if suits_running(found):
        return wheels
    logger.warning("The wheels for Kaggle's Python 3.12 do not fit this Python: the same versions for it take their place.")
    replaced.mkdir()
    for wheel in running_wheels(pins_of(found)):
        shutil.copyfile(wheel, replaced / wheel.name)
    return replaced


def _left(spec: KernelSpec, working: Path, sample: Path) -> tuple[str, bool, tuple[str, ...]]:
    """The file that marks a finished kernel, whether it was merely not finished yet, and the file's faults."""
    if spec.submits:
        result = working / "submission.csv"
        faults = (
            tuple(map(str, validate(sample, result))) if result.is_file() else (f"there is no {result.name} in {working}",)
        )
        return result.name, False, faults
    run = spec.run_folder(rehearsed=True)
    if run is None:
        return "", False, ()
    result, started = working / run / "metrics.json", working / run / "record.json"
    if result.is_file():
        return f"{run}/{result.name}", False, ()
    # What a session leaves that ended before its training did.
    unfinished = started.is_file() and any((working / run).rglob("checkpoints"))
    return f"{run}/{result.name}", unfinished, (f"there is no {run}/{result.name} in {working}",)


def _isolated_command(
    private: Path,
    packages: Path,
    attached: dict[str, Path],
    code: Path,
    working: Path,
    executed: Path,
    options: list[str],
) -> tuple[list[str], dict[str, str]]:
    """The command that runs the notebook, and its environment. `private` is a folder for what is thrown away afterwards."""
    for name in ("root", "tmp/home"):
        (private / name).mkdir(parents=True)
    fresh_environment(private / "environment", "/image")
    python, code_inside, executed_inside = (
        ENVIRONMENT / "bin" / "python",
        REHEARSAL / code.name,
        REHEARSAL / "executed.ipynb",
    )
    command = sandboxed(
        _papermill(python, code_inside, executed_inside, WORKING, options),
        root=private / "root",
        read_only={f"/kaggle/input/{name}": folder for name, folder in attached.items()}
        | {"/image": packages, str(code_inside): code},
        writable={
            str(WORKING): working,
            str(executed_inside): executed,
            str(ENVIRONMENT): private / "environment",
            "/tmp": private / "tmp",
        },
        hidden=[project_root()],
        folder=str(WORKING),
    )
    return command, _environment(python, home="/tmp/home")


def _open_command(
    private: Path,
    packages: Path,
    attached: dict[str, Path],
    code: Path,
    working: Path,
    executed: Path,
    options: list[str],
) -> tuple[list[str], dict[str, str]]:
    """The same where the system has no private namespaces: links instead of mounts."""
    logger.warning(
        "Not isolated, because this system has no private namespaces (%s): the kernel could reach the network, write into "
        "its inputs and see this machine's files. Its packages, its time limit and its output are as on Kaggle.",
        no_sandbox_reason(),
    )
    root = private / "kaggle"
    for folder in (root / "input", private / "tmp" / "home"):
        folder.mkdir(parents=True)
    for name, folder in attached.items():
        (root / "input" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "input" / name).symlink_to(folder, target_is_directory=True)
    (root / "working").symlink_to(working, target_is_directory=True)
    python = fresh_environment(private / "environment", packages)
    environment = _environment(python, home=str(private / "tmp" / "home"))
    environment |= {"KIT_KAGGLE_ROOT": str(root), "TMPDIR": str(private / "tmp")}
    return _papermill(python, code, executed, working, options), environment


def _environment(python: Path, home: str) -> dict[str, str]:
    """What Kaggle sets, and nothing that this machine's user has set for pip, Python or libraries."""
    path = f"{python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        "HOME": home,
        "PATH": path,
        "LANG": "C.UTF-8",
        "PIP_CONFIG_FILE": os.devnull,
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KAGGLE_URL_BASE": "https://www.kaggle.com",
    }


def _options(spec: KernelSpec) -> list[str]:
    """Papermill's, for the rehearsal's parameters: it replaces the cell of injected ones, so that it needs them all."""
    if not spec.rehearsal:
        return []
    said = yaml.safe_dump(spec.injected(rehearsed=True), sort_keys=False)
    return ["--parameters_base64", base64.b64encode(said.encode()).decode("ascii")]


def _papermill(python: Path, notebook: Path, executed: Path, working: Path, options: list[str]) -> list[str]:
    command = [str(python), "-m", "papermill", str(notebook), str(executed), "--cwd", str(working)]
    return [*command, "--no-progress-bar", "--log-output", "-k", "python3", *options]


def run_until(
    command: list[str],
    environment: dict[str, str],
    working: Path,
    time_limit_s: float,
    log: Path,
    on_line: Callable[[str], None] | None,
) -> tuple[int, float]:
    """Exit code and seconds; at the limit every process of the kernel is killed."""
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
    assert process.stdout is not None  # a pipe, as asked for
    clock = threading.Timer(time_limit_s, kill_family, [process.pid])
    clock.start()
    try:
        with log.open("w", encoding="utf-8") as kept:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                if on_line:
                    on_line(line.rstrip("\n"))
        return process.wait(), time.monotonic() - started
    finally:
        clock.cancel()
        kill_family(process.pid)
        process.wait()


def _problem(exit_code: int, too_late: bool, executed: Path) -> str:
    if too_late:
        return "the time limit struck"
    text = executed.read_text(encoding="utf-8")
    cell = first_problem(executed) if text else "papermill wrote no notebook"
    # A killed kernel can leave a notebook whose cells all look completed.
    return cell or (f"papermill's exit code is {exit_code}" if exit_code else "")
