"""A built kernel run as Kaggle would run it: its image's packages, its folders, no network, a clock that ends it."""

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

import psutil

from kitlib.paths import project_root
from kitlib.run_notebook import first_problem
from kitlib.sandbox import no_sandbox_reason, sandboxed
from kitlib.scoring import score_files
from kitlib.stand_in import fresh_environment, stand_in
from kitlib.validate import validate
from kitlib.wheels import pins_of, running_wheels, suits_running

logger = logging.getLogger(__name__)

# Settings of this machine that its GPU or its libraries cannot do without; all others stay outside.
PASSED_ON = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
WORKING, REHEARSAL, ENVIRONMENT = Path("/kaggle/working"), Path("/rehearsal"), Path("/environment")


class RehearsalError(RuntimeError):
    """A rehearsal that cannot begin: names what is missing."""


@dataclass(frozen=True)
class Rehearsal:
    """How it went. The kernel's output is in `working`, what it printed in `log`, its executed notebook in `executed`."""

    seconds: float
    limit_s: float
    problem: str  # why the notebook did not run to its end; empty if it did
    faults: tuple[str, ...]  # of submission.csv; "there is no submission.csv" is one
    scores: dict[str, float] | None  # where the truth is known and the file is valid
    not_isolated: str  # what the system did not allow, empty if all was private
    working: Path
    log: Path
    executed: Path

    @property
    def in_time(self) -> bool:
        return self.seconds <= self.limit_s

    @property
    def passed(self) -> bool:
        return self.in_time and not self.problem and not self.faults


def rehearse(
    out: str | Path,
    inputs: str | Path,
    time_limit_s: float,
    truth: str | Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Rehearsal:
    """Run `out`/kernel with `out`/wheels, `out`/weights and the folders in `inputs` attached; stop it after `time_limit_s`.

    Replaces `out`/working, `out`/rehearsal.log and `out`/rehearsal.ipynb. `on_line` gets each line that the kernel prints.
    `truth` is a folder with train_study_level.csv and train_image_level.csv. A link in `inputs` that leads into the
    project's folder or below /tmp is broken for the kernel, which sees neither. Raises RehearsalError, StandInError,
    WheelError.
    """
    out, inputs = Path(out).resolve(), Path(inputs).resolve()
    metadata = _metadata(out)
    competition = metadata["competition_sources"][0]
    sample = inputs / competition / "sample_submission.csv"
    if not sample.is_file():
        raise RehearsalError(f"there is no {sample}; the inputs are a folder that holds {competition}/")
    packages = stand_in()
    working, log, executed = out / "working", out / "rehearsal.log", out / "rehearsal.ipynb"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    executed.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=out, prefix=".rehearsal-", ignore_cleanup_errors=True) as private:
        attached = _attached(out, inputs, metadata, Path(private) / "wheels")
        prepare = _open_command if no_sandbox_reason() else _isolated_command
        command, environment = prepare(
            Path(private), packages, attached, out / "kernel" / metadata["code_file"], working, executed
        )
        environment["KIT_TIME_LIMIT_S"] = f"{time_limit_s:g}"
        exit_code, seconds = _run_until(command, environment, working, time_limit_s, log, on_line)
    faults = tuple(map(str, validate(sample, working / "submission.csv")))
    if not (working / "submission.csv").is_file():
        faults = (f"there is no submission.csv in {working}",)
    return Rehearsal(
        seconds=seconds,
        limit_s=time_limit_s,
        problem=_problem(exit_code, seconds > time_limit_s, executed),
        faults=faults,
        scores=score_files(truth, working / "submission.csv") if truth and not faults else None,
        not_isolated=no_sandbox_reason(),
        working=working,
        log=log,
        executed=executed,
    )


def _metadata(out: Path) -> dict[str, Any]:
    described = out / "kernel" / "kernel-metadata.json"
    if not described.is_file():
        raise RehearsalError(f"there is no {described}; build the kernel first")
    return json.loads(described.read_text(encoding="utf-8"))


def _attached(out: Path, inputs: Path, metadata: dict[str, Any], replaced: Path) -> dict[str, Path]:
    """Folders by their names below /kaggle/input. Where Kaggle's wheels do not fit this Python, others go to `replaced`."""
    attached = {folder.name: folder for folder in sorted(inputs.iterdir()) if folder.is_dir()}
    datasets = {}
    for part in ("wheels", "weights"):
        told = json.loads((out / part / "dataset-metadata.json").read_text(encoding="utf-8"))
        datasets[told["id"]] = out / part
    wheels = sorted((out / "wheels").glob("*.whl"))
    if not suits_running(wheels):
        logger.warning(
            "The wheels for Kaggle's Python 3.12 do not fit this Python: the same versions for it take their place."
        )
        replaced.mkdir()
        for wheel in running_wheels(pins_of(wheels)):
            shutil.copyfile(wheel, replaced / wheel.name)
        datasets = {name: replaced if folder == out / "wheels" else folder for name, folder in datasets.items()}
    for source in metadata["dataset_sources"]:
        slug = source.split("/")[1]
        if source not in datasets or slug in attached:
            raise RehearsalError(f"the kernel wants {source}: it must be built in {out} and not lie in {inputs} too")
        attached[slug] = datasets[source]
    return attached


def _isolated_command(
    private: Path, packages: Path, attached: dict[str, Path], code: Path, working: Path, executed: Path
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
        _papermill(python, code_inside, executed_inside, WORKING),
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
    private: Path, packages: Path, attached: dict[str, Path], code: Path, working: Path, executed: Path
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
        (root / "input" / name).symlink_to(folder, target_is_directory=True)
    (root / "working").symlink_to(working, target_is_directory=True)
    python = fresh_environment(private / "environment", packages)
    environment = _environment(python, home=str(private / "tmp" / "home"))
    environment |= {"KIT_KAGGLE_ROOT": str(root), "TMPDIR": str(private / "tmp")}
    return _papermill(python, code, executed, working), environment


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


def _papermill(python: Path, notebook: Path, executed: Path, working: Path) -> list[str]:
    command = [str(python), "-m", "papermill", str(notebook), str(executed), "--cwd", str(working)]
    return [*command, "--no-progress-bar", "--log-output", "-k", "python3"]


def _run_until(
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
    clock = threading.Timer(time_limit_s, _kill_all, [process.pid])
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
        _kill_all(process.pid)
        process.wait()


def _kill_all(process: int) -> None:
    """The process and its descendants: a notebook's kernel leads a process group of its own."""
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


def _problem(exit_code: int, too_late: bool, executed: Path) -> str:
    if too_late:
        return "the time limit struck"
    text = executed.read_text(encoding="utf-8")
    cell = first_problem(executed) if text else "papermill wrote no notebook"
    # A killed kernel can leave a notebook whose cells all look completed.
    return cell or (f"papermill's exit code is {exit_code}" if exit_code else "")
