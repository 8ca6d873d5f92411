"""From a submission's YAML to three folders that Kaggle takes: the kernel, the wheel dataset, the weights dataset.

The same sources give the same bytes: names sorted, dates fixed, nothing random.
"""

import base64
import inspect
import io
import json
import re
import shutil
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from papermill.translators import PythonTranslator

import kitlib
from kitlib import kernel_start
from kitlib.atomic import write_json
from kitlib.bundle import RECORD, WEIGHTS, read_bundle
from kitlib.kernel_spec import KernelSpec, SpecError
from kitlib.paths import project_root
from kitlib.run_notebook import check_parameters
from kitlib.wheels import check_wheels, image_pins

# Kaggle refuses a larger notebook.
NOTEBOOK_BYTES = 1_000_000
# Kaggle refuses a larger dataset.
DATASET_BYTES = 200 * 10**9
NOT_EMBEDDED = {"kaggle_image.txt"}


class KernelError(ValueError):
    """A kernel that Kaggle would refuse: names the part, its size and the limit."""


def build_kernel(spec: KernelSpec, out: str | Path, wheels: Iterable[Path]) -> dict[str, Path]:
    """Write `out`/kernel, `out`/wheels and `out`/weights, each replaced whole; nothing is replaced where something fails.

    Raises SpecError (an unknown notebook parameter, runs without a bundle), WheelError, BundleError, KernelError (size).
    """
    out, wheels = Path(out), sorted(wheels)
    check_wheels(wheels, image_pins())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as beside:
        built = {part: Path(beside) / part for part in ("kernel", "wheels", "weights")}
        _write_weights(spec, built["weights"])
        _write_wheels(spec, built["wheels"], wheels)
        _write_kernel(spec, built["kernel"])
        for part, folder in built.items():
            if (out / part).exists():
                shutil.rmtree(out / part)
            folder.replace(out / part)
    return {part: out / part for part in built}


def folder_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def packed_library() -> str:
    """kitlib as base64 of a zip. bzip2, because zlib's output differs between its implementations."""
    packed = io.BytesIO()
    source = Path(kitlib.__file__).parent
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_BZIP2, compresslevel=9) as opened:
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_EMBEDDED:
                entry = zipfile.ZipInfo(path.relative_to(source.parent).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                opened.writestr(entry, path.read_bytes(), zipfile.ZIP_BZIP2)
    return base64.b64encode(packed.getvalue()).decode("ascii")


def kernel_notebook(spec: KernelSpec) -> nbformat.NotebookNode:
    """The submission notebook, the library in front, its parameters injected as papermill does, but alike each time."""
    path = project_root() / spec.notebook
    if not path.is_file():
        raise SpecError(f"notebook: there is no {path}")
    own = {"competition": spec.competition, "weights": spec.weights_slug, "wheels": spec.wheels_slug}
    own["time_limit_s"] = spec.time_limit_s
    twice = sorted(set(own) & set(spec.parameters))
    if twice:
        raise SpecError(
            f"parameters: {', '.join(twice)} come from the submission's own keys (competition, slug, time_limit_hours)"
        )
    parameters = own | spec.parameters
    try:
        check_parameters(path, parameters)
    except ValueError as error:
        raise SpecError(f"parameters: {error}") from error
    notebook = nbformat.read(path, as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    injected = _code_cell(PythonTranslator.codify(parameters), "injected-parameters")
    cells = [_start_cell(), *notebook.cells[: place + 1], injected, *notebook.cells[place + 1 :]]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # nbformat makes ids up at random where a notebook has none
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec, "language_info": {"name": "python"}})


def _start_cell() -> nbformat.NotebookNode:
    packed = "\n".join(textwrap.wrap(packed_library(), 120))
    return _code_cell(f'{inspect.getsource(kernel_start)}\n\nstart_kernel("""\n{packed}\n""");')


def _code_cell(source: str, *tags: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def _write_kernel(spec: KernelSpec, folder: Path) -> None:
    folder.mkdir()
    code = folder / f"{spec.slug}.ipynb"
    nbformat.write(kernel_notebook(spec), code)
    size = code.stat().st_size
    if size > NOTEBOOK_BYTES:
        raise KernelError(f"{code.name} has {size:,} bytes, Kaggle takes {NOTEBOOK_BYTES:,}; strip pictures and outputs")
    metadata: dict[str, Any] = {
        "id": f"{spec.owner}/{spec.slug}",
        "title": spec.title,
        "code_file": code.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": spec.accelerator != "none",
        "enable_tpu": False,
        "enable_internet": False,
        "dataset_sources": [f"{spec.owner}/{slug}" for slug in (spec.weights_slug, spec.wheels_slug)],
        "competition_sources": [spec.competition],
        "kernel_sources": [],
        "model_sources": [],
    }
    if spec.accelerator != "none":
        metadata["machine_shape"] = spec.accelerator
    write_json(folder / "kernel-metadata.json", metadata)


def _write_wheels(spec: KernelSpec, folder: Path, wheels: list[Path]) -> None:
    folder.mkdir()
    for wheel in wheels:
        shutil.copyfile(wheel, folder / wheel.name)
    _write_dataset_metadata(spec, folder, "wheels", spec.wheels_slug)


def _write_weights(spec: KernelSpec, folder: Path) -> None:
    """One sub-folder a bundle, weights.json (bundles by value) and, where the submission names one, fusion.json."""
    folder.mkdir()
    manifest: list[dict[str, Any]] = []
    for bundle in spec.bundles():
        record = json.loads((bundle / RECORD).read_text(encoding="utf-8")) if (bundle / RECORD).is_file() else {}
        name = f"{record.get('model')}-fold{record.get('fold')}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise SpecError(
                f"{bundle}: the model's name {record.get('model')!r} is not fit for a folder: letters, digits, . _ -"
            )
        if any(entry["folder"] == name for entry in manifest):
            raise SpecError(f"runs: {bundle} is a second {name}; name one run a model and fold")
        (folder / name).mkdir()
        for file in (WEIGHTS, RECORD):
            if (bundle / file).is_file():
                shutil.copyfile(bundle / file, folder / name / file)
        record, _ = read_bundle(folder / name)  # of the copy, so that copying is checked too
        if record["family"] == "findings":
            raise SpecError(f"runs: {bundle} knows findings, which no submission asks for; name models that start from it")
        kind = "study" if record["family"] == "study" else "detector"
        entry = {"folder": name, "kind": kind} | {key: record[key] for key in ("family", "model", "fold", "weights_sha256")}
        manifest.append(entry)
    if spec.fusion:
        fusion = project_root() / spec.fusion
        if not fusion.is_file():
            raise SpecError(f"fusion: there is no {fusion}; run the fusion notebook first, or leave the key out")
        shutil.copyfile(fusion, folder / "fusion.json")
    write_json(folder / "weights.json", {"bundles": manifest})
    _write_dataset_metadata(spec, folder, "weights", spec.weights_slug)


def _write_dataset_metadata(spec: KernelSpec, folder: Path, word: str, slug: str) -> None:
    size = folder_bytes(folder)
    if size > DATASET_BYTES:
        raise KernelError(f"the {word} dataset has {size:,} bytes, Kaggle takes {DATASET_BYTES:,}; leave out the last runs")
    # "other": the wheels have several licences, and weights inherit those of what made them.
    metadata = {"title": f"{spec.title} {word}", "id": f"{spec.owner}/{slug}", "licenses": [{"name": "other"}]}
    write_json(folder / "dataset-metadata.json", metadata)
