"""Fixtures that several test files share."""

import faulthandler
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests import REAL_DATA

# Compiling ensemble-boxes' loops takes longer than running them. Said before any test file imports them: once numba is
# loaded, half of it would hear and half would not.
os.environ["NUMBA_DISABLE_JIT"] = "1"

# Most tests expect the CPU, whose sums repeat exactly; those that are marked with `gpu` also run on a GPU that is asked for.
# Said before torch is imported.
if not os.environ.get("KIT_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Examples are timed by nobody: machines are shared, and a slow moment is no fault. They are the same in each run, so that a
# test that fails did not pass by chance before; `make properties` draws new ones.
settings.register_profile("kit", deadline=None, derandomize=True)
settings.register_profile("anew", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("kit")


LIMIT_S = 900  # for one test; the slowest takes about a minute where nobody else computes
_stderr = pytest.StashKey[int]()


def pytest_configure(config):
    # The real one: during a test, what is written to its number is captured.
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """End the process of a test that hangs, after a traceback of all its threads; xdist then names the test.

    faulthandler's own thread does this also where a hanging library never gives Python its lock back.
    """
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real X-rays that lie beside this project on its developers' machines."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="module")
def one_thread():
    """Sums come out bit for bit alike only with as many threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _warm_kernels():
    from tests.warm_kernels import warm_kernels

    with warm_kernels() as path:
        yield path


@pytest.fixture(scope="module")
def quick_kernels(_warm_kernels):
    """Notebooks that need not load torch again, each in a process of its own all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", _warm_kernels)
        yield
