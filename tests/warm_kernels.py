"""Notebooks' kernels as copies of one process that has loaded torch, which is most of what a small notebook does.

Papermill starts them as it starts any kernel. What shows only in a kernel of its own is shown by tests/test_notebook.py
and by the rehearsals, whose sandbox knows nothing of this.
"""

import gc
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
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
    """Where Jupyter finds, until this ends, a kernel `python3` that is a copy: a value of JUPYTER_PATH."""
    folder = Path(tempfile.mkdtemp(prefix="warm-kernels-"))
    place, spec = str(folder / "socket"), folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-I", "-S", __file__, "ask", place, "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    server = subprocess.Popen([sys.executable, __file__, "serve", place], env=environment, stdout=subprocess.PIPE)
    try:
        if server.stdout.readline() != b"ready\n":
            raise RuntimeError(f"no kernels: the process that copies itself ended with {server.wait()}")
        yield str(folder)
    finally:
        server.kill()  # its copies end with it
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def serve(place):
    sys.path.pop(0)  # the tests' folder, which is no kernel's
    for name in MODULES:
        importlib.import_module(f"kitlib.{name}")
    gc.freeze()  # or each copy's first collection would write to, and so double, all that is loaded
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(32)
        print("ready", flush=True)
        while True:
            asking, _ = listening.accept()
            with asking:
                if os.fork() == 0:
                    listening.close()
                    be_kernel(asking)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def be_kernel(asking):
    """Go on as the kernel that `asking` wants, with its streams, environment and folder; ends this process."""
    code = 1
    try:
        # The request ends with a line's end, and its first bytes bring the streams.
        told, streams, _, _ = socket.recv_fds(asking, 65536, 3)
        while not told.endswith(b"\n"):
            told += asking.recv(65536)
        request = json.loads(told)
        for stream, given in enumerate(streams):
            os.dup2(given, stream)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["ipykernel_launcher", *request["arguments"]]
        threading.Thread(target=end_with, args=(asking,), daemon=True).start()
        import torch
        from ipykernel.kernelapp import launch_new_instance

        # Libraries that are loaded do not ask again.
        if "OMP_NUM_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        launch_new_instance()
        code = 0
        asking.sendall(b"0")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with(asking):
    """End this process when the one that asked for it is killed."""
    asking.recv(1)
    os._exit(1)


def ask(place, *arguments):
    request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        told = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(asking, [told], [0, 1, 2])
        asking.sendall(told[sent:])
        # An answer when the kernel ends, nothing where it is killed.
        return 0 if asking.recv(1) else 1


if __name__ == "__main__":
    does, *given = sys.argv[1:]
    sys.exit({"serve": serve, "ask": ask}[does](*given))
