"""The accelerators of Kaggle's sessions, such as GPUs: which ones a kernel can use, and why the others are refused."""

# Name -> what a session gets. Only T4 x2 is offered everywhere; the others depend on the competition.
GPUS = {
    "NvidiaTeslaT4": "two T4 with 15 GB each",
    "NvidiaL4": "four L4 with 22 GB each",
    "NvidiaL4X1": "one L4 with 22 GB",
    "NvidiaTeslaA100": "one A100",
    "NvidiaH100": "one H100",
    "NvidiaRtxPro6000": "one RTX PRO 6000 with 96 GB",
}
NONE = "none"  # a session on the CPU
_TPU = "the kit computes with PyTorch on GPUs and CPUs, not on TPUs; use NvidiaTeslaT4, or none for the CPU"
# Name -> why the kit refuses it.
REFUSED = {
    "NvidiaTeslaP100": "Kaggle has retired the P100 and runs these kernels on T4 x2; its torch does not support the P100 "
    "either. Use NvidiaTeslaT4",
    "NvidiaTeslaT4Highmem": "only Kaggle's staff can use it; use NvidiaTeslaT4",
    **dict.fromkeys(("TpuV5E8", "TpuV6E8", "TpuV38", "Tpu1VmV38", "TpuV232", "TpuV2256"), _TPU),
}


def find_fault(name: str) -> str:
    """Return the reason why a kernel cannot use the accelerator `name`, or "" if it can. Names are case-sensitive."""
    if name in (*GPUS, NONE):
        return ""
    valid = ", ".join([*GPUS, NONE])
    by_lower_case = {known.lower(): known for known in (*GPUS, NONE, *REFUSED)}
    known = by_lower_case.get(name.lower(), "")
    if known in REFUSED:
        return f"accelerator {name}: {REFUSED[known]}"
    return f"accelerator {name!r} is unknown; {f'write {known}' if known else f'valid: {valid}'}"
