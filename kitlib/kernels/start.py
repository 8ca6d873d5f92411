"""The first cell of a kernel, which runs before kitlib is available: starts the clock, unpacks kitlib, installs the wheels.

The source of this file is copied into the kernel, so its top-level imports are from the standard library only.
"""

import base64
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path


def start_kernel(packed: str, wheels: str = "") -> Path:
    """Unpack the embedded library into a new folder and return the folder; install the kernel's wheels.

    `packed` is the library, as base64 of a tar.bz2. The folder comes first on the import path of this process and of its
    child processes. `wheels` is the slug of the wheels dataset to install; if it is empty, the notebook installs its wheels
    itself. Unless a rehearsal has set the environment variable KIT_STARTED, sets it to time.monotonic(), in seconds. All
    deadlines count from KIT_STARTED. Raises the errors of `install_wheels`.
    """
    os.environ.setdefault("KIT_STARTED", str(time.monotonic()))
    folder = Path(tempfile.mkdtemp(prefix="kit-"))
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as archive:
        archive.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ["KIT_ROOT"] = str(folder)
    if wheels:
        from kitlib.inference.install_wheels import install_wheels

        install_wheels(wheels)
    return folder
