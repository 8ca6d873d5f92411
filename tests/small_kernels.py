"""Small wheels, bundles and kernel files, from which tests build kernels."""

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

import nbformat
import torch
import yaml

from kitlib.bundle import save_bundle

PARAMETERS = 'competition = "siim-covid19-detection"\nweights = "nothing"\nwheels = ""\ntime_limit_s = 1.0\nbatch_size = 16'
INSTALL = "from kitlib.inference.install_wheels import install_wheels\ninstall_wheels(wheels)"
TRAINING = 'prepare_run = "prepare"\nrun_folder = "study"\nepochs = 50'


def make_wheel(folder, name, version, requires=(), tag="py3-none-any", python=None, modules=None) -> Path:
    """Write a wheel that pip can install; `requires` are Requires-Dist values, `modules` maps file names to sources."""
    path = Path(folder) / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    metadata += [f"Requires-Python: {python}"] if python else []
    files = dict(modules or {}) | {
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = []
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{file},sha256={digest},{len(text.encode())}")
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as opened:
        for file, text in files.items():
            opened.writestr(file, text)
    return path


def installed_wheel(folder, name) -> Path:
    """Write a wheel of an installed package, so that a test can install it without a network."""
    package = importlib.metadata.distribution(name)
    path = Path(folder) / f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as opened:
        for file in package.files:
            if ".." not in file.parts and file.suffix != ".pyc" and package.locate_file(file).is_file():
                opened.write(package.locate_file(file), str(file))
    return path


def make_run(folder, model="effnet", fold=0, family="study", architecture=None, classes=(), **recipe) -> Path:
    """Write a run folder whose bundle has one tensor; `recipe` are fields of its recipe."""
    classes = list(classes) or ["opacity" if family in ("yolo", "faster_rcnn") else "a"]
    stated = {"family": family, "model": model, "classes": classes, "recipe": recipe, "image_size": 8}
    stated |= {
        "architecture": architecture or {},
        "longest_side": 8,
        "placement": "letterbox",
        "mean": [0.0],
        "std": [1.0],
        "fold": fold,
        "data_fingerprint": "",
        "precision": "float32",
        "validation": {},
    }
    save_bundle(Path(folder) / "bundle", {"weight": torch.full((2, 3), float(fold))}, stated)
    return Path(folder)


def make_notebook(path, *cells, parameters=PARAMETERS) -> Path:
    """Write a notebook with a title, a `parameters` cell and the given code cells, with nbformat's random cell ids."""
    new = nbformat.v4
    opening = [new.new_markdown_cell("# A stage"), new.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new.new_notebook(cells=[*opening, *map(new.new_code_cell, cells)], metadata=kernel), path)
    return Path(path)


def make_submission(folder, *cells, **keys) -> Path:
    """Write a submission's YAML file, its notebook and one run; `keys` replace or add keys, None removes one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"title": "Small test kernel", "slug": "small-test-kernel", "owner": "somebody"}
    values |= {"notebook": str(make_notebook(folder / "submit.ipynb", INSTALL, *cells))}
    if "runs" not in keys:
        values["runs"] = [str(make_run(folder / "run"))]
    return _write_spec(folder, values | keys)


def make_training(folder, *cells, notebook_parameters=TRAINING, **keys) -> Path:
    """Write the YAML file of a kernel that makes a run, with a notebook without weights, wheels or a competition."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notebook = make_notebook(folder / "train.ipynb", *cells, parameters=notebook_parameters)
    values = {"title": "Small test kernel", "slug": "small-test-kernel", "owner": "somebody", "competition": ""}
    return _write_spec(folder, values | {"notebook": str(notebook)} | keys)


def _write_spec(folder: Path, values) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path
