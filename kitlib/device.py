"""Choice of device, precision and memory format, and random seeds."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal

import numpy as np
import torch

from kitlib.errors import DeviceError

logger = logging.getLogger(__name__)

Precision = Literal["16-mixed", "bf16-mixed", "32-true"]
DTYPES: dict[Precision, torch.dtype] = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
# Names of the precisions in a bundle's record.
RECORDED: dict[Precision, str] = {"16-mixed": "float16", "bf16-mixed": "bfloat16", "32-true": "float32"}

# Environment variable that sets a GPU's precision: lets a newer GPU try "16-mixed", in which Kaggle's T4s compute.
PRECISION = "KIT_PRECISION"
PRECISIONS: tuple[Precision, ...] = (*DTYPES, "32-true")
_chosen_precision: ContextVar[Precision | None] = ContextVar("precision", default=None)  # see `computing_in`
BACKEND = "KIT_BACKEND"
BACKENDS = ("gloo", "nccl")


def pick_device() -> torch.device:
    """Return a GPU if this build of torch can compute on it, otherwise the CPU.

    If there is a GPU that cannot be used, a warning in the log says why. If several processes train one model together, each
    gets its own GPU; otherwise the GPU is the first one. `torch.cuda.is_available()` does not suffice: it returns True for a
    P100 even if this build of torch has no code for a P100 and fails at the first operation.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = _own_gpu()
    if reason := _unusable_reason(device):
        logger.warning("using the CPU: %s", reason)
        return torch.device("cpu")
    return device


def training_device() -> torch.device:
    """Return the same device as `pick_device`, but raise DeviceError if there is a GPU that torch cannot use.

    Training on the CPU instead would take days, so a warning in a log is not enough.
    """
    if torch.cuda.is_available() and (reason := _unusable_reason(_own_gpu())):
        raise DeviceError(
            f"{reason}. On Kaggle choose the accelerator 'GPU T4 x2' (accelerator: NvidiaTeslaT4); elsewhere install a "
            "torch that is built for this GPU. To train on the CPU on purpose, set CUDA_VISIBLE_DEVICES to an empty string"
        )
    return pick_device()


def _own_gpu() -> torch.device:
    # torch's launcher sets LOCAL_RANK: the number of this process among those that train together on this machine.
    return gpu_of(int(os.environ.get("LOCAL_RANK", 0)))


def visible_gpus() -> list[str]:
    """Return, for each GPU of this process, the value of CUDA_VISIBLE_DEVICES that selects only it; [""] without a GPU."""
    count = torch.cuda.device_count()
    every = ",".join(map(str, range(count)))
    return os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")[:count] or [""]


def gpu_of(process: int) -> torch.device:
    """Return the GPU for one of the processes that train one model on this machine; `process` is its number, from 0."""
    # gloo lets several processes share a GPU, NCCL does not.
    return torch.device("cuda", process % torch.cuda.device_count() if process_group_backend() == "gloo" else process)


def process_group_backend() -> str:
    """Return the backend for exchanging gradients between processes: "gloo", "nccl", or "" for torch's default.

    The environment variable KIT_BACKEND selects it. With "gloo" there may be more processes than GPUs. Raises ValueError if
    KIT_BACKEND has any other value.
    """
    chosen = os.environ.get(BACKEND, "")
    if chosen not in ("", *BACKENDS):
        raise ValueError(f"the environment variable {BACKEND} is {chosen!r}; valid: {', '.join(BACKENDS)}")
    return chosen


def _unusable_reason(device: torch.device) -> str:
    """Return the reason why torch cannot compute on this GPU, or "" if it can."""
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
    """Return True if code for one of the architectures `built_for` runs on a GPU of this compute capability.

    Machine code ("sm_75") runs on GPUs with the same major version and the same or a higher minor version. Intermediate code
    ("compute_90") runs on GPUs with the same or a higher version (CUDA C++ programming guide, binary and PTX compatibility).
    """
    for arch in built_for:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        version = (int(digits[:-1]), int(digits[-1]))
        if capability >= version and (kind == "compute" or capability[0] == version[0]):
            return True
    return False


def precision(device: torch.device) -> Precision:
    """Return Lightning's name of the fastest safe precision: "bf16-mixed", "16-mixed", or on the CPU "32-true".

    GPUs that only emulate bf16, such as the T4, get "16-mixed". On a GPU, the environment variable KIT_PRECISION overrides
    this choice. Inside a `computing_in` block, the block's precision overrides everything. Raises ValueError, even for a
    CPU, if KIT_PRECISION is none of these three names.
    """
    chosen = os.environ.get(PRECISION, "")
    if chosen and chosen not in PRECISIONS:
        raise ValueError(f"the environment variable {PRECISION} is {chosen!r}; valid: {', '.join(PRECISIONS)}")
    if (wanted := _chosen_precision.get()) is not None:
        return wanted
    if device.type != "cuda":
        return "32-true"
    if chosen:
        return PRECISIONS[PRECISIONS.index(chosen)]
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


@contextmanager
def computing_in(precision: Precision) -> Iterator[None]:
    """Make this thread compute, on any device, as on a GPU whose own precision is `precision`: a CPU then rounds like it."""
    token = _chosen_precision.set(precision)
    try:
        yield
    finally:
        _chosen_precision.reset(token)


def autocast(device: torch.device, trained: str = "") -> AbstractContextManager:
    """Return the autocast context in which a model predicts; `trained` is the precision in which it was trained.

    `trained` is "float32", "bfloat16", "float16" or "" (unknown). On a GPU, "float16" gives float16, in which the model's
    scores were measured. All other values give the GPU's own precision: bfloat16 or, on a GPU without bfloat16, float16,
    which has a smaller range. KIT_PRECISION overrides both rules. On a CPU, the context computes in float32.
    """
    dtype = DTYPES.get(precision(device))
    if dtype is not None and trained == RECORDED["16-mixed"] and not os.environ.get(PRECISION):
        dtype = torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def finite_or_float32(compute: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, bool]:
    """Call `compute`, in float32 if necessary; return its result, and whether it was called a second time.

    If autocast is on and the result has NaN or infinity, `compute` is called again in float32. In float16, numbers above
    65,504 are infinite.
    """
    result = compute()
    if not torch.is_autocast_enabled(device.type) or result.isfinite().all():
        return result, False
    with torch.autocast(device.type, enabled=False):
        return compute(), True


# What libraries write into a RuntimeError when memory is short. cuBLAS and cuDNN allocate memory themselves; without room
# for a workspace, cuDNN has no algorithm left and calls the convolution unsupported.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the GPU's or the computer's memory was too small, whichever library raised it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of images and convolutions on `device`.

    On a GPU it is channels last, with which convolutions are up to a third faster. On a CPU it is contiguous: with channels
    last, oneDNN 3.7's convolutions of some narrow layers write outside their memory and crash the process.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch, on the CPU and all GPUs."""
    random.seed(seed)
    np.random.seed(derived_seed(seed))  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """Return a seed (0..2^32 - 1) made from several numbers, such as a run's seed and an epoch.

    Numbers that are close give unrelated seeds.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
