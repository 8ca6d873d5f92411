"""Fixtures that several test files share."""

import faulthandler
import gc
import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from tests import REAL_DATA

# Compiling ensemble-boxes' loops takes longer than running them. Set before any test file imports them, because parts of
# numba read this variable when they are imported.
os.environ["NUMBA_DISABLE_JIT"] = "1"

# Tests share the cores with those of another process; and sums are only identical bit for bit with the same number of
# threads. Set before torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# Most tests expect the CPU, whose sums are reproducible; those marked `gpu` also run on a GPU if KIT_TEST_GPU is set.
# Set before torch is imported.
if not os.environ.get("KIT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# No deadline, because machines are shared and may be slow for a moment. Examples are the same in each run, so that a test
# does not pass by chance; `make properties` draws new ones.
settings.register_profile("kit", deadline=None, derandomize=True)
settings.register_profile("anew", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("kit")


LIMIT_S = 900  # for one test; the slowest takes about a minute on an idle machine
_stderr = pytest.StashKey[int]()


def pytest_configure(config):
    # A copy of the real stderr, because pytest captures file descriptor 2 during a test.
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Import the tests' libraries with a single garbage collection, and let later ones leave out the objects that remain.

    They are half a million, mostly of torch and what builds on it, and are never garbage.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """End the process of a test that hangs, with a traceback of all its threads; xdist then names the test.

    faulthandler uses its own thread, so this also works if a library hangs while it holds Python's lock.
    """
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real X-rays next to this project on its developers' machines; skips the test if it does not exist."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def _warm_server():
    from tests.warm_processes import warm_server

    with warm_server() as address:
        yield address


@pytest.fixture(scope="module")
def quick_processes(_warm_server):
    """Run notebooks and spawned processes in copies of a process that has already loaded torch, each in its own process."""
    from tests.warm_processes import spawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(Path(_warm_server).parent))
        patch.setattr("multiprocessing.util.spawnv_passfds", partial(spawn, _warm_server))
        yield


@pytest.fixture
def real_processes(monkeypatch):
    """Spawn processes as outside tests, in a test of a file that uses `quick_processes`."""
    from tests.warm_processes import spawn_a_new_process

    monkeypatch.setattr("multiprocessing.util.spawnv_passfds", spawn_a_new_process)
