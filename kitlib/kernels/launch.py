"""Command lines that run a built notebook in a rehearsal: in the stand-in for Kaggle's Docker image, or with Docker."""

import base64
import csv
import io
import logging
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import yaml

from kitlib.errors import KernelError
from kitlib.kernels.kaggle_environment import create_environment
from kitlib.kernels.sandbox import no_sandbox_reason, sandbox_command
from kitlib.kernels.spec import KernelSpec
from kitlib.paths import project_root

logger = logging.getLogger(__name__)

# Environment variables that the GPU and the libraries need; the kernel gets no other variables of this machine.
PASSED_VARIABLES = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
# A rehearsal runs as the scored rerun, in which a kernel built with --quick-save also predicts every file.
KAGGLE_VARIABLES = {
    "LANG": "C.UTF-8",
    "KAGGLE_KERNEL_RUN_TYPE": "Batch",
    "KAGGLE_URL_BASE": "https://www.kaggle.com",
    "KAGGLE_IS_COMPETITION_RERUN": "1",
}
WORKING, REHEARSAL, ENVIRONMENT = Path("/kaggle/working"), Path("/rehearsal"), Path("/environment")
# Kaggle's public images: https://github.com/Kaggle/docker-python
IMAGES = {"cpu": "gcr.io/kaggle-images/python", "gpu": "gcr.io/kaggle-gpu-images/python"}
SHARED_MEMORY = "8g"  # Docker's default of 64 MB is too small for the workers of a data loader


@dataclass(frozen=True)
class BuiltNotebook:
    """A built notebook and the folders that its run uses. The caller creates and removes `temporary_folder`."""

    path: Path
    inputs: dict[str, Path]  # path below /kaggle/input -> folder
    working: Path
    executed: Path  # existing file that the executed notebook replaces
    options: list[str]  # of papermill
    temporary_folder: Path


def stand_in_command(notebook: BuiltNotebook, packages: Path) -> tuple[list[str], dict[str, str]]:
    """Return two values: a command that runs the notebook with the packages in `packages`, and its environment variables.

    The command runs the notebook in a sandbox if this system has one.
    """
    return (_unisolated_command if no_sandbox_reason() else _isolated_command)(notebook, packages)


def docker_command(notebook: BuiltNotebook, image: str, name: str, gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Return two values: a command that runs the notebook in a Docker container, and its environment variables.

    The container is called `name`, runs the Docker image `image`, has no network, and gets this machine's GPUs if `gpu` is
    True. The inputs are mounted read-only. Raises KernelError if Docker is not installed or does not run, or if the image
    was not pulled.
    """
    if not shutil.which("docker"):
        raise KernelError(
            "Docker is not installed: there is no program `docker` on PATH. Install it, or rehearse without --docker, in "
            "the stand-in for Kaggle's Docker image"
        )
    found = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        raise KernelError(
            f"Docker cannot use the Docker image {image} ({reason}). If Docker does not run, start it. If the image is not "
            f"on this machine, pull it (tens of GB) with `docker pull {image}`"
        )
    mounted, executed = REHEARSAL / notebook.path.name, REHEARSAL / "executed.ipynb"
    read_only = {Path("/kaggle/input", slug): folder for slug, folder in notebook.inputs.items()} | {mounted: notebook.path}
    command = ["docker", "run", "--rm", "--init", "--pull=never", f"--name={name}", "--network=none"]
    command += [f"--shm-size={SHARED_MEMORY}", f"--workdir={WORKING}", *(["--gpus=all"] if gpu else [])]
    for target, source in read_only.items():
        command += _mount(source, target, "readonly")
    command += [*_mount(notebook.executed, executed), *_mount(notebook.working, WORKING)]
    for variable, value in KAGGLE_VARIABLES.items():
        command += ["--env", f"{variable}={value}"]
    # KIT_STARTED is not passed, because the clock of Docker's virtual machine differs from this machine's.
    command += ["--env", "KIT_TIME_LIMIT_S", image]
    return [*command, *_papermill_command("python", mounted, executed, WORKING, notebook.options)], dict(os.environ)


def container_name() -> str:
    """Return a new, unique name for the Docker container of a rehearsal."""
    return f"kit-rehearsal-{uuid.uuid4().hex[:12]}"


def end_container(name: str, image: str, working: Path) -> None:
    """Stop the container `name` if it still runs, and make this user the owner of the files in `working`.

    Those files may belong to root, because notebooks in Kaggle's Docker image run as root. The owner is changed in a
    container of the Docker image `image`.
    """
    subprocess.run(["docker", "rm", "--force", name], capture_output=True)
    if any(path.lstat().st_uid != os.getuid() for path in working.rglob("*")):
        owner = f"{os.getuid()}:{os.getgid()}"
        chown = ["docker", "run", "--rm", "--pull=never", "--network=none", *_mount(working, WORKING), image]
        subprocess.run([*chown, "chown", "--recursive", owner, str(WORKING)], capture_output=True)


def papermill_options(spec: KernelSpec) -> list[str]:
    """Return papermill's options that set the notebook's parameters in a rehearsal, as a list of command-line arguments.

    Returns [] if the kernel has no parameters for rehearsals. Otherwise the options set all parameters, because papermill
    replaces the whole cell of injected parameters.
    """
    if not spec.rehearsal:
        return []
    parameters = yaml.safe_dump(spec.injected_parameters(rehearsed=True), sort_keys=False)
    return ["--parameters_base64", base64.b64encode(parameters.encode()).decode("ascii")]


def _mount(source: Path, target: Path, *options: str) -> list[str]:
    """Return Docker's argument `--mount` and its value, which mounts `source` at `target` with `options` such as "readonly".

    The value is a row of CSV with quotes where needed, so that paths may contain colons and commas.
    """
    row = io.StringIO()
    csv.writer(row, lineterminator="").writerow(["type=bind", f"source={source.resolve()}", f"target={target}", *options])
    return ["--mount", row.getvalue()]


def _papermill_command(python: str | Path, notebook: Path, executed: Path, working: Path, options: list[str]) -> list[str]:
    command = [str(python), "-m", "papermill", str(notebook), str(executed), "--cwd", str(working)]
    return [*command, "--no-progress-bar", "--log-output", "-k", "python3", *options]


def _isolated_command(notebook: BuiltNotebook, packages: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the notebook in a sandbox, and the environment variables for the command."""
    temporary_folder = notebook.temporary_folder
    for name in ("root", "tmp/home"):
        (temporary_folder / name).mkdir(parents=True)
    create_environment(temporary_folder / "environment", "/image")
    python, mounted, executed = ENVIRONMENT / "bin" / "python", REHEARSAL / notebook.path.name, REHEARSAL / "executed.ipynb"
    command = sandbox_command(
        _papermill_command(python, mounted, executed, WORKING, notebook.options),
        root=temporary_folder / "root",
        read_only={f"/kaggle/input/{name}": folder for name, folder in notebook.inputs.items()}
        | {"/image": packages, str(mounted): notebook.path},
        writable={
            str(WORKING): notebook.working,
            str(executed): notebook.executed,
            str(ENVIRONMENT): temporary_folder / "environment",
            "/tmp": temporary_folder / "tmp",
        },
        # In a /kaggle of this machine, the kernel would see other inputs, and the sandbox would create mount points.
        hidden=[project_root(), WORKING.parent],
        folder=str(WORKING),
    )
    return command, _environment(python, home="/tmp/home")


def _unisolated_command(notebook: BuiltNotebook, packages: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the notebook without a sandbox, and the environment variables for the command.

    The inputs are linked instead of mounted. This is the fallback for systems without private namespaces.
    """
    logger.warning(
        "The rehearsal is not isolated, because this system has no private namespaces (%s): the kernel could reach the "
        "network, write into its inputs and see this machine's files. Packages, time limit and output are as on Kaggle.",
        no_sandbox_reason(),
    )
    temporary_folder, root = notebook.temporary_folder, notebook.temporary_folder / "kaggle"
    for folder in (root / "input", temporary_folder / "tmp" / "home"):
        folder.mkdir(parents=True)
    for name, folder in notebook.inputs.items():
        (root / "input" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "input" / name).symlink_to(folder)
    (root / "working").symlink_to(notebook.working)
    python = create_environment(temporary_folder / "environment", packages)
    environment = _environment(python, home=str(temporary_folder / "tmp" / "home"))
    environment |= {"KIT_KAGGLE_ROOT": str(root), "TMPDIR": str(temporary_folder / "tmp")}
    return _papermill_command(python, notebook.path, notebook.executed, notebook.working, notebook.options), environment


def _environment(python: Path, home: str) -> dict[str, str]:
    """Return environment variables like Kaggle's, without this machine's settings for pip, Python or libraries."""
    path = f"{python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    return {**passed, "HOME": home, "PATH": path, "PIP_CONFIG_FILE": os.devnull, **KAGGLE_VARIABLES}
