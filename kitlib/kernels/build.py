"""Build the folders that are uploaded to Kaggle for a kernel: the kernel, its wheels and, for a submission, its weights.

The kernel is described by a YAML file. Builds are deterministic: the same sources produce the same bytes, because names are
sorted, dates are fixed and nothing is random.
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
from kitlib.errors import KernelError, SettingsError
from kitlib.fusion.ensemble_bundle import RECORD as ENSEMBLE_RECORD
from kitlib.fusion.ensemble_bundle import WEIGHTS as ENSEMBLE_WEIGHTS
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.fusion.model_fusion import read_settings
from kitlib.inference.answer import unwanted
from kitlib.kernels import start as kernel_start
from kitlib.kernels.pack_library import pack_library
from kitlib.kernels.spec import KernelSpec
from kitlib.kernels.wheels import check_wheels, image_pins
from kitlib.lungs.crop import needs_masks
from kitlib.lungs.finders import segmenter_digest
from kitlib.models.families import LUNGS, STUDIES, recorded_family
from kitlib.paths import project_root

# Kaggle refuses a larger notebook.
NOTEBOOK_BYTES = 1_000_000
# Kaggle refuses a larger dataset.
DATASET_BYTES = 200 * 10**9


def build_kernel(spec: KernelSpec, out: str | Path, wheels: Iterable[Path]) -> dict[str, Path]:
    """Write `out`/kernel, `out`/wheels and, for a submission, `out`/weights; return the folders as {"kernel": path, ...}.

    `wheels` are the wheel files to copy. The folders of an earlier build are replaced; an earlier `out`/weights is removed
    if the kernel makes no submission. If the build fails, all folders stay as they were. Raises KernelError for a parameter
    that the notebook does not have, a run without a bundle (its trained model), a model trained with lung masks of another
    segmenter than the kernel's, a wheel that Kaggle's Docker image cannot install, and a notebook or dataset above Kaggle's
    size limit. Raises BundleError for a damaged bundle.
    """
    out, wheels = Path(out), sorted(wheels)
    check_wheels(wheels, image_pins())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as temporary_folder:
        built = {
            part: Path(temporary_folder) / part
            for part in ("kernel", "wheels", *(("weights",) if spec.is_submission else ()))
        }
        if spec.is_submission:
            _write_weights(spec, built["weights"])
        _write_wheels(spec, built["wheels"], wheels)
        _write_kernel(spec, built["kernel"])
        for part in ("kernel", "wheels", "weights"):
            if (out / part).exists():
                shutil.rmtree(out / part)
            if part in built:
                built[part].replace(out / part)
    return {part: out / part for part in built}


def make_notebook(spec: KernelSpec) -> nbformat.NotebookNode:
    """Return the kernel's notebook: a start cell with the packed library, then the source notebook's cells without outputs.

    As papermill does, parameters are written to a new cell after the cell tagged `parameters`. Cell ids are numbered, so
    that builds are reproducible.
    """
    parameters = spec.injected_parameters()
    for rehearsed in (False, True):
        spec.run_folder(rehearsed)  # raises KernelError for a folder outside of /kaggle/working
    notebook = nbformat.read(spec.notebook_path, as_version=4)
    cells = [_make_start_cell(spec, notebook.cells)]
    for cell in notebook.cells:
        cells.append(cell)
        if parameters and "parameters" in cell.metadata.get("tags", []):
            cells.append(_make_code_cell(PythonTranslator.codify(parameters), "injected-parameters"))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # nbformat generates random ids for cells without one
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec, "language_info": {"name": "python"}})


def _make_start_cell(spec: KernelSpec, cells: list[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    start, to_python = inspect.getsource(kernel_start), TransformerManager().transform_cell
    sources = [start, *(to_python(cell.source) for cell in cells if cell.cell_type == "code")]
    # The running notebook compares its parameters with their defaults (kitlib.parameters.begin_notebook).
    defaults = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    notebook = {"cells": [{"metadata": {"tags": ["parameters"]}, "source": cell.source} for cell in defaults]}
    files = {f"notebooks/{spec.notebook_path.name}": json.dumps(notebook).encode()}
    packed = "\n".join(textwrap.wrap(pack_library(sources, files), 120))
    # A notebook with the parameter `wheels` installs them itself, after the steps that must not depend on them.
    wheels = "" if "wheels" in spec.notebook_parameters() else spec.wheels_slug
    return _make_code_cell(f'{start}\n\nstart_kernel("""\n{packed}\n""", {wheels!r});')


def _make_code_cell(source: str, *tags: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def _write_kernel(spec: KernelSpec, folder: Path) -> None:
    folder.mkdir()
    notebook_path = folder / f"{spec.slug}.ipynb"
    nbformat.write(make_notebook(spec), notebook_path)
    size = notebook_path.stat().st_size
    if size > NOTEBOOK_BYTES:
        raise KernelError(
            f"{notebook_path.name} has {size:,} bytes, but Kaggle accepts at most {NOTEBOOK_BYTES:,}; remove embedded "
            "pictures and outputs"
        )
    built_datasets = ([spec.weights_slug] if spec.is_submission else []) + [spec.wheels_slug]
    metadata: dict[str, Any] = {
        "id": f"{spec.owner}/{spec.slug}",
        "title": spec.title,
        "code_file": notebook_path.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": spec.uses_gpu,
        "enable_tpu": False,
        "enable_internet": spec.internet,
        # Kaggle itself writes this string for a kernel without an accelerator
        "machine_shape": spec.accelerator if spec.uses_gpu else "None",
        "dataset_sources": spec.sources((*built_datasets, *spec.dataset_sources)),
        "competition_sources": [spec.competition] if spec.competition else [],
        "kernel_sources": spec.sources(spec.kernel_sources),
        "model_sources": list(spec.model_sources),
    }
    if spec.docker_image:
        metadata |= {"docker_image": spec.docker_image, "docker_image_pinning_type": "original"}
    write_json(folder / "kernel-metadata.json", metadata)


def _write_wheels(spec: KernelSpec, folder: Path, wheels: list[Path]) -> None:
    folder.mkdir()
    for wheel in wheels:
        shutil.copyfile(wheel, folder / wheel.name)
    # A dataset that several kernels share must have the same title in all of their builds.
    title = spec.wheels.replace("-", " ").capitalize() if spec.wheels else f"{spec.title} wheels"
    _write_dataset_metadata(folder, title, f"{spec.owner}/{spec.wheels_slug}")


def _write_weights(spec: KernelSpec, folder: Path) -> None:
    """Write the weights dataset to `folder`: one subfolder per bundle (trained model), and weights.json, which lists them.

    weights.json lists the bundles in the order of the kernel's `runs`, the most valuable first. In the kernel's YAML file,
    the key `ensemble` adds the subfolder `ensemble`, `lungs` adds the subfolder `lungs`, and `fusion` adds fusion.json.
    """
    folder.mkdir()
    manifest: list[dict[str, Any]] = []
    segmenter, study_models = _write_lungs(spec, folder), set()
    for bundle in spec.bundles():
        record = json.loads((bundle / RECORD).read_text(encoding="utf-8")) if (bundle / RECORD).is_file() else {}
        name = f"{record.get('model')}-fold{record.get('fold')}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise KernelError(
                f"{bundle}: the model name {record.get('model')!r} cannot be a folder name; use letters, digits, . _ -"
            )
        if any(entry["folder"] == name for entry in manifest):
            raise KernelError(f"runs: {bundle} is a second bundle of {name}; list only one run for each model and fold")
        record = copy_bundle(bundle, folder / name)
        family = recorded_family(record, bundle)
        if problem := unwanted(record, spec.rules):
            raise KernelError(f"runs: {bundle} {problem}")
        if needs_masks(record["recipe"]) and record["architecture"].get("segmenter") != segmenter:
            raise KernelError(
                f"runs: {bundle} was trained with a segmenter's lung masks, but the key `lungs` "
                f"{'names a run with another segmenter or mask clean-up' if segmenter else 'is empty'}; set `lungs` to the "
                "run of notebook 14 that was the parameter `lungs_run` in training"
            )
        if family.answers == STUDIES and record["recipe"].get("outputs") != "none":
            study_models.add(record["model"])
        recorded = ("family", "model", "fold", "precision", "weights_sha256", "record_sha256")
        manifest.append({"folder": name} | {key: record[key] for key in recorded})
    if spec.fusion:
        fusion = project_root() / spec.fusion
        if not fusion.is_file():
            raise KernelError(f"fusion: {fusion} does not exist; run notebook 60 first, or remove the key `fusion`")
        try:
            read_settings(fusion, spec.rules)
        except SettingsError as error:
            raise KernelError(f"fusion: {error}") from error
        shutil.copyfile(fusion, folder / "fusion.json")
    optional_parts = {"ensemble": _write_ensemble(spec, folder, study_models), "lungs": "lungs" if segmenter else ""}
    write_json(folder / "weights.json", {"bundles": manifest} | {key: name for key, name in optional_parts.items() if name})
    _write_dataset_metadata(folder, f"{spec.title} weights", f"{spec.owner}/{spec.weights_slug}")


def _write_ensemble(spec: KernelSpec, folder: Path, study_models: set[str]) -> str:
    """Copy the kernel's ensemble to a subfolder of `folder`; return the subfolder's name, "" if the kernel has no ensemble.

    Raises KernelError unless the ensemble combines exactly `study_models`, the kernel's models that predict study classes.
    """
    bundle = spec.named_bundle("ensemble")
    if bundle is None:
        return ""
    ensemble = read_ensemble(bundle)
    if ensemble.key != "study_id" or set(ensemble.classes) != set(STUDY_CLASSES):
        raise KernelError(
            f"ensemble: {bundle} predicts {', '.join(ensemble.classes)} for each {ensemble.key.removesuffix('_id')}; give "
            "an ensemble of study models"
        )
    if set(ensemble.learners) != study_models:
        raise KernelError(
            f"ensemble: {bundle} combines {', '.join(sorted(ensemble.learners))}, but `runs` has the study models "
            f"{', '.join(sorted(study_models)) or 'none'}; change `runs` or the ensemble so that both have the same models"
        )
    (folder / "ensemble").mkdir()
    for file in (ENSEMBLE_WEIGHTS, ENSEMBLE_RECORD):
        shutil.copyfile(bundle / file, folder / "ensemble" / file)
    read_ensemble(folder / "ensemble")  # verifies the copy
    return "ensemble"


def _write_lungs(spec: KernelSpec, folder: Path) -> str:
    """Copy the kernel's lung segmenter to `folder`/lungs; return the segmenter's digest, "" if the kernel has none."""
    bundle = spec.named_bundle("lungs")
    if bundle is None:
        return ""
    record = copy_bundle(bundle, folder / "lungs")
    if recorded_family(record, bundle).answers != LUNGS:
        raise KernelError(
            f"lungs: {bundle} is a {record['family']} model, not a lung segmenter; give a run of notebook 14, or a fold of "
            "notebook 12"
        )
    return segmenter_digest(record)


def copy_bundle(bundle: Path, folder: Path) -> dict[str, Any]:
    """Copy a bundle (a model's weights and record) into the new folder `folder`, and return the record.

    Missing parent folders are created. Reading the record from the copy also verifies the copied weights.
    """
    folder.mkdir(parents=True)
    for file in (WEIGHTS, RECORD):
        if (bundle / file).is_file():
            shutil.copyfile(bundle / file, folder / file)
    return read_bundle(folder)[0]


def _write_dataset_metadata(folder: Path, title: str, name: str) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > DATASET_BYTES:
        raise KernelError(
            f"the dataset {name} has {size:,} bytes, but Kaggle accepts at most {DATASET_BYTES:,}; remove the last `runs`"
        )
    # "other", because wheels have several licences, and weights inherit those of their training data and starting weights.
    write_json(folder / "dataset-metadata.json", {"title": title, "id": name, "licenses": [{"name": "other"}]})
