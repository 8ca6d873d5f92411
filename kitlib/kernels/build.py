"""From a kernel's YAML to folders that Kaggle takes: the kernel, its dataset of wheels and, if it submits, of weights.

The same sources give the same bytes: names sorted, dates fixed, nothing random.
"""

import inspect
import json
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from papermill.translators import PythonTranslator

from kitlib.atomic import write_json
from kitlib.bundle import RECORD, WEIGHTS, read_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import KernelError
from kitlib.fusion.ensemble_bundle import RECORD as ENSEMBLE_RECORD
from kitlib.fusion.ensemble_bundle import WEIGHTS as ENSEMBLE_WEIGHTS
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.kernels import start as kernel_start
from kitlib.kernels.pack_library import packed_library
from kitlib.kernels.spec import KernelSpec
from kitlib.kernels.wheels import check_wheels, image_pins
from kitlib.lungs.crop import wants_masks
from kitlib.lungs.finders import segmenter_digest
from kitlib.models.families import LUNGS, STUDIES, recorded_family
from kitlib.paths import project_root

# Kaggle refuses a larger notebook.
NOTEBOOK_BYTES = 1_000_000
# Kaggle refuses a larger dataset.
DATASET_BYTES = 200 * 10**9


def build_kernel(spec: KernelSpec, out: str | Path, wheels: Iterable[Path]) -> dict[str, Path]:
    """Write `out`/kernel, `out`/wheels and, of a kernel that submits, `out`/weights; an old one of another kernel goes.

    Each is replaced whole, and nothing is replaced where something fails. Raises KernelError (an unknown notebook parameter,
    runs without a bundle, models of a segmenter's lungs without one), KernelError, BundleError, KernelError (size).
    """
    out, wheels = Path(out), sorted(wheels)
    check_wheels(wheels, image_pins())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as beside:
        built = {part: Path(beside) / part for part in ("kernel", "wheels", *(("weights",) if spec.submits else ()))}
        if spec.submits:
            _write_weights(spec, built["weights"])
        _write_wheels(spec, built["wheels"], wheels)
        _write_kernel(spec, built["kernel"])
        for part in ("kernel", "wheels", "weights"):
            if (out / part).exists():
                shutil.rmtree(out / part)
            if part in built:
                built[part].replace(out / part)
    return {part: out / part for part in built}


def folder_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def kernel_notebook(spec: KernelSpec) -> nbformat.NotebookNode:
    """The notebook, the library in front, its parameters injected as papermill does, but alike each time."""
    parameters = spec.injected()
    spec.run_folder(rehearsed=True)  # a folder that Kaggle would not keep is refused
    notebook = nbformat.read(spec.notebook_path, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    cells = [_start_cell(spec, sources)]
    for cell in notebook.cells:
        cells.append(cell)
        if parameters and "parameters" in cell.metadata.get("tags", []):
            cells.append(_code_cell(PythonTranslator.codify(parameters), "injected-parameters"))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # nbformat makes ids up at random where a notebook has none
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec, "language_info": {"name": "python"}})


def _start_cell(spec: KernelSpec, sources: list[str]) -> nbformat.NotebookNode:
    start, python = inspect.getsource(kernel_start), TransformerManager().transform_cell
    packed = "\n".join(textwrap.wrap(packed_library([start, *map(python, sources)]), 120))
    # A notebook with the parameter installs its wheels itself, when whatever must not depend on them is done.
    wheels = "" if "wheels" in spec.notebook_parameters() else spec.wheels_slug
    return _code_cell(f'{start}\n\nstart_kernel("""\n{packed}\n""", {wheels!r});')


def _code_cell(source: str, *tags: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def _write_kernel(spec: KernelSpec, folder: Path) -> None:
    folder.mkdir()
    code = folder / f"{spec.slug}.ipynb"
    nbformat.write(kernel_notebook(spec), code)
    size = code.stat().st_size
    if size > NOTEBOOK_BYTES:
        raise KernelError(f"{code.name} has {size:,} bytes, Kaggle takes {NOTEBOOK_BYTES:,}; strip pictures and outputs")
    built = ([spec.weights_slug] if spec.submits else []) + [spec.wheels_slug]
    metadata: dict[str, Any] = {
        "id": f"{spec.owner}/{spec.slug}",
        "title": spec.title,
        "code_file": code.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": spec.accelerator != "none",
        "enable_tpu": False,
        "enable_internet": spec.internet,
        # as Kaggle itself writes it for a kernel without accelerator
        "machine_shape": "None" if spec.accelerator == "none" else spec.accelerator,
        "dataset_sources": spec.sources((*built, *spec.dataset_sources)),
        "competition_sources": [spec.competition] if spec.competition else [],
        "kernel_sources": spec.sources(spec.kernel_sources),
        "model_sources": [],
    }
    write_json(folder / "kernel-metadata.json", metadata)


def _write_wheels(spec: KernelSpec, folder: Path, wheels: list[Path]) -> None:
    folder.mkdir()
    for wheel in wheels:
        shutil.copyfile(wheel, folder / wheel.name)
    # Wheels of several kernels are one dataset, which has one title.
    title = spec.wheels.replace("-", " ").capitalize() if spec.wheels else f"{spec.title} wheels"
    _write_dataset_metadata(folder, title, f"{spec.owner}/{spec.wheels_slug}")


def _write_weights(spec: KernelSpec, folder: Path) -> None:
    """A sub-folder a bundle, weights.json (bundles by value), and what the kernel names of ensemble, lungs, fusion.json."""
    folder.mkdir()
    manifest: list[dict[str, Any]] = []
    segmenter, study_models = _write_lungs(spec, folder), set()
    for bundle in spec.bundles():
        record = json.loads((bundle / RECORD).read_text(encoding="utf-8")) if (bundle / RECORD).is_file() else {}
        name = f"{record.get('model')}-fold{record.get('fold')}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise KernelError(
                f"{bundle}: the model's name {record.get('model')!r} is not fit for a folder: letters, digits, . _ -"
            )
        if any(entry["folder"] == name for entry in manifest):
            raise KernelError(f"runs: {bundle} is a second {name}; name one run a model and fold")
        record = _copy_bundle(bundle, folder / name)
        family = recorded_family(record, bundle)
        if family.no_submission:
            raise KernelError(f"runs: {bundle} {family.no_submission}")
        if wants_masks(record["recipe"]) and record["architecture"].get("segmenter") != segmenter:
            raise KernelError(
                f"runs: {bundle} looks at the lungs that a segmenter finds, and the key `lungs` names "
                f"{'another one' if segmenter else 'none'}; name the run of notebook 14 that was its lungs_run"
            )
        kind = "study" if family.answers == STUDIES else "detector"
        if family.answers == STUDIES and record["recipe"].get("outputs") != "none":
            study_models.add(record["model"])
        entry = {"folder": name, "kind": kind} | {key: record[key] for key in ("family", "model", "fold", "weights_sha256")}
        manifest.append(entry)
    if spec.fusion:
        fusion = project_root() / spec.fusion
        if not fusion.is_file():
            raise KernelError(f"fusion: there is no {fusion}; run the fusion notebook first, or leave the key out")
        shutil.copyfile(fusion, folder / "fusion.json")
    further = {"ensemble": _write_ensemble(spec, folder, study_models), "lungs": "lungs" if segmenter else ""}
    write_json(folder / "weights.json", {"bundles": manifest} | {key: name for key, name in further.items() if name})
    _write_dataset_metadata(folder, f"{spec.title} weights", f"{spec.owner}/{spec.weights_slug}")


def _write_ensemble(spec: KernelSpec, folder: Path, study_models: set[str]) -> str:
    """The name of the sub-folder that the ensemble's bundle is copied to; "" where the kernel names none.

    Raises KernelError where it is not one of exactly the study models of the kernel.
    """
    bundle = spec.named_bundle("ensemble")
    if bundle is None:
        return ""
    ensemble = read_ensemble(bundle)
    if ensemble.key != "study_id" or set(ensemble.classes) != set(STUDY_CLASSES):
        raise KernelError(f"ensemble: {bundle} tells {', '.join(ensemble.classes)} apart; name one of study models")
    if set(ensemble.learners) != study_models:
        raise KernelError(
            f"ensemble: {bundle} stacks {', '.join(sorted(ensemble.learners))}, and runs has the study models "
            f"{', '.join(sorted(study_models)) or 'none'}; name the same ones in both"
        )
    (folder / "ensemble").mkdir()
    for file in (ENSEMBLE_WEIGHTS, ENSEMBLE_RECORD):
        shutil.copyfile(bundle / file, folder / "ensemble" / file)
    read_ensemble(folder / "ensemble")  # so that copying is checked too
    return "ensemble"


def _write_lungs(spec: KernelSpec, folder: Path) -> str:
    """The segmenter's bundle in the sub-folder `lungs`, and its digest; "" where the kernel names none."""
    bundle = spec.named_bundle("lungs")
    if bundle is None:
        return ""
    record = _copy_bundle(bundle, folder / "lungs")
    if recorded_family(record, bundle).answers != LUNGS:
        raise KernelError(
            f"lungs: {bundle} holds a {record['family']} model; name a run of notebook 14, or a fold of notebook 12"
        )
    return segmenter_digest(record)


def _copy_bundle(bundle: Path, folder: Path) -> dict[str, Any]:
    """Copy a bundle into a new folder; its record, read with the weights from the copy, so that copying is checked too."""
    folder.mkdir()
    for file in (WEIGHTS, RECORD):
        if (bundle / file).is_file():
            shutil.copyfile(bundle / file, folder / file)
    return read_bundle(folder)[0]


def _write_dataset_metadata(folder: Path, title: str, name: str) -> None:
    size = folder_bytes(folder)
    if size > DATASET_BYTES:
        raise KernelError(f"the dataset {name} has {size:,} bytes, Kaggle takes {DATASET_BYTES:,}; leave out the last runs")
    # "other": the wheels have several licences, and weights inherit those of what made them.
    write_json(folder / "dataset-metadata.json", {"title": title, "id": name, "licenses": [{"name": "other"}]})
