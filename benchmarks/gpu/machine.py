"""The GPU, the packages beside the versions that the kit is made for, and modules of the kit that cannot be imported."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import typer
from part import PROJECT, figures

# What the page, notebooks, plans and kernels want; nothing that is measured here does.
NOT_NEEDED = {
    *("gradio", "fastapi", "starlette", "uvicorn", "papermill", "nbformat", "nbclient"),
    *("snakemake", "kaggle", "kagglesdk", "pytorch_grad_cam"),
}


def wanted_versions() -> dict[str, str]:
    """Package to version, as requirements.txt pins it."""
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", (PROJECT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(pinned)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def not_imported() -> dict[str, list[str]]:
    """What is missing, or the error, to the modules of the kit that cannot be imported for it."""
    faults: dict[str, list[str]] = {}
    for path in sorted((PROJECT / "kitlib").rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] == "__main__":
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever it is, it is what this part is to say
            missing = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else error
            told = missing.name if isinstance(missing, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
            faults.setdefault(str(told), []).append(name)
    return faults


def main(small: bool = False) -> None:
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    else:
        print("no nvidia-smi")
    print(f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    import torch

    name, about = "no GPU", f"torch {torch.__version__}"
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        name = found.name
        print(f"{found}; torch is built for {torch.cuda.get_arch_list()}")
        # bfloat16 by the processor's own units, not emulated.
        print(f"bf16: {torch.cuda.is_bf16_supported(including_emulation=False)}, cuDNN {torch.backends.cudnn.version()}")
        half = torch.randn(256, 256, device="cuda", dtype=torch.float16)
        print(f"a product in float16 is finite: {bool((half @ half / 16).isfinite().all())}")
    figures(f"{name}, {about}")
    for package, wanted in wanted_versions().items():
        there = installed(package)
        print(f"{package:28} {there:16} " + ("" if there == wanted else f"the kit is made for {wanted}"))
    figures(f"{name}, {about}, timm {installed('timm')}, numpy {installed('numpy')}, pandas {installed('pandas')}")
    if small:
        return
    faults = not_imported()
    for missing, modules in faults.items():
        print(f"{missing}: wanted by {', '.join(modules)}")
    needed = sorted(each for each in faults if each.split(".")[0] not in NOT_NEEDED)
    if needed:
        sys.exit(f"the kit cannot be imported whole: {'; '.join(needed)}. Give wheels of what is missing: WHEELS=FOLDER")


if __name__ == "__main__":
    typer.run(main)
