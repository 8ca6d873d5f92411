import base64
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from papermill.parameterize import parameterize_notebook
from safetensors.numpy import load_file

import kitlib
from kitlib.bundle import read_record
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import BundleError, InputNotFound, KernelError
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.inference import install_wheels
from kitlib.kernels import build as kernel
from kitlib.kernels import start as kernel_start
from kitlib.kernels.build import build_kernel
from kitlib.kernels.pack_library import find_needed_files, pack_library
from kitlib.kernels.spec import KernelSpec, read_spec
from kitlib.lungs.finders import segmenter_digest
from kitlib.parameters import read_parameters
from kitlib.recipes.named import RECIPES, recipe
from kitlib.runs.record import kitlib_digest
from tests import PROJECT
from tests.small_kernels import PARAMETERS, make_run, make_submission, make_training, make_wheel
from tests.test_rooms import imported


@pytest.fixture(autouse=True)
def no_user_name(monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / "wheels", "kit_extra", "1.2", ["numpy>=2"])


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def built_notebook(out: Path) -> nbformat.NotebookNode:
    return nbformat.read(out / "kernel" / "small-test-kernel.ipynb", as_version=4)


def test_the_same_sources_give_the_same_bytes(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path / "one", "print(1)"))
    first = tmp_path / "new" / "first"
    assert build_kernel(spec, first, [wheel]) == {part: first / part for part in ("kernel", "wheels", "weights")}
    random.seed(99)
    build_kernel(spec, tmp_path / "second", [wheel])
    assert contents(first) == contents(tmp_path / "second")
    assert set(contents(first)) == {
        "kernel/kernel-metadata.json",
        "kernel/small-test-kernel.ipynb",
        "wheels/dataset-metadata.json",
        "wheels/kit_extra-1.2-py3-none-any.whl",
        "weights/dataset-metadata.json",
        "weights/effnet-fold0/model.json",
        "weights/effnet-fold0/weights.safetensors",
        "weights/weights.json",
    }


def test_kernel_metadata_leaves_nothing_to_kaggles_defaults(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    assert json.loads((tmp_path / "out/kernel/kernel-metadata.json").read_text()) == {
        "id": "somebody/small-test-kernel",
        "title": "Small test kernel",
        "code_file": "small-test-kernel.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": ["somebody/small-test-kernel-weights", "somebody/small-test-kernel-wheels"],
        "competition_sources": ["siim-covid19-detection"],
        "kernel_sources": [],
        "model_sources": [],
    }


def test_a_docker_image_and_another_accelerator_are_in_the_metadata(tmp_path, wheel):
    image = f"gcr.io/kaggle-gpu-images/python@sha256:{'0a' * 32}"
    build_kernel(read_spec(make_submission(tmp_path, accelerator="NvidiaL4", docker_image=image)), tmp_path / "out", [wheel])
    metadata = json.loads((tmp_path / "out" / "kernel" / "kernel-metadata.json").read_text())
    assert [metadata["machine_shape"], metadata["enable_gpu"]] == ["NvidiaL4", True]
    assert [metadata["docker_image"], metadata["docker_image_pinning_type"]] == [image, "original"]


def test_a_kernel_without_accelerator_asks_for_none(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path, accelerator="none")), tmp_path / "out", [wheel])
    metadata = json.loads((tmp_path / "out/kernel/kernel-metadata.json").read_text())
    assert metadata["enable_gpu"] is False
    assert metadata["enable_internet"] is False
    assert metadata["machine_shape"] == "None"


@pytest.mark.parametrize("word", ["weights", "wheels"])
def test_dataset_metadata_has_one_licence(tmp_path, wheel, word):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    assert json.loads((tmp_path / f"out/{word}/dataset-metadata.json").read_text()) == {
        "title": f"Small test kernel {word}",
        "id": f"somebody/small-test-kernel-{word}",
        "licenses": [{"name": "other"}],
    }


def test_parameters_are_injected_as_papermill_does(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path, "print(batch_size)", parameters={"batch_size": 4}, time_limit_hours=2))
    build_kernel(spec, tmp_path / "out", [wheel])
    cells = built_notebook(tmp_path / "out").cells
    values = {"competition": "siim-covid19-detection", "weights": "small-test-kernel-weights"}
    values |= {"wheels": "small-test-kernel-wheels", "time_limit_s": 7200.0}
    by_papermill = parameterize_notebook(papermill.iorw.load_notebook_node(spec.notebook), values | {"batch_size": 4})
    assert [cell.source for cell in cells[1:]] == [cell.source for cell in by_papermill.cells]
    assert cells[3].metadata.tags == ["injected-parameters"]
    assert cells[2].source == PARAMETERS


def test_a_built_notebook_runs_with_any_jupyter_and_without_the_outputs_of_its_source(tmp_path, wheel):
    path = make_submission(tmp_path / "spec", "print(1)")
    source = nbformat.read(tmp_path / "spec" / "submit.ipynb", as_version=4)
    source.metadata = {"kernelspec": {"name": "my-venv", "display_name": "mine", "language": "python"}, "widgets": {}}
    source.cells[-1].update(outputs=[nbformat.v4.new_output("stream", text="private")], execution_count=7)
    nbformat.write(source, tmp_path / "spec" / "submit.ipynb")
    build_kernel(read_spec(path), tmp_path / "out", [wheel])
    notebook = built_notebook(tmp_path / "out")
    # The kernel that Jupyter always has; papermill starts no notebook that does not name its kernel and language.
    assert [papermill.utils.nb_kernel_name(notebook), papermill.utils.nb_language(notebook)] == ["python3", "python"]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    assert {cell.execution_count for cell in cells} == {None}
    assert "widgets" not in notebook.metadata


def embedded(kernel: Path) -> str:
    return built_notebook(kernel).cells[0].source.split('"""')[-2]


def test_the_modules_that_the_notebook_imports_are_packed_and_unpacked(tmp_path, wheel, monkeypatch):
    code = "%matplotlib inline\nfrom kitlib.scoring.score import score_files\ndef later():\n    import kitlib.xrays.dicom"
    build_kernel(read_spec(make_submission(tmp_path, code)), tmp_path / "out", [wheel])
    packed = embedded(tmp_path / "out")
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as opened:
        names = opened.getnames()
    # The notebook's imports, their imports, parent packages, the first cell's imports, and the digest.
    expected = {
        "kitlib/scoring/score.py",
        "kitlib/scoring/average_precision.py",
        "kitlib/xrays/dicom.py",
        "kitlib/xrays/header.py",
    }
    expected |= {"kitlib/__init__.py", "kitlib/scoring/__init__.py", "kitlib/inference/install_wheels.py"}
    # The running notebook compares its parameters with those of the notebook that the kernel was built from.
    packed_notebook = next(name for name in names if name.startswith("notebooks/"))
    names.remove(packed_notebook)
    assert expected <= set(names) and names[-1] == "kitlib/whole_library.sha256"
    assert not [name for name in names if name.startswith(("kitlib/training/", "kitlib/page/", "kitlib/phantoms/"))]
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("KIT_ROOT", "PYTHONPATH", "KIT_STARTED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = kernel_start.start_kernel(packed)
    sources = Path(kitlib.__file__).parent.parent
    assert all((folder / name).read_bytes() == (sources / name).read_bytes() for name in names[:-1])
    assert (folder / names[-1]).read_text() == kitlib_digest()
    assert [sys.path[0], os.environ["KIT_ROOT"], os.environ["PYTHONPATH"]] == [str(folder)] * 3
    assert set(read_parameters(folder / packed_notebook)) == {
        "competition",
        "weights",
        "wheels",
        "time_limit_s",
        "batch_size",
    }


def test_starting_a_kernel_keeps_what_was_set_before(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("KIT_ROOT", "elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setenv("KIT_STARTED", "12.5")  # by a rehearsal
    packed = pack_library([], {"kitlib/data.txt": b"data"})
    first = kernel_start.start_kernel(packed)
    assert (first / "kitlib" / "data.txt").read_bytes() == b"data"
    assert [os.environ["KIT_STARTED"], os.environ["PYTHONPATH"]] == ["12.5", f"{first}{os.pathsep}/before"]
    for name in ("KIT_STARTED", "PYTHONPATH"):
        monkeypatch.delenv(name)
    before = time.monotonic()
    second = kernel_start.start_kernel(packed)
    assert second != first and [os.environ["PYTHONPATH"], os.environ["KIT_ROOT"]] == [str(second)] * 2
    assert before <= float(os.environ["KIT_STARTED"]) <= time.monotonic()


def test_a_kernel_whose_wheels_are_missing_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("KIT_ROOT", "PYTHONPATH", "KIT_STARTED"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(InputNotFound, match="no-such-wheels"):
        kernel_start.start_kernel(pack_library([], {}), "no-such-wheels")


@pytest.mark.parametrize("notebook", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_packed_files_import_only_packed_files(notebook):
    sources = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    files = find_needed_files(sources)
    files = [path for path in files if path.endswith(".py")]
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    assert {name for path in files for name in imported(PROJECT / path)} <= modules
    assert 10 < len(modules) < len(list((PROJECT / "kitlib").rglob("*.py")))


def test_a_module_is_packed_with_its_data():
    files = find_needed_files(["from kitlib.reports.published_tables import find_published"])
    assert "kitlib/reports/published_tables.yaml" in files
    assert [path for path in files if not path.endswith(".py")] == ["kitlib/reports/published_tables.yaml"]


def test_importing_an_unknown_kitlib_module_is_an_error_at_building():
    with pytest.raises(ImportError, match=r"kitlib has no module kitlib\.nowhere\.to_be_found"):
        find_needed_files(["from kitlib.nowhere.to_be_found import x"])


def test_weights_are_listed_in_order_of_value_and_copied_unchanged(tmp_path, wheel):
    runs = [make_run(tmp_path / "runs" / f"study{fold}", fold=fold) for fold in (0, 1)]
    best = make_run(tmp_path / "runs" / "detector", "yolo11s", 3, "yolo")
    (tmp_path / "fusion.json").write_text('{"opacity_power": 0.5}')
    spec = make_submission(
        tmp_path / "spec", runs=[f"{best}/", str(runs[0].parent / "study*"), str(best)], fusion=str(tmp_path / "fusion.json")
    )
    build_kernel(read_spec(spec), tmp_path / "out", [wheel])
    listed = json.loads((tmp_path / "out/weights/weights.json").read_text())["bundles"]
    assert [(entry["folder"], entry["family"], entry["fold"]) for entry in listed] == [
        ("yolo11s-fold3", "yolo", 3),
        ("effnet-fold0", "study", 0),
        ("effnet-fold1", "study", 1),
    ]
    for entry in listed:
        weights = tmp_path / "out/weights" / entry["folder"] / "weights.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry["weights_sha256"]
        assert load_file(weights)["weight"].tolist() == [[entry["fold"]] * 3] * 2
    assert (tmp_path / "out/weights/fusion.json").read_text() == '{"opacity_power": 0.5}'
    # Only a run that has a record can be told the score of its fusion.
    assert read_spec(spec).fused_run() is None
    (tmp_path / "record.json").write_text("{}")
    assert read_spec(spec).fused_run() == tmp_path


@pytest.mark.parametrize(
    "content", ["{", '{"colour": 1}', "[1]", '{"opacity_power": "strong"}', "root:x:0:0:root:/root:/bin/bash"]
)
def test_fusion_settings_are_read_before_they_are_copied(tmp_path, wheel, content):
    (tmp_path / "fusion.json").write_text(content)
    spec = read_spec(make_submission(tmp_path / "spec", fusion=str(tmp_path / "fusion.json")))
    with pytest.raises(KernelError, match=r"^fusion: "):
        build_kernel(spec, tmp_path / "out", [wheel])
    assert not (tmp_path / "out/weights").exists()
    (tmp_path / "fusion.json").unlink()
    with pytest.raises(KernelError, match=r"^fusion: .*fusion\.json does not exist; run notebook 60 first"):
        build_kernel(spec, tmp_path / "out", [wheel])


def test_a_notebook_is_a_notebook_of_the_project_or_beside_the_yaml_file(tmp_path):
    spec = make_submission(tmp_path / "spec")
    (tmp_path / "private.ipynb").write_text("{}")
    with_notebook = yaml.safe_load(spec.read_text())
    for path in (tmp_path / "private.ipynb", tmp_path / "spec" / ".." / "private.ipynb"):
        spec.write_text(yaml.safe_dump(with_notebook | {"notebook": str(path)}))
        with pytest.raises(KernelError, match=r"private\.ipynb is outside the project and this YAML file's folder"):
            read_spec(spec)
    (tmp_path / "spec" / "notes.txt").write_text("my notes")
    spec.write_text(yaml.safe_dump(with_notebook | {"notebook": str(tmp_path / "spec" / "notes.txt")}))
    with pytest.raises(KernelError, match=r"notes\.txt is not a notebook"):
        read_spec(spec)


def test_a_damaged_bundle_is_refused(tmp_path, wheel):
    run = make_run(tmp_path / "run")
    weights = run / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="SHA-256"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=[str(run)])), tmp_path / "out", [wheel])


def test_a_run_without_a_models_record_is_refused(tmp_path, wheel):
    run = make_run(tmp_path / "run")
    (run / "bundle" / "model.json").unlink()
    with pytest.raises(BundleError, match=r"model\.json"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=[str(run)])), tmp_path / "out", [wheel])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["../wheels/effnet", "/effnet", ".effnet", "eff net", "effnet\n", ""])
def test_a_model_whose_name_cannot_be_a_folders_is_refused(tmp_path, wheel, name):
    runs = [str(make_run(tmp_path / "run", name))]
    with pytest.raises(KernelError, match=r"the model name .* cannot be a folder name; use letters"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs)), tmp_path / "out", [wheel])


def test_a_backbone_in_a_submission_is_refused(tmp_path, wheel):
    runs = [str(make_run(tmp_path / "nih", family="findings"))]
    with pytest.raises(KernelError, match=r"nih/bundle predicts classes .* of which a submission to siim-covid19"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs)), tmp_path / "out", [wheel])


def test_an_ensemble_requires_exactly_its_learners(tmp_path, wheel):
    runs = [str(make_run(tmp_path / name, name)) for name in ("one", "two")]
    runs.append(str(make_run(tmp_path / "none", "none", outputs="none")))  # predicts images only
    runs.append(str(make_run(tmp_path / "boxes", "boxes", family="yolo")))  # a detector is no learner of studies
    fields = {"method": "mean", "learners": ("one", "two"), "classes": STUDY_CLASSES, "key": "study_id"}
    write_ensemble(tmp_path / "stack" / "ensemble", Ensemble("mean", **fields))
    write_ensemble(tmp_path / "images" / "ensemble", Ensemble("mean", **fields | {"key": "image_id"}))
    write_ensemble(tmp_path / "lines" / "ensemble", Ensemble("mean", **fields | {"classes": ("ett", "cvc")}))
    stack = str(tmp_path / "stack")
    build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs, ensemble=stack)), tmp_path / "out", [wheel])
    weights = tmp_path / "out" / "weights"
    assert json.loads((weights / "weights.json").read_text())["ensemble"] == "ensemble"
    assert contents(weights / "ensemble") == contents(tmp_path / "stack" / "ensemble")
    for keys, message in (
        ({"runs": runs[1:], "ensemble": stack}, r"combines one, two, but `runs` has the study models two; change"),
        (
            {"runs": runs, "ensemble": str(tmp_path / "images")},
            r"images/ensemble predicts negative, .* give an ensemble of study",
        ),
        ({"runs": runs, "ensemble": str(tmp_path / "lines")}, "lines/ensemble predicts ett, cvc for each study; give"),
        ({"runs": runs[2:], "ensemble": stack}, "combines one, two, but `runs` has the study models none; change"),
        (
            {"runs": runs, "ensemble": str(tmp_path / "gone")},
            r"ensemble: .*gone/ensemble does not exist; give a run of notebook 65",
        ),
    ):
        with pytest.raises(KernelError, match=message):
            build_kernel(read_spec(make_submission(tmp_path / "spec", **keys)), tmp_path / "out", [wheel])


def test_a_segmenters_bundle_is_copied_into_its_own_subfolder(tmp_path, wheel):
    lungs = make_run(tmp_path / "lungs" / "fold0", "unet", family="segmenter")
    architecture = {"segmenter": segmenter_digest(read_record(lungs / "bundle"))}
    runs = [str(make_run(tmp_path / "study", architecture=architecture, lungs="masks", views=["lungs"]))]
    runs.append(str(make_run(tmp_path / "whole", "whole")))  # a model that needs no masks
    spec = read_spec(make_submission(tmp_path / "spec", runs=runs, lungs=str(lungs)))
    for out in ("out", "again"):
        build_kernel(spec, tmp_path / out, [wheel])
    weights = tmp_path / "out" / "weights"
    listing = json.loads((weights / "weights.json").read_text())
    folders = [entry["folder"] for entry in listing["bundles"]]
    assert (listing["lungs"], folders) == ("lungs", ["effnet-fold0", "whole-fold0"])
    assert contents(weights / "lungs") == contents(lungs / "bundle")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    # Without the key, a new build removes the lungs of the earlier one.
    build_kernel(read_spec(make_submission(tmp_path / "plain")), tmp_path / "out", [wheel])
    assert set(json.loads((weights / "weights.json").read_text())) == {"bundles"} and not (weights / "lungs").exists()


def test_a_model_trained_on_masks_requires_its_segmenter(tmp_path, wheel):
    segmenter = str(make_run(tmp_path / "unet", "unet", family="segmenter"))
    other = str(make_run(tmp_path / "other", "unet", family="segmenter", dilations=3))
    architecture = {"segmenter": segmenter_digest(read_record(tmp_path / "unet" / "bundle"))}
    crops = str(make_run(tmp_path / "crops", "crops", architecture=architecture, lungs="masks", masked=True))
    unused = str(make_run(tmp_path / "unused", "unused", lungs="masks", views=["full"]))
    for keys, message in (
        (
            {"runs": [crops]},
            r"crops/bundle was trained with a segmenter's lung masks, but the key `lungs` is empty; set `lungs` to the run",
        ),
        (
            {"runs": [crops], "lungs": other},
            r"but the key `lungs` names a run with another segmenter or mask clean-up; set `lungs` to the run of",
        ),
        (
            {"runs": [segmenter]},
            r"unet/bundle predicts lungs .a., of which a submission to siim-covid19 contains none; give its run in the",
        ),
        ({"runs": [crops], "lungs": crops}, r"lungs: .*crops/bundle is a study model, not a lung segmenter; give"),
        ({"runs": [crops], "lungs": str(tmp_path / "none")}, r"lungs: .*none/bundle does not exist"),
    ):
        with pytest.raises(KernelError, match=message):
            build_kernel(read_spec(make_submission(tmp_path / "spec", **keys)), tmp_path / "out", [wheel])
    damaged = make_run(tmp_path / "damaged", "unet", family="segmenter") / "bundle" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    spec = make_submission(tmp_path / "spec", runs=[crops], lungs=str(damaged.parents[1]))
    with pytest.raises(BundleError, match="SHA-256"):
        build_kernel(read_spec(spec), tmp_path / "out", [wheel])
    build_kernel(read_spec(make_submission(tmp_path / "spec", runs=[unused])), tmp_path / "out", [wheel])


def test_two_bundles_of_one_name_are_refused(tmp_path, wheel):
    runs = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    with pytest.raises(KernelError, match="two/bundle is a second bundle of effnet-fold0"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs)), tmp_path / "out", [wheel])


def test_an_unknown_parameter_is_refused_with_the_valid_ones(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path, parameters={"batchsize": 4}))
    valid = "batch_size, competition, weights, wheels, time_limit_s"
    with pytest.raises(KernelError, match=f"no parameter 'batchsize'; it has: {valid}"):
        build_kernel(spec, tmp_path / "out", [wheel])


@pytest.mark.parametrize("key", ["parameters", "rehearsal"])
@pytest.mark.parametrize("parameter", [{"time_limit_s": 4.0}, {"weights": "x"}, {"wheels": "x"}, {"competition": "x"}])
def test_a_parameter_that_a_kernel_key_sets_is_refused(tmp_path, wheel, key, parameter):
    spec = read_spec(make_submission(tmp_path, **{key: parameter}))
    (name,) = parameter
    with pytest.raises(KernelError, match=f"{key}: {name} cannot be set as a parameter; change the kernel's own keys"):
        build_kernel(spec, tmp_path / "out", [wheel])


def test_a_notebook_over_a_megabyte_is_refused_and_the_last_good_build_stays(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    before = contents(tmp_path / "out")
    with pytest.raises(
        KernelError, match=r"small-test-kernel\.ipynb has 1,\d{3},\d{3} bytes, but Kaggle accepts at most 1,000,000"
    ):
        build_kernel(read_spec(make_submission(tmp_path, "#" * 1_000_000)), tmp_path / "out", [wheel])
    assert contents(tmp_path / "out") == before


def test_a_dataset_over_the_limit_is_refused(tmp_path, wheel, monkeypatch):
    assert kernel.DATASET_BYTES == 200_000_000_000  # Kaggle's limit of 200 GB
    monkeypatch.setattr(kernel, "DATASET_BYTES", 100)
    with pytest.raises(
        KernelError, match=r"dataset somebody/small-test-kernel-weights has .* bytes, but Kaggle accepts at most 100"
    ):
        build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])


def test_wheels_that_the_image_cannot_install_are_refused(tmp_path):
    wheel = make_wheel(tmp_path, "kit_extra", "1.2", ["pandas>=3"])
    with pytest.raises(KernelError, match=r"kit-extra requires pandas>=3, but the image has pandas 2\.3\.3"):
        build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"titel": "x"},
            "no field 'titel'; it has: title, slug, owner, competition, dataset_sources, model_sources, kernel_sources",
        ),
        ({"title": None}, "title is missing"),
        ({"owner": None}, "owner is missing"),
        ({"runs": []}, "runs is missing"),
        ({"slug": "another-slug"}, "slug is 'another-slug', but Kaggle derives 'small-test-kernel' from the title"),
        (
            {"title": "A " * 22 + "end", "slug": "a-" * 22 + "end"},
            "'.*weights' has 55 characters, but Kaggle allows 6 to 50",
        ),
        ({"title": "Four", "slug": "four"}, "'Four' has 4 characters, but Kaggle allows 6 to 50"),
        ({"title": "Ab ! !", "slug": "ab"}, "the slug 'ab' has 2 characters, but Kaggle allows 3 to 50"),
        ({"title": "ß" * 25 + "a", "slug": "ss" * 25 + "a"}, "the slug '.*' has 51 characters, but Kaggle allows 3 to 50"),
        ({"accelerator": "NvidiaTeslaP100"}, "Kaggle has retired the P100 and runs these kernels on T4 x2; .*NvidiaTeslaT4"),
        ({"accelerator": "tpuv5e8"}, "accelerator tpuv5e8: the kit computes with PyTorch on GPUs and CPUs, not on TPUs"),
        ({"accelerator": "nvidiaL4"}, "accelerator 'nvidiaL4' is unknown; write NvidiaL4"),
        ({"accelerator": "T4"}, "accelerator 'T4' is unknown; valid: NvidiaTeslaT4, NvidiaL4, NvidiaL4X1, .*, none"),
        ({"docker_image": "gcr.io/kaggle-images/python:v170"}, r"is not NAME@sha256:DIGEST; .*kaggle kernels pull -m"),
        ({"owner": "Some Body"}, "owner 'Some Body' is not a Kaggle user name"),
        ({"time_limit_hours": "nine"}, "time_limit_hours is 'nine'; expected a finite number"),
        ({"runs": [1, 2]}, r"runs is \[1, 2\]; expected a list, each item a string"),
    ],
)
def test_a_submission_is_read_strictly(tmp_path, keys, message):
    with pytest.raises(KernelError, match=message):
        read_spec(make_submission(tmp_path, **keys))


@pytest.mark.parametrize(("hours", "valid"), [(-1, False), (0, False), (0.25, True), (12, True), (12.5, False)])
def test_a_session_lasts_at_most_twelve_hours(tmp_path, hours, valid):
    """Kaggle's limit."""
    path = make_submission(tmp_path, time_limit_hours=hours)
    if valid:
        assert read_spec(path).time_limit_s == hours * 3600
    else:
        with pytest.raises(KernelError, match=f"time_limit_hours is {float(hours)}; it must be above 0 and at most 12"):
            read_spec(path)


def test_a_session_lasts_nine_hours_by_default():
    """The limit of SIIM's competition."""
    assert KernelSpec().time_limit_s == 9 * 3600


def named(length):
    return {"title": "a" * length, "slug": "a" * length}


@pytest.mark.parametrize(
    ("make", "keys", "shortest", "longest"),
    [
        (make_training, lambda length: named(length) | {"wheels": "shared-wheels"}, 6, 50),
        (make_training, named, 6, 50 - len(" wheels")),  # the title of the kernel's own wheels
        (make_submission, lambda length: named(length) | {"wheels": "shared-wheels"}, 6, 50 - len(" weights")),
        (make_training, lambda length: {"wheels": "a" * length}, 6, 50),
        (make_training, lambda length: {"dataset_sources": [f"somebody-else/{'a' * length}"]}, 3, 50),
        (make_training, lambda length: {"kernel_sources": ["a" * length]}, 5, 50),
        (make_training, lambda length: {"competition": "a" * length}, None, 100),
    ],
    ids=["title", "title of wheels", "title of weights", "wheels", "dataset", "kernel", "competition"],
)
def test_names_are_as_long_as_kaggle_allows(tmp_path, make, keys, shortest, longest):
    """Kaggle allows titles of 6 to 50 characters; its client requires 3 for an attached dataset and 5 for a kernel."""
    for length in (shortest or 1, longest):
        read_spec(make(tmp_path, **keys(length)))
    for length in (*([shortest - 1] if shortest else []), longest + 1):
        with pytest.raises(KernelError, match=r" has \d+ characters, but Kaggle allows"):
            read_spec(make(tmp_path, **keys(length)))


@pytest.mark.parametrize(
    ("make", "keys", "slug"),
    [
        (make_submission, {"dataset_sources": ["else/siim-covid19-detection"]}, "siim-covid19-detection"),
        (make_submission, {"dataset_sources": ["small-test-kernel-weights"]}, "small-test-kernel-weights"),
        (make_submission, {"dataset_sources": ["small-test-kernel-wheels"]}, "small-test-kernel-wheels"),
        (make_training, {"kernel_sources": ["else/shared-wheels"], "wheels": "shared-wheels"}, "shared-wheels"),
        (make_training, {"dataset_sources": ["one/data-set", "two/data-set"]}, "data-set"),
        (make_training, {"model_sources": ["one/a/b/c/1", "two/a/b/c/1"]}, "a/b/c/1"),
    ],
)
def test_two_inputs_of_one_slug_are_refused(tmp_path, make, keys, slug):
    with pytest.raises(KernelError, match=f"two inputs have the slug {slug}, but"):
        read_spec(make(tmp_path, **keys))


def test_a_training_has_no_weights_dataset_whose_slug_an_input_could_have(tmp_path):
    sources = ("small-test-kernel-weights",)
    assert read_spec(make_training(tmp_path, dataset_sources=list(sources))).dataset_sources == sources


def test_a_missing_file_is_an_error_that_lists_the_available_ones(tmp_path):
    make_submission(tmp_path)
    with pytest.raises(KernelError, match=r"other\.yaml does not exist; available kernels: .*small\.yaml"):
        read_spec(tmp_path / "other.yaml")


def test_runs_that_match_nothing_are_refused(tmp_path):
    spec = read_spec(make_submission(tmp_path, runs=[str(tmp_path / "nothing*")]))
    with pytest.raises(KernelError, match=r"no folder '.*nothing\*' below .* contains `bundle`"):
        spec.bundles()


def test_the_owner_comes_from_the_call_the_environment_or_the_file(tmp_path, monkeypatch):
    path = make_submission(tmp_path)
    assert read_spec(path).owner == "somebody"
    monkeypatch.setenv("KAGGLE_USERNAME", "from-environment")
    assert read_spec(path).owner == "from-environment"
    assert read_spec(path, owner="from-call").owner == "from-call"


@pytest.mark.parametrize(
    ("title", "slug"),
    [
        ("SIIM COVID-19: Detection (v2)", "siim-covid-19-detection-v2"),
        ("Größe der Lunge", "grosse-der-lunge"),
        ("Chest's 1,000 X-rays", "chest-s-1000-x-rays"),
        ("Étude_pulmonaire", "etude-pulmonaire"),
    ],
)
def test_slugs_are_made_as_kaggle_makes_them(tmp_path, title, slug):
    """Kaggle's client compares the id with python-slugify's slug of the title."""
    assert read_spec(make_submission(tmp_path, title=title, slug=slug)).slug == slug
    with pytest.raises(KernelError, match=f"but Kaggle derives '{slug}' from the title"):
        read_spec(make_submission(tmp_path / "other", title=title, slug="something-else"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"competition": "c/some-data"}, "competition is 'c/some-data'; write only its name, such as some-data"),
        ({"competition": "https://www.kaggle.com/competitions/some-data/overview?x=1"}, "such as some-data"),
        ({"competition": "some data"}, "competition: the slug 'some data' may only contain letters"),
        ({"dataset_sources": ["https://www.kaggle.com/datasets/a/data-set"]}, "nor OWNER/SLUG; write a/data-set"),
        ({"dataset_sources": ["datasets/data-set"]}, "nor OWNER/SLUG; write data-set"),
        ({"dataset_sources": ["/kaggle/input/data-set"]}, "nor OWNER/SLUG; write data-set"),
        ({"dataset_sources": ["a/b/c"]}, "nor OWNER/SLUG; write a/b"),
        ({"dataset_sources": ["a//data-set"]}, "nor OWNER/SLUG; write a/data-set"),
        ({"kernel_sources": ["https://www.kaggle.com/code/a/some-kernel"]}, "nor OWNER/SLUG; write a/some-kernel"),
    ],
)
def test_an_address_is_refused_with_the_name_in_it(tmp_path, keys, message):
    with pytest.raises(KernelError, match=re.escape(message)):
        read_spec(make_submission(tmp_path, **keys))


@pytest.mark.parametrize("source", ["kaggle/meta-kaggle", "input", "datasets", "code"])
def test_names_that_are_also_parts_of_addresses_are_valid(tmp_path, source):
    assert read_spec(make_submission(tmp_path, dataset_sources=[source])).dataset_sources == (source,)


def test_a_missing_wheels_dataset_is_an_error_that_lists_the_inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "input" / "other").mkdir(parents=True)
    (tmp_path / "working").mkdir()
    with pytest.raises(InputNotFound, match=r"no input 'extra-wheels' below .*input(.|\n)*\n  other"):
        install_wheels.install_wheels("extra-wheels")


def test_installed_wheels_are_not_installed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    make_wheel(tmp_path / "input" / "extra-wheels", "pydicom", "3.0.2")
    monkeypatch.setattr(install_wheels.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    assert install_wheels.install_wheels("extra-wheels") == []


def training(folder, wheel, *cells, **keys):
    """Build a kernel that makes a run; return its metadata and its notebook."""
    build_kernel(read_spec(make_training(folder / "spec", *cells, **keys)), folder / "out", [wheel])
    return json.loads((folder / "out/kernel/kernel-metadata.json").read_text()), built_notebook(folder / "out")


def test_a_training_notebook_becomes_a_kernel_with_attached_runs(tmp_path, wheel):
    sources = {"kernel_sources": ["prepared-runs", "other/their-runs"], "dataset_sources": ["other/weights-file"]}
    sources["model_sources"] = ["timm/resnext/pytorch/resnext101-32x8d/1", "timm/resnext/pytorch/resnext50/2"]
    metadata, notebook = training(tmp_path, wheel, "print(epochs)", parameters={"prepare_run": "siim"}, **sources)
    assert metadata["kernel_sources"] == ["somebody/prepared-runs", "other/their-runs"]
    assert metadata["dataset_sources"] == ["somebody/small-test-kernel-wheels", "other/weights-file"]
    assert metadata["competition_sources"] == [] and metadata["model_sources"] == sources["model_sources"]
    assert [metadata["enable_gpu"], metadata["enable_internet"]] == [True, False]
    # The notebook has no parameter that a kernel key sets, so none of these is injected.
    assert notebook.cells[3].source == '# Parameters\nprepare_run = "siim"\n'
    # Nor has it a parameter `wheels`: the wheels are installed before its first cell.
    assert notebook.cells[0].source.endswith('\n""", \'small-test-kernel-wheels\');')
    assert not (tmp_path / "out" / "weights").exists()


def test_the_start_cell_installs_no_wheels_for_a_notebook_that_does(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    assert built_notebook(tmp_path / "out").cells[0].source.endswith('\n""", \'\');')


def test_a_kernel_may_have_the_internet(tmp_path, wheel):
    assert training(tmp_path, wheel, internet=True)[0]["enable_internet"] is True


def test_kernels_may_share_their_wheels(tmp_path, wheel):
    """The shared dataset is the same bytes whichever kernel it was built with."""
    for name in ("first", "second"):
        keys = {"title": f"The {name} kernel", "slug": f"the-{name}-kernel", "wheels": "chest-kit-wheels"}
        spec = read_spec(make_training(tmp_path / name / "spec", **keys))
        build_kernel(spec, tmp_path / name / "out", [wheel])
        metadata = json.loads((tmp_path / name / "out/kernel/kernel-metadata.json").read_text())
        assert metadata["dataset_sources"] == ["somebody/chest-kit-wheels"]
    assert contents(tmp_path / "first/out/wheels") == contents(tmp_path / "second/out/wheels")
    assert json.loads((tmp_path / "first/out/wheels/dataset-metadata.json").read_text()) == {
        "title": "Chest kit wheels",
        "id": "somebody/chest-kit-wheels",
        "licenses": [{"name": "other"}],
    }


def test_the_weights_of_an_earlier_build_are_removed(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path / "submission")), tmp_path / "out", [wheel])
    build_kernel(read_spec(make_training(tmp_path / "training")), tmp_path / "out", [wheel])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kernel", "wheels"]


def test_the_competition_is_injected_if_the_notebook_has_the_parameter(tmp_path, wheel):
    parameters = 'competition = "siim-covid19-detection"\nrun_folder = "prepare"'
    _, notebook = training(tmp_path / "one", wheel, notebook_parameters=parameters, competition="rsna")
    assert notebook.cells[3].source == '# Parameters\ncompetition = "rsna"\n'
    keys = {"dataset_sources": ["nih/data"], "parameters": {"competition": "data"}}
    metadata, notebook = training(tmp_path / "two", wheel, notebook_parameters=parameters, **keys)
    assert notebook.cells[3].source == '# Parameters\ncompetition = "data"\n'
    assert metadata["competition_sources"] == []


@pytest.mark.parametrize("key", ["parameters", "rehearsal"])
def test_parameters_of_a_rehearsal_are_checked_like_the_others(tmp_path, wheel, key):
    with pytest.raises(
        KernelError, match=f"{key}: train.ipynb has no parameter 'epoch'; it has: epochs, prepare_run, run_folder"
    ):
        training(tmp_path, wheel, **{key: {"epoch": 1}})
    with pytest.raises(KernelError, match=rf"{key}: train.ipynb: 'epochs' must be a whole number, got 'ten'"):
        training(tmp_path, wheel, **{key: {"epochs": "ten"}})


def test_a_recipe_is_checked_when_the_kernel_is_built(tmp_path, wheel):
    notebook = "run_folder = 'study'\nrecipe = 'small_study'\noverrides = {}"
    keys = {"parameters": {"recipe": "lean_study"}, "rehearsal": {"overrides": {"image_sise": 64}}}
    with pytest.raises(KernelError, match="rehearsal: StudyRecipe has no field 'image_sise'"):
        training(tmp_path, wheel, notebook_parameters=notebook, **keys)


def test_rehearsal_parameters_are_not_built_into_the_kernel(tmp_path, wheel):
    keys = {"parameters": {"epochs": 30, "prepare_run": "siim"}, "rehearsal": {"epochs": 1}}
    _, notebook = training(tmp_path, wheel, **keys)
    spec = read_spec(tmp_path / "spec" / "small.yaml")
    assert spec.injected_parameters() == {"epochs": 30, "prepare_run": "siim"}
    assert spec.injected_parameters(rehearsed=True) == {"epochs": 1, "prepare_run": "siim"}
    assert "epochs = 30" in notebook.cells[3].source


@pytest.mark.parametrize("folder", ["/elsewhere/study", "../study", ""])
@pytest.mark.parametrize(("key", "other"), [("parameters", "rehearsal"), ("rehearsal", "parameters")])
def test_a_run_that_kaggle_would_not_keep_is_refused(tmp_path, wheel, folder, key, other):
    with pytest.raises(KernelError, match=r"run_folder is .*, but Kaggle keeps only files below /kaggle/working"):
        training(tmp_path, wheel, **{key: {"run_folder": folder}, other: {"run_folder": "kept"}})


def test_every_shipped_notebook_can_be_built_as_a_kernel(tmp_path, wheel):
    for path in sorted((kernel.project_root() / "notebooks").glob("*.ipynb")):
        spec = dataclasses.replace(read_spec(make_training(tmp_path / "spec")), notebook=str(path))
        if not spec.is_submission:
            notebook = kernel.make_notebook(spec)
            assert len(nbformat.writes(notebook)) < kernel.NOTEBOOK_BYTES
            assert spec.run_folder()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"runs": ["runs/study"]},
            "runs, fusion, ensemble and lungs need a notebook with a parameter `weights`, which train.ipynb does not have",
        ),
        ({"fusion": "fusion.json"}, "runs, fusion, ensemble and lungs need a notebook with a parameter `weights`"),
        ({"lungs": "runs/lungs/fold0"}, "runs, fusion, ensemble and lungs need a notebook with a parameter `weights`"),
        ({"notebook": "notebooks/99_nothing.ipynb"}, r"small\.yaml: notebook: .*99_nothing\.ipynb does not exist"),
        ({"kernel_sources": ["one"]}, "kernel_sources: the slug 'one' has 3 characters, but Kaggle allows 5 to 50"),
        (
            {"model_sources": ["timm/resnext"]},
            "model_sources: 'timm/resnext' is not OWNER/MODEL/FRAMEWORK/VARIATION/VERSION",
        ),
        *(
            ({"model_sources": [source]}, f"model_sources: '{source}' is not OWNER/MODEL/FRAMEWORK/VARIATION/VERSION")
            for source in ("a/b/c/d/latest", "a//c/d/1", "a/b/c/d/1/e", "a/b/c/1")
        ),
        ({"ensemble": "runs/stack"}, "runs, fusion, ensemble and lungs need a notebook with a parameter `weights`"),
        ({"kernel_sources": ["a/b/c"]}, "kernel_sources: 'a/b/c' is neither SLUG .an input of the kernel's owner. nor"),
        ({"dataset_sources": [7]}, r"dataset_sources is \[7\]; expected a list, each item a string"),
        ({"dataset_sources": ["some body/data"], "kernel_sources": ["one/data-set", "two/data-set"]}, "the slug data-set"),
        (
            {"wheels": "mine/wheels-of-all"},
            "the slug 'mine/wheels-of-all' may only contain letters, digits, - and _",
        ),
        ({"wheels": "five5"}, "the slug 'five5' has 5 characters, but Kaggle allows 6 to 50"),
        ({"internet": "yes"}, "internet is 'yes'; expected true or false"),
        ({"kernel_source": []}, "no field 'kernel_source'; it has: .*kernel_sources.*rehearsal.*fusion"),
    ],
)
def test_a_kernel_is_read_strictly(tmp_path, keys, message):
    with pytest.raises(KernelError, match=message):
        read_spec(make_training(tmp_path, **keys))


def test_a_submission_needs_its_competition(tmp_path):
    with pytest.raises(KernelError, match="competition is missing"):
        read_spec(make_submission(tmp_path, competition=""))


SHIPPED = {path.stem: path for path in sorted((kernel.project_root() / "submissions" / "kernels").glob("*.yaml"))}


def find_run_names(spec) -> set[str]:
    """Return the runs that a kernel reads: the first folder of each path among its parameters."""
    parameters = spec.injected_parameters()
    paths = [parameters.get("prepare_run", "prepare")] if "prepare_run" in spec.notebook_parameters() else []
    paths += parameters.get("runs", [])
    paths += [parameters.get("overrides", {}).get("starting_weights", "")]
    paths += [parameters.get("segmenter", ""), parameters.get("lungs_run", "")]
    return {path.split("/")[0] for path in paths if path}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_kernel_builds(name, tmp_path, wheel):
    spec = read_spec(SHIPPED[name], owner="somebody")
    build_kernel(spec, tmp_path / "out", [wheel])
    metadata = json.loads((tmp_path / "out/kernel/kernel-metadata.json").read_text())
    assert metadata["dataset_sources"][0] == "somebody/chest-kit-wheels"
    assert metadata["enable_gpu"] is (spec.notebook[10:12] in ("12", "14", "20", "25", "30", "40"))
    assert not (tmp_path / "out" / "weights").exists()
    for parameters in (spec.injected_parameters(), spec.injected_parameters(rehearsed=True)):
        if "recipe" in parameters:
            name = parameters["recipe"]
            recipe(name, type(RECIPES[name]), **parameters.get("overrides", {}))


def test_the_shipped_kernels_are_a_chain():
    """Each kernel reads exactly the runs of the kernels that it attaches; SIIM's chain starts with NIH's backbone."""
    specs = {spec.slug: spec for spec in (read_spec(path, owner="somebody") for path in SHIPPED.values())}
    run_folders = {slug: spec.run_folder() for slug, spec in specs.items()}
    for spec in specs.values():
        assert {run_folders[slug] for slug in spec.kernel_sources} == find_run_names(spec)
    assert specs["chest-siim-fuse"].kernel_sources == ("chest-siim-prepare", "chest-siim-study", "chest-siim-detector")
    assert specs["chest-nih-backbone"].kernel_sources == ("chest-nih-prepare",)
