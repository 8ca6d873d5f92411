"""What a kernel does before it has kitlib: start the clock, unpack the embedded library, install the attached wheels.

The source of this file is the first cell of a built kernel, so it begins with nothing but the standard library.
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
    """Put the embedded library (base64 of a tar.bz2) into a new folder, first on the path of this and of started processes.

    Then install the dataset `wheels`, unless that is left to the notebook (empty). Deadlines count from KIT_STARTED, in
    seconds of time.monotonic(): from here, unless a rehearsal has set it before. Raises what `install_wheels` does.
    """
    os.environ.setdefault("KIT_STARTED", str(time.monotonic()))
    folder = Path(tempfile.mkdtemp(prefix="kit-"))
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as opened:
        opened.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.environ["KIT_ROOT"] = str(folder)
    if wheels:
        from kitlib.inference.install_wheels import install_wheels

        install_wheels(wheels)
    return folder
