"""Prints the GPU, installed packages against the versions that the kit requires, and modules that cannot be imported."""

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

# Only needed by the page, notebooks, plans and kernels, which are not measured here.
NOT_NEEDED = {
    *("gradio", "fastapi", "starlette", "uvicorn", "papermill", "nbformat", "nbclient"),
    *("snakemake", "kaggle", "kagglesdk", "pytorch_grad_cam"),
}


def required_versions() -> dict[str, str]:
    """Return the version of each package pinned in requirements.txt."""
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", (PROJECT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(pinned)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def find_import_errors() -> dict[str, list[str]]:
    """Return, for each missing package or import error, the modules of the kit that fail because of it."""
    faults: dict[str, list[str]] = {}
    for path in sorted((PROJECT / "kitlib").rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] == "__main__":
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # any error is reported
            missing = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else error
            cause = missing.name if isinstance(missing, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
            faults.setdefault(str(cause), []).append(name)
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
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        print(f"{properties}; torch is built for {torch.cuda.get_arch_list()}")
        # Only native bfloat16 counts, not emulated.
        print(f"bf16: {torch.cuda.is_bf16_supported(including_emulation=False)}, cuDNN {torch.backends.cudnn.version()}")
        half = torch.randn(256, 256, device="cuda", dtype=torch.float16)
        print(f"a product in float16 is finite: {bool((half @ half / 16).isfinite().all())}")
    figures(f"{name}, {about}")
    for package, required in required_versions().items():
        found_version = installed(package)
        print(f"{package:28} {found_version:16} " + ("" if found_version == required else f"the kit requires {required}"))
    figures(f"{name}, {about}, timm {installed('timm')}, numpy {installed('numpy')}, pandas {installed('pandas')}")
    if small:
        return
    faults = find_import_errors()
    for cause, modules in faults.items():
        print(f"{cause}: required by {', '.join(modules)}")
    needed = sorted(cause for cause in faults if cause.split(".")[0] not in NOT_NEEDED)
    if needed:
        sys.exit(
            f"modules of the kit cannot be imported: {'; '.join(needed)}. Provide wheels of missing packages: WHEELS=FOLDER"
        )


if __name__ == "__main__":
    typer.run(main)
