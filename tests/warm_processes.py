"""Processes that are forks of a process that has loaded torch, because loading takes most of a small test's time.

The fixture `quick_processes` lets Jupyter start its kernels, and multiprocessing its spawned processes, as such forks;
`run_script` runs a Python script in one. Like real ones, they share no memory with the test's process, and have its
environment variables, folder and streams. tests/test_notebook.py and the rehearsals do not use them, and so test real ones.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

# Of kitlib: they load all that takes long to load, also scikit-learn and readers of data sets.
MODULES = (
    "datasets.pool",
    "competitions.registry",
    "fusion.tuning",
    "inference.predict",
    "training.driver",
    "training.findings",
    "training.study",
    "training.lungs",
    "training.train_folds",
    "reports.classification_runs",
    "reports.figures",
    "reports.heat_maps",
    "reports.heidelberg_report",
    "reports.lungs_report",
    "leaderboard.listing",
)
DIE_WITH_PARENT, ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER, linux/prctl.h
_prctl = ctypes.CDLL(None).prctl
spawn_a_new_process = multiprocessing.util.spawnv_passfds
_starting = threading.Lock()


@contextmanager
def warm_server():
    """Start the process that is forked; yields its socket's path, valid until the context ends."""
    folder = Path(tempfile.mkdtemp(prefix="warm-processes-"))
    address, spec = str(folder / "socket"), folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-I", "-S", __file__, "ask", address, "kernel", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # otherwise Jupyter's debugger prints a warning when it is loaded
    server = subprocess.Popen([sys.executable, __file__, "serve", address], env=environment, stdout=subprocess.PIPE)
    try:
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the process that is forked ended with exit code {server.wait()}")
        yield address
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def serve(address):
    """Load MODULES and Jupyter's kernel, then fork a process for each request to the socket `address`."""
    _prctl(DIE_WITH_PARENT, signal.SIGKILL)  # also if the tests are killed
    sys.path.pop(0)  # the tests' folder, which is not on a kernel's path
    gc.disable()
    for name in ("ipykernel.kernelapp", *(f"kitlib.{name}" for name in MODULES)):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise the first garbage collection of each fork would write to, and so copy, all loaded memory
    gc.enable()
    with listening(address) as server:
        print("ready", flush=True)
        fork_for_each_request(server)


def listening(address):
    """Return a socket at the path `address` that accepts requests."""
    Path(address).unlink(missing_ok=True)  # of an earlier process with the same id
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(32)
    return server


def fork_for_each_request(server):
    """Run each request to the socket `server` in a fork of this process, for ever."""
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            address = server.getsockname()
            server.close()
            run(client, address)
        client.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def run(client, address):
    """Run what the socket `client` requests, with the client's streams, environment and folder; ends this process."""
    code = 1
    try:
        # The request ends with a newline; the file descriptors arrive with its first bytes.
        message, descriptors, _, _ = socket.recv_fds(client, 2**16, 64)
        while not message.endswith(b"\n"):
            message += client.recv(2**16)
        request = json.loads(message)
        kind, *arguments = request["arguments"]
        if kind == "spawn":
            become_child_of(request["process"])
            client.sendall(b"%d\n" % os.getpid())
            client.close()
        # They get the numbers that they have in the client. First they move away from all of these numbers.
        moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 512) for descriptor in descriptors]
        for descriptor in descriptors:
            os.close(descriptor)
        for descriptor, number in zip(moved, request["descriptors"], strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        import torch

        # Loaded libraries do not read the environment again.
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        fork_server(f"{address}-{os.getpid()}", client)
        if kind == "spawn":
            run_command(arguments)
        else:
            threading.Thread(target=end_with, args=(client,), daemon=True).start()
            run_kernel(arguments) if kind == "kernel" else runpy.run_path(arguments[0], run_name="__main__")
            client.sendall(b"0")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become_child_of(parent):
    """Continue in a child process of the process `parent`, an ancestor that adopts orphans at this moment."""
    if os.fork():
        os._exit(0)
    limit = time.monotonic() + 60
    while os.getppid() != parent:
        if time.monotonic() > limit:
            raise RuntimeError(f"process {parent} has not adopted this process")
        time.sleep(0.001)


def fork_server(address, client):
    """Fork a server for the processes that this process will spawn; it ends with this process."""
    server = listening(address)
    if os.fork() == 0:
        _prctl(DIE_WITH_PARENT, signal.SIGKILL)
        client.close()
        fork_for_each_request(server)
    server.close()
    multiprocessing.util.spawnv_passfds = partial(spawn, address)


def run_command(arguments):
    """Run the Python command of a process that multiprocessing spawns: python ... -c command option."""
    *_, command, option = arguments
    sys.argv = ["-c", option]
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(command, vars(sys.modules["__main__"]))


def run_kernel(arguments):
    """Run a Jupyter kernel."""
    from ipykernel.kernelapp import launch_new_instance

    sys.argv = ["ipykernel_launcher", *arguments]
    launch_new_instance()


def end_with(client):
    """End this process when the client process is killed."""
    client.recv(1)
    os._exit(1)


def spawn(address, path, arguments, descriptors):
    """Stand in for multiprocessing.util.spawnv_passfds: return the id of a new process, a child of this one."""
    if "--multiprocessing-fork" not in arguments:  # multiprocessing's own process, which tracks resources
        return spawn_a_new_process(path, arguments, descriptors)
    with _starting, socket.socket(socket.AF_UNIX) as client:
        _prctl(ADOPT_ORPHANS, 1)
        try:
            send_request(client, address, ("spawn", *map(os.fsdecode, arguments)), [0, 1, 2, *sorted(map(int, descriptors))])
            return int(client.makefile().readline())
        finally:
            _prctl(ADOPT_ORPHANS, 0)


def run_script(path):
    """Run the Python script `path`, and write its output to a .log file beside it.

    Raises AssertionError, with the end of the log, if the script fails.
    """
    address, log = os.environ["JUPYTER_PATH"] + "/socket", path.with_suffix(".log")
    with open(os.devnull) as nothing, log.open("w") as output:
        streams = [nothing.fileno(), output.fileno(), output.fileno()]
        code = ask(address, "script", str(path), streams=streams)
    assert code == 0, f"{path}\n{log.read_text()[-3000:]}"


def ask(address, *arguments, streams=(0, 1, 2)):
    """Request a kernel or a script's run from the socket `address` and wait for its end; return its exit code."""
    with socket.socket(socket.AF_UNIX) as client:
        send_request(client, address, arguments, streams, (0, 1, 2))
        # The process sends one byte when it ends normally, and nothing if it fails or is killed.
        return 0 if client.recv(1) else 1


def send_request(client, address, arguments, descriptors, numbers=None):
    """Connect the socket `client` and request a run of `arguments`.

    The process gets the file `descriptors` under their own or the given numbers.
    """
    request = {"arguments": arguments, "descriptors": list(numbers or descriptors), "process": os.getpid()}
    request |= {"environment": dict(os.environ), "folder": os.getcwd()}
    client.connect(address)
    message = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(client, [message], list(descriptors))
    client.sendall(message[sent:])


if __name__ == "__main__":
    command, *options = sys.argv[1:]
    sys.exit({"serve": serve, "ask": ask}[command](*options))
