"""Rehearsals in Kaggle's image; a fake `docker` runs the container's command in a sandbox."""

import json
import os
import shutil

import pytest

from kitlib.errors import KernelError
from kitlib.kernels.build import build_kernel
from kitlib.kernels.rehearse import rehearse
from kitlib.kernels.sandbox import no_sandbox_reason
from kitlib.kernels.spec import read_spec
from tests.small_docker import install_docker
from tests.small_kernels import make_training, make_wheel

PINNED = f"gcr.io/kaggle-images/python@sha256:{'0a' * 32}"
TRAIN = """
import json, os
import kit_extra
from kitlib.paths import find_run, is_saved_version, runs_root
folder = runs_root() / run_folder
folder.mkdir()
seen = {"at": str(folder), "prepared": (find_run(prepare_run) / "metrics.json").read_text(), "saved": is_saved_version()}
try:
    (find_run(prepare_run) / "new").write_text("x")
except OSError:
    seen["inputs"] = "read-only"
seen |= {"limit": os.environ["KIT_TIME_LIMIT_S"], "own": sorted(set(os.environ) & {"PIP_INDEX_URL"})}
(folder / "metrics.json").write_text(json.dumps(seen | {"extra": kit_extra.ANSWER}))
"""


@pytest.fixture
def kernel(tmp_path):
    """A function that builds a kernel that makes a run; it returns the first three arguments of `rehearse`."""
    inputs, out = tmp_path / "in: 1, 2", tmp_path / "out: 1, 2"  # Docker's options separate by colons or commas
    (inputs / "earlier-kernel" / "prepare").mkdir(parents=True)
    (inputs / "earlier-kernel" / "prepare" / "metrics.json").write_text("prepared")
    wheel = make_wheel(tmp_path / "wheels", "kit_extra", "1.2", modules={"kit_extra.py": "ANSWER = 42\n"})

    def build(**keys):
        keys = {"kernel_sources": ["earlier-kernel"], "accelerator": "none"} | keys
        spec = read_spec(make_training(tmp_path / "spec", TRAIN, **keys))
        build_kernel(spec, out, [wheel])
        return spec, out, inputs

    return build


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The calls of the fake `docker` that comes first on PATH."""
    path = install_docker(tmp_path / "bin", [PINNED])
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_INDEX_URL", "of this machine")
    return path


@pytest.mark.skipif(bool(no_sandbox_reason()), reason=f"no private namespaces here: {no_sandbox_reason()}")
def test_a_kernel_is_rehearsed_in_the_image(kernel, calls):
    result = rehearse(*kernel(docker_image=PINNED), 120, docker=True)
    assert [result.problem, result.faults, result.passed] == ["", (), True]
    seen = json.loads((result.working / "study" / "metrics.json").read_text())
    assert seen == {
        "at": "/kaggle/working/study",
        "prepared": "prepared",
        "saved": False,  # a rehearsal runs as the scored rerun
        "inputs": "read-only",
        "limit": "120",
        "own": [],
        "extra": 42,
    }
    inspect, run, remove = map(json.loads, calls.read_text().splitlines())
    assert inspect == ["image", "inspect", PINNED]
    assert "--network=none" in run and "--gpus=all" not in run
    name = next(option for option in run if option.startswith("--name=")).removeprefix("--name=")
    assert remove == ["rm", "--force", name]


def test_a_missing_image_or_docker_is_an_error(kernel, tmp_path, calls, monkeypatch):
    built = kernel(accelerator="NvidiaTeslaT4")
    with pytest.raises(KernelError, match=r"the Docker image gcr\.io/kaggle-gpu-images/python \(.*docker pull gcr"):
        rehearse(*built, 60, docker=True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(KernelError, match=r"Docker is not installed: .* rehearse without --docker"):
        rehearse(*built, 60, docker=True)
