"""The one place that chooses the device, its precision and its memory format, and sets the random seeds."""

import logging
import os
import random
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np
import torch

from kitlib.errors import DeviceError

logger = logging.getLogger(__name__)

Precision = Literal["16-mixed", "bf16-mixed", "32-true"]
DTYPES: dict[Precision, torch.dtype] = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

# What a GPU computes in, whatever it could: Kaggle's T4s compute in "16-mixed", which a newer GPU would never choose.
PRECISION = "KIT_PRECISION"
PRECISIONS: tuple[Precision, ...] = (*DTYPES, "32-true")
BACKEND = "KIT_BACKEND"
BACKENDS = ("gloo", "nccl")


def pick_device() -> torch.device:
    """A GPU if this build of torch can really compute on it, otherwise the CPU; the reason is logged as a warning.

    It is the first GPU, unless several processes train together: then each has its own.

    `torch.cuda.is_available()` is not enough: on a P100 a build without its architecture says yes and dies at the first
    operation.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = _own_gpu()
    if reason := _useless(device):
        logger.warning("using the CPU: %s", reason)
        return torch.device("cpu")
    return device


def training_device() -> torch.device:
    """The device to train on, as `pick_device` chooses it; an unusable GPU raises DeviceError, because a CPU takes days."""
    if torch.cuda.is_available() and (reason := _useless(_own_gpu())):
        raise DeviceError(
            f"{reason}. On Kaggle choose the accelerator 'GPU T4 x2' (accelerator: NvidiaTeslaT4), elsewhere a torch that "
            "is built for this GPU; to train on the CPU on purpose, set CUDA_VISIBLE_DEVICES to nothing"
        )
    return pick_device()


def _own_gpu() -> torch.device:
    # Its number among the processes that share a training on this machine, as torch's launcher sets it.
    return gpu_of(int(os.environ.get("LOCAL_RANK", 0)))


def gpu_of(process: int) -> torch.device:
    """The GPU of a process, by its number (from 0) among those that train one model on this machine."""
    # NCCL refuses two processes on one GPU, gloo does not.
    return torch.device("cuda", process % torch.cuda.device_count() if process_group_backend() == "gloo" else process)


def process_group_backend() -> str:
    """What processes that train together exchange gradients by: the environment variable KIT_BACKEND, "" for torch's own.

    With "gloo" they may be more than there are GPUs, and share them. Raises ValueError for any other value than "nccl".
    """
    chosen = os.environ.get(BACKEND, "")
    if chosen not in ("", *BACKENDS):
        raise ValueError(f"the environment variable {BACKEND} is {chosen!r}; there are: {', '.join(BACKENDS)}")
    return chosen


def _useless(device: torch.device) -> str:
    """Why nothing can be computed on a GPU, empty where it can."""
    name = torch.cuda.get_device_name(device)
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not supports(capability, built_for):
        major, minor = capability
        return f"torch {torch.__version__} is built for {', '.join(built_for)}, not for the {name} (sm_{major}{minor})"
    try:
        torch.ones(2, device=device).sum().item()
    except RuntimeError as error:
        return f"{name} fails at its first operation: {error}"
    return ""


def supports(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for one of `built_for` runs on a GPU of this compute capability.

    Machine code ("sm_75") runs on its own major version from its minor version on, intermediate code ("compute_90") on
    everything from its version on (CUDA C++ programming guide, binary and PTX compatibility).
    """
    for arch in built_for:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        version = (int(digits[:-1]), int(digits[-1]))
        if capability >= version and (kind == "compute" or capability[0] == version[0]):
            return True
    return False


def precision(device: torch.device) -> Precision:
    """Lightning's name of the fastest safe precision: "bf16-mixed", "16-mixed" (T4s emulate bf16), "32-true" on CPU.

    On a GPU the environment variable KIT_PRECISION decides where it is set, to one of PRECISIONS. Raises ValueError for
    any other value, also on a CPU.
    """
    chosen = os.environ.get(PRECISION, "")
    if chosen and chosen not in PRECISIONS:
        raise ValueError(f"the environment variable {PRECISION} is {chosen!r}; there are: {', '.join(PRECISIONS)}")
    if device.type != "cuda":
        return "32-true"
    if chosen:
        return PRECISIONS[PRECISIONS.index(chosen)]
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def autocast(device: torch.device) -> AbstractContextManager:
    """The context in which a model predicts on `device`: the precision it trained in, full precision on CPU."""
    dtype = DTYPES.get(precision(device))
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def memory_format(device: torch.device) -> torch.memory_format:
    """The order in which images and convolutions lie in memory on `device`.

    Channels last on GPUs, whose convolutions are up to a third faster so. Contiguous on the CPU: there oneDNN 3.7's
    convolutions of some narrow layers write outside of their memory with the channels last, and the process dies.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(derived_seed(seed))  # noqa: NPY002  libraries that we call draw from the global state
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """One seed (0..2^32 - 1) out of several, such as a run's seed and an epoch: near inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
