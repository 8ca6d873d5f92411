import base64
import hashlib
import io
import json
import os
import random
import sys
import zipfile
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.parameterize import parameterize_notebook
from safetensors.numpy import load_file
from small_kernels import PARAMETERS, make_notebook, make_run, make_submission, make_wheel

import kitlib
from kitlib import install_wheels, kernel, kernel_start
from kitlib.bundle import BundleError
from kitlib.kernel import KernelError, build_kernel
from kitlib.kernel_spec import SpecError, read_spec, slug_of
from kitlib.paths import InputNotFound
from kitlib.wheels import WheelError


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
    build_kernel(spec, tmp_path / "first", [wheel])
    random.seed(99)
    build_kernel(spec, tmp_path / "second", [wheel])
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert set(contents(tmp_path / "first")) == {
        "kernel/kernel-metadata.json",
        "kernel/small-test-kernel.ipynb",
        "wheels/dataset-metadata.json",
        "wheels/kit_extra-1.2-py3-none-any.whl",
        "weights/dataset-metadata.json",
        "weights/effnet-fold0/model.json",
        "weights/effnet-fold0/weights.safetensors",
        "weights/weights.json",
    }


def test_kernel_metadata_says_everything_that_kaggle_would_otherwise_guess(tmp_path, wheel):
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
        "dataset_sources": ["somebody/small-test-kernel-weights", "somebody/small-test-kernel-wheels"],
        "competition_sources": ["siim-covid19-detection"],
        "kernel_sources": [],
        "model_sources": [],
        "machine_shape": "NvidiaTeslaT4",
    }


def test_a_kernel_without_accelerator_asks_for_none(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path, accelerator="none")), tmp_path / "out", [wheel])
    metadata = json.loads((tmp_path / "out/kernel/kernel-metadata.json").read_text())
    assert metadata["enable_gpu"] is False
    assert metadata["enable_internet"] is False
    assert "machine_shape" not in metadata


@pytest.mark.parametrize("word", ["weights", "wheels"])
def test_dataset_metadata_has_one_licence(tmp_path, wheel, word):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    assert json.loads((tmp_path / f"out/{word}/dataset-metadata.json").read_text()) == {
        "title": f"Small test kernel {word}",
        "id": f"somebody/small-test-kernel-{word}",
        "licenses": [{"name": "other"}],
    }


def test_parameters_are_injected_where_and_as_papermill_does(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path, "print(batch_size)", parameters={"batch_size": 4}, time_limit_hours=2))
    build_kernel(spec, tmp_path / "out", [wheel])
    cells = built_notebook(tmp_path / "out").cells
    values = {"competition": "siim-covid19-detection", "weights": "small-test-kernel-weights"}
    values |= {"wheels": "small-test-kernel-wheels", "time_limit_s": 7200.0}
    by_papermill = parameterize_notebook(papermill.iorw.load_notebook_node(spec.notebook), values | {"batch_size": 4})
    assert [cell.source for cell in cells[1:]] == [cell.source for cell in by_papermill.cells]
    assert cells[3].metadata.tags == ["injected-parameters"]
    assert cells[2].source == PARAMETERS


def test_the_library_travels_whole(tmp_path, wheel, monkeypatch):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    packed = built_notebook(tmp_path / "out").cells[0].source.split('"""')[-2]
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(packed))) as opened:
        names = opened.namelist()
    sources = Path(kitlib.__file__).parent
    assert names == sorted(f"kitlib/{path.name}" for path in sources.glob("*.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("KIT_ROOT", "PYTHONPATH", "KIT_STARTED"):
        monkeypatch.setenv(name, "")
    folder = kernel_start.start_kernel(packed)
    assert all((folder / name).read_bytes() == (sources.parent / name).read_bytes() for name in names)
    assert [sys.path[0], os.environ["KIT_ROOT"], os.environ["PYTHONPATH"]] == [str(folder)] * 3


def test_weights_come_in_order_of_value_and_unharmed(tmp_path, wheel):
    runs = [make_run(tmp_path / "runs" / f"study{fold}", fold=fold) for fold in (0, 1)]
    best = make_run(tmp_path / "runs" / "detector", "yolo11s", 3, "yolo")
    (tmp_path / "fusion.json").write_text('{"power": 0.5}')
    spec = make_submission(
        tmp_path / "spec", runs=[str(best), str(runs[0].parent / "study*"), str(best)], fusion=str(tmp_path / "fusion.json")
    )
    build_kernel(read_spec(spec), tmp_path / "out", [wheel])
    listed = json.loads((tmp_path / "out/weights/weights.json").read_text())["bundles"]
    assert [(entry["folder"], entry["kind"], entry["family"], entry["fold"]) for entry in listed] == [
        ("yolo11s-fold3", "detector", "yolo", 3),
        ("effnet-fold0", "study", "study", 0),
        ("effnet-fold1", "study", "study", 1),
    ]
    for entry in listed:
        weights = tmp_path / "out/weights" / entry["folder"] / "weights.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry["weights_sha256"]
        assert load_file(weights)["weight"].tolist() == [[entry["fold"]] * 3] * 2
    assert (tmp_path / "out/weights/fusion.json").read_text() == '{"power": 0.5}'


def test_a_damaged_bundle_is_refused(tmp_path, wheel):
    run = make_run(tmp_path / "run")
    weights = run / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match="SHA-256"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=[str(run)])), tmp_path / "out", [wheel])


def test_a_backbone_is_no_model_of_a_submission(tmp_path, wheel):
    runs = [str(make_run(tmp_path / "nih", family="findings"))]
    with pytest.raises(SpecError, match="nih/bundle knows findings, which no submission asks for"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs)), tmp_path / "out", [wheel])


def test_two_bundles_of_one_name_are_refused(tmp_path, wheel):
    runs = [str(make_run(tmp_path / name)) for name in ("one", "two")]
    with pytest.raises(SpecError, match="two/bundle is a second effnet-fold0"):
        build_kernel(read_spec(make_submission(tmp_path / "spec", runs=runs)), tmp_path / "out", [wheel])


def test_an_unknown_parameter_is_refused_with_the_valid_ones(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path, parameters={"batchsize": 4}))
    valid = "competition, weights, wheels, time_limit_s, batch_size"
    with pytest.raises(SpecError, match=f"no parameter batchsize; it has: {valid}"):
        build_kernel(spec, tmp_path / "out", [wheel])


def test_a_parameter_that_has_a_key_of_its_own_is_refused(tmp_path, wheel):
    spec = read_spec(make_submission(tmp_path, parameters={"time_limit_s": 4}))
    with pytest.raises(SpecError, match="time_limit_s come from the submission's own keys"):
        build_kernel(spec, tmp_path / "out", [wheel])


def test_a_notebook_over_a_megabyte_is_refused_and_the_last_good_build_stays(tmp_path, wheel):
    build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])
    before = contents(tmp_path / "out")
    with pytest.raises(KernelError, match=r"small-test-kernel\.ipynb has 1,\d{3},\d{3} bytes, Kaggle takes 1,000,000"):
        build_kernel(read_spec(make_submission(tmp_path, "#" * 1_000_000)), tmp_path / "out", [wheel])
    assert contents(tmp_path / "out") == before


def test_a_dataset_over_the_limit_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(kernel, "DATASET_BYTES", 100)
    with pytest.raises(KernelError, match=r"weights dataset has .* bytes, Kaggle takes 100"):
        build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])


def test_wheels_that_do_not_suit_the_image_are_refused(tmp_path):
    wheel = make_wheel(tmp_path, "kit_extra", "1.2", ["pandas>=3"])
    with pytest.raises(WheelError, match=r"kit-extra wants pandas>=3, the image has pandas 2\.3\.3"):
        build_kernel(read_spec(make_submission(tmp_path)), tmp_path / "out", [wheel])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"titel": "x"},
            "no field 'titel'; it has: title, slug, owner, competition, accelerator, time_limit_hours",
        ),
        ({"title": None}, "title is missing"),
        ({"owner": None}, "owner is missing"),
        ({"runs": []}, "runs is missing"),
        ({"slug": "another-slug"}, "slug is 'another-slug', but Kaggle makes 'small-test-kernel' of the title"),
        ({"title": "A " * 22 + "end", "slug": "a-" * 22 + "end"}, "'.*weights' has 55 characters, Kaggle wants 6 to 50"),
        ({"title": "Four", "slug": "four"}, "'Four' has 4 characters, Kaggle wants 6 to 50"),
        ({"accelerator": "NvidiaTeslaP100"}, "accelerator 'NvidiaTeslaP100' is none of NvidiaTeslaT4, none"),
        ({"owner": "Some Body"}, "owner 'Some Body' is no Kaggle user name"),
        ({"time_limit_hours": 13}, r"time_limit_hours is 13\.0"),
        ({"time_limit_hours": "nine"}, "time_limit_hours wants float, got 'nine'"),
        ({"runs": [1, 2]}, "runs wants paths"),
    ],
)
def test_a_submission_is_read_strictly(tmp_path, keys, message):
    with pytest.raises(SpecError, match=message):
        read_spec(make_submission(tmp_path, **keys))


def test_a_missing_submission_lists_what_there_is(tmp_path):
    make_submission(tmp_path)
    with pytest.raises(SpecError, match=r"no submission .*other\.yaml; there are: .*small\.yaml"):
        read_spec(tmp_path / "other.yaml")


def test_runs_that_match_nothing_are_refused(tmp_path):
    spec = read_spec(make_submission(tmp_path, runs=[str(tmp_path / "nothing*")]))
    with pytest.raises(SpecError, match=r"nothing\*' names no folder with a `bundle`"):
        spec.bundles()


def test_who_owns_the_kernel(tmp_path, monkeypatch):
    path = make_submission(tmp_path)
    assert read_spec(path).owner == "somebody"
    monkeypatch.setenv("KAGGLE_USERNAME", "from-environment")
    assert read_spec(path).owner == "from-environment"
    assert read_spec(path, owner="from-call").owner == "from-call"


def test_slugs_are_made_as_kaggle_makes_them():
    assert slug_of("SIIM COVID-19: Detection (v2)") == "siim-covid-19-detection-v2"


def test_a_wheel_dataset_that_is_not_attached_is_named_with_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "input" / "other").mkdir(parents=True)
    (tmp_path / "working").mkdir()
    with pytest.raises(InputNotFound, match=r"no input 'extra-wheels' below .*input(.|\n)*\n  other"):
        install_wheels.install_wheels("extra-wheels")


def test_wheels_that_are_installed_already_cost_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    make_wheel(tmp_path / "input" / "extra-wheels", "pydicom", "3.0.2")
    monkeypatch.setattr(install_wheels.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    assert install_wheels.install_wheels("extra-wheels") == []


def test_a_notebook_without_the_common_parameters_is_refused(tmp_path, wheel):
    path = make_submission(tmp_path)
    make_notebook(tmp_path / "submit.ipynb", parameters="competition = ''")
    with pytest.raises(SpecError, match="no parameter time_limit_s, weights, wheels; it has: competition"):
        build_kernel(read_spec(path), tmp_path / "out", [wheel])
