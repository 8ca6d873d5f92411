"""Notebook kernels that are forks of a process that has loaded torch, because loading takes most of a small notebook's time.

Papermill starts them like any other kernel; `run_script` runs a Python script in such a fork instead. tests/test_notebook.py
and the rehearsals do not use them, and so test real kernels.
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

MODULES = (
    "training.driver",
    "training.findings",
    "training.study",
    "training.lungs",
    "training.train_folds",
    "fusion.tuning",
    "reports.figures",
)


@contextmanager
def warm_kernels():
    """Provide forked `python3` kernels to Jupyter; yields the value for JUPYTER_PATH, valid until the context ends."""
    folder = Path(tempfile.mkdtemp(prefix="warm-kernels-"))
    address, spec = str(folder / "socket"), folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-I", "-S", __file__, "ask", address, "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    server = subprocess.Popen([sys.executable, __file__, "serve", address], env=environment, stdout=subprocess.PIPE)
    try:
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the process that forks the kernels ended with exit code {server.wait()}")
        yield str(folder)
    finally:
        server.kill()  # ends its forks, too
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def serve(address):
    """Load MODULES, then fork a kernel for each request to the socket `address`."""
    sys.path.pop(0)  # the tests' folder, which is not on a kernel's path
    for name in MODULES:
        importlib.import_module(f"kitlib.{name}")
    gc.freeze()  # otherwise the first garbage collection of each fork would write to, and so copy, all loaded memory
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(32)
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    server.close()
                    run_kernel(client)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def run_kernel(client):
    """Run the requested kernel in this process, with the client's streams, environment and folder; ends the process."""
    code = 1
    try:
        # The request ends with a newline; the file descriptors arrive with its first bytes.
        message, streams, _, _ = socket.recv_fds(client, 65536, 3)
        while not message.endswith(b"\n"):
            message += client.recv(65536)
        request = json.loads(message)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["ipykernel_launcher", *request["arguments"]]
        threading.Thread(target=end_with, args=(client,), daemon=True).start()
        import torch
        from ipykernel.kernelapp import launch_new_instance

        # Loaded libraries do not read the environment again.
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if request["arguments"][0] == "script":
            runpy.run_path(request["arguments"][1], run_name="__main__")
        else:
            launch_new_instance()
        code = 0
        client.sendall(b"0")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with(client):
    """End this process when the client process is killed."""
    client.recv(1)
    os._exit(1)


def run_script(path):
    """Run the Python script `path` with one thread, and write its output to a .log file beside it.

    Raises AssertionError, with the end of the log, if the script fails.
    """
    address, log = os.environ["JUPYTER_PATH"] + "/socket", path.with_suffix(".log")
    with open(os.devnull) as nothing, log.open("w") as output:
        streams = [nothing.fileno(), output.fileno(), output.fileno()]
        code = ask(address, "script", str(path), streams=streams, variables={"OMP_NUM_THREADS": "1"})
    assert code == 0, f"{path}\n{log.read_text()[-3000:]}"


def ask(address, *arguments, streams=(0, 1, 2), variables=()):
    """Request a kernel from the socket `address` and wait for its end; return its exit code."""
    request = {"environment": dict(os.environ) | dict(variables), "folder": os.getcwd(), "arguments": arguments}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        message = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(client, [message], list(streams))
        client.sendall(message[sent:])
        # The kernel sends one byte when it ends normally, and nothing if it is killed.
        return 0 if client.recv(1) else 1


if __name__ == "__main__":
    command, *options = sys.argv[1:]
    sys.exit({"serve": serve, "ask": ask}[command](*options))
