import base64
import csv
import importlib.metadata
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import timm
import yaml
from typer.testing import CliRunner

import build_kernel as command_line
from kitlib.atomic import write_json
from kitlib.bundle import save_bundle
from kitlib.errors import KernelError
from kitlib.kernels import kaggle_environment, launch, sandbox
from kitlib.kernels import rehearse as rehearsals
from kitlib.kernels.build import build_kernel
from kitlib.kernels.launch import papermill_options
from kitlib.kernels.rehearse import rehearse, run_with_limit
from kitlib.kernels.sandbox import no_sandbox_reason
from kitlib.kernels.spec import read_spec
from kitlib.kernels.wheels import INFERENCE, image_pins
from kitlib.phantoms.siim import write_competition
from tests import PROJECT
from tests.small_kernels import installed_wheel, make_submission, make_training, make_wheel

isolated = pytest.mark.skipif(bool(no_sandbox_reason()), reason=f"no private namespaces here: {no_sandbox_reason()}")

SUBMISSION = "id,PredictionString\na_study,negative 1 0 0 1 1\nb_image,none 1 0 0 1 1\n"
USAGE = [{"bundle": "effnet-fold0", "predicted": 1, "readable": 1}]
WRITE = f"""
import shutil
from kitlib.atomic import write_json
from kitlib.paths import find_input, runs_root
shutil.copy(find_input(competition) / "sample_submission.csv", runs_root() / "submission.csv")
write_json(runs_root() / "usage.json", {USAGE})
"""
# A name that no file of this machine has: it would be taken for the kernel's.
NEW_NAME = f"new-{uuid.uuid4().hex}"
# Tries each of `attempts` in the kernel and writes the results as JSON into the output folder.
PROBE = """
import importlib, json, os, socket, sys
from pathlib import Path
from kitlib.paths import find_input, runs_root

def attempt(action):
    try:
        return str(action())
    except Exception as error:
        return type(error).__name__

attempts = {
    "network": lambda: socket.create_connection(("1.1.1.1", 53), timeout=5),
    "loopback": lambda: socket.create_server(("127.0.0.1", 0)) and "up",
    "write_input": lambda: (find_input(competition) / "new").write_text("x"),
    "write_machine": lambda: Path("/usr/new").write_text("x"),
    "write_image": lambda: Path(importlib.import_module("yaml").__file__).with_name("new").write_text("x"),
    "write_temporary": lambda: Path("/tmp", NEW_NAME).write_text("x"),
    "missing_wheel": lambda: importlib.import_module("ultralytics"),
    "attached_wheel": lambda: importlib.import_module("kit_extra").ANSWER,
    "library": lambda: importlib.import_module("kitlib").__file__,
    "weights": lambda: sorted(path.name for path in find_input(weights).iterdir()),
    "inputs": lambda: sorted(path.name for path in Path("/kaggle/input").iterdir()),
    "project": lambda: os.listdir(PROJECT),
    "temporary": lambda: os.listdir("/tmp"),
    "first_output": lambda: os.listdir(runs_root()),
}
seen = {name: attempt(action) for name, action in attempts.items()} | {"environment": dict(os.environ), "pid": os.getpid()}
(runs_root() / "seen.json").write_text(json.dumps(seen))
print("looked around")
"""
KERNELS = PROJECT / "submissions" / "kernels"


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    """Inputs and truth of a competition with one study and one image."""
    folder = tmp_path_factory.mktemp("competition")
    (folder / "inputs" / "siim-covid19-detection").mkdir(parents=True)
    (folder / "inputs" / "siim-covid19-detection" / "sample_submission.csv").write_text(SUBMISSION)
    (folder / "truth").mkdir()
    classes = "Negative for Pneumonia,Typical Appearance,Indeterminate Appearance,Atypical Appearance"
    (folder / "truth" / "train_study_level.csv").write_text(f"id,{classes}\na_study,1,0,0,0\n")
    (folder / "truth" / "train_image_level.csv").write_text("id,boxes,label,StudyInstanceUID\nb_image,,none 1 0 0 1 1,a\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return make_wheel(tmp_path_factory.mktemp("wheels"), "kit_extra", "1.2", modules={"kit_extra.py": "ANSWER = 42\n"})


def built(folder, wheel, *cells, make=make_submission, **keys):
    """Build a kernel; return its spec and the folder of the build: the first two arguments of `rehearse`."""
    spec = read_spec(make(folder, *cells, **keys))
    build_kernel(spec, folder / "out", [wheel])
    return spec, folder / "out"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, competition, wheel):
    """Build and rehearse a kernel that runs PROBE, by the command line, with disturbing settings: result and folder."""
    folder = tmp_path_factory.mktemp("rehearsed")
    submission = make_submission(folder, f"PROJECT = {str(PROJECT)!r}\nNEW_NAME = {NEW_NAME!r}\n{PROBE}", WRITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "kaggle_wheels", lambda _: [wheel])
        for name in ("PIP_INDEX_URL", "HF_TOKEN", "PYTHONSTARTUP"):
            patch.setenv(name, "of this machine")
        for name in [name for name in os.environ if name.startswith("KAGGLE_")]:
            patch.delenv(name)
        # Importing Kaggle's client would sign in and, without a token, exit the program.
        patch.setenv("HOME", str(folder / "home"))
        patch.setitem(sys.modules, "kaggle", None)
        app = command_line.typer.Typer()
        app.command()(command_line.main)
        arguments = [str(submission), "--out", str(folder / "out"), "--rehearse", "--inputs", str(competition / "inputs")]
        arguments += ["--truth", str(competition / "truth"), "--time-limit", "120"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result, folder / "out"


@pytest.fixture(scope="module")
def seen(rehearsed):
    return json.loads((rehearsed[1] / "working" / "seen.json").read_text())


def test_a_kernel_that_writes_a_valid_file_in_time_passes(rehearsed):
    result, out = rehearsed
    assert result.exit_code == 0, result.output
    assert (out / "working" / "submission.csv").read_text() == SUBMISSION
    assert "looked around" in result.output
    assert "looked around" in (out / "rehearsal.log").read_text()
    assert "looked around" in (out / "rehearsal.ipynb").read_text()


def test_the_rehearsal_is_scored_if_the_truth_is_given(rehearsed):
    # One correct negative and one correct none; the truth has no other class: the mean of two APs of 1.
    assert "1.0000" in next(line for line in rehearsed[0].output.splitlines() if "score" in line)


def test_temporary_files_are_removed(rehearsed):
    assert sorted(path.name for path in rehearsed[1].iterdir()) == [
        "kernel",
        "rehearsal.ipynb",
        "rehearsal.log",
        "weights",
        "wheels",
        "working",
    ]


def test_a_forgotten_wheel_is_noticed(seen):
    importlib.metadata.version("ultralytics")  # installed on the machine that rehearses
    assert seen["missing_wheel"] == "ModuleNotFoundError"


def test_an_attached_wheel_is_installed_without_network(seen):
    assert seen["attached_wheel"] == "42"


def test_the_kernel_runs_its_own_copy_of_the_library(seen):
    assert seen["library"].startswith("/tmp/kit-")


def test_the_kernel_does_not_get_this_machines_settings(seen):
    assert not {"PIP_INDEX_URL", "HF_TOKEN", "PYTHONSTARTUP"} & set(seen["environment"])
    assert seen["environment"]["KAGGLE_KERNEL_RUN_TYPE"] == "Batch"
    assert seen["environment"]["KIT_TIME_LIMIT_S"] == "120"


def test_the_output_folder_is_empty_at_first(seen):
    assert seen["first_output"] == "[]"


def test_the_datasets_are_attached(seen):
    assert seen["weights"] == "['dataset-metadata.json', 'effnet-fold0', 'weights.json']"


@isolated
def test_there_is_no_network_but_the_loopback(seen):
    assert seen["network"] == "OSError"
    assert seen["loopback"] == "up"


@isolated
def test_inputs_and_machine_are_read_only(seen):
    assert [seen[name] for name in ("write_input", "write_machine", "write_image")] == ["OSError"] * 3


@isolated
def test_input_holds_the_competition_and_the_kernels_datasets_only(seen):
    assert seen["inputs"] == "['siim-covid19-detection', 'small-test-kernel-weights', 'small-test-kernel-wheels']"


@isolated
def test_the_project_and_the_temporary_files_of_this_machine_are_hidden(seen):
    # The project's folder is empty, or missing if the project is below /tmp, which is empty in the sandbox.
    assert seen["project"] in ("[]", "FileNotFoundError")
    assert f"'{PROJECT.name}'" not in seen["temporary"]  # quoted, because "kit" is part of other names in the list
    assert seen["write_temporary"] == "1"
    assert not Path("/tmp", NEW_NAME).exists()


def test_without_namespaces_the_kernel_runs_unisolated_with_a_warning(tmp_path, competition, wheel, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_find_unshare", lambda: (None, "not permitted"))
    kernel = built(tmp_path, wheel, WRITE, "from kitlib.paths import find_input\nassert find_input(weights)")
    with caplog.at_level(logging.WARNING):
        result = rehearse(*kernel, competition / "inputs", 120)
    assert result.passed
    assert result.not_isolated == "not permitted"
    assert "could reach the network, write into its inputs and see this machine's files" in caplog.text


def test_a_command_is_run_with_its_own_variables_and_its_output_kept(tmp_path):
    script = """
read line || echo no input
echo $OWN $KIT_TIME_LIMIT_S ${KIT_STARTED:+started} ${HOME:-homeless}
echo error >&2
pwd
set -- $(cat /proc/$$/stat); [ $6 = $$ ] && echo own session
printf 'no UTF-8: \\377\\n'
exit 3
"""
    lines, threads = [], set(threading.enumerate())
    code, seconds = run_with_limit(["sh", "-c", script], {"OWN": "own"}, tmp_path, 60.0, tmp_path / "log", lines.append)
    assert code == 3 and 0 <= seconds < 60
    assert lines[:-1] == ["no input", "own 60 started homeless", "error", str(tmp_path), "own session"]
    assert lines[-1].startswith("no UTF-8: ") and (tmp_path / "log").read_text(encoding="utf-8").splitlines() == lines
    # A timer that still runs would kill another process that has got the same number.
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
        assert not thread.is_alive()


def test_nobody_has_to_read_the_output_of_a_command(tmp_path):
    assert run_with_limit(["echo", "a"], {}, tmp_path, 60.0, tmp_path / "log", None)[0] == 0
    assert (tmp_path / "log").read_text() == "a\n"


@pytest.mark.parametrize("command", [["sh", "-c"], pytest.param(["sandbox"], marks=isolated)])
def test_at_the_limit_every_process_is_stopped(tmp_path, command):
    # A duration that no other process uses, by which the test finds its own.
    mark = f"{1000 + time.time_ns() % 10**9 / 10**6}"
    script = f"echo begun; setsid sleep {mark} & sleep {mark}"
    if command == ["sandbox"]:
        (tmp_path / "root").mkdir()
        command = sandbox.sandbox_command(["sh", "-c", script], tmp_path / "root", {}, {})
    else:
        command = [*command, script]
    lines = []
    code, seconds = run_with_limit(command, dict(os.environ), tmp_path, 3.0, tmp_path / "log", lines.append)
    assert 3.0 <= seconds < 20
    assert code != 0
    assert lines == ["begun"]
    assert not [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]


@pytest.mark.parametrize(
    ("submission", "exit_code", "seconds", "problem", "fault"),
    [
        (SUBMISSION, 0, 59.0, "", ""),
        (SUBMISSION, 0, 61.0, "the time limit was reached", ""),
        (SUBMISSION, 138, 1.0, "papermill's exit code is 138", ""),  # a killed kernel, all cells "completed"
        (SUBMISSION.replace("b_image", "c_image"), 0, 1.0, "", "b_image: missing id"),
        (None, 0, 1.0, "", "submission.csv does not exist in"),
    ],
    ids=["good", "late", "killed", "invalid", "no file"],
)
def test_how_a_rehearsal_is_judged(
    tmp_path, competition, wheel, monkeypatch, submission, exit_code, seconds, problem, fault
):
    """The kernel is replaced by a function that writes its output."""

    def run(_command, _environment, working, *_):
        if submission:
            (working / "submission.csv").write_text(submission)
        write_json(working / "usage.json", USAGE)
        (working.parent / "rehearsal.ipynb").write_text('{"cells": []}')
        return exit_code, seconds

    monkeypatch.setattr(rehearsals, "run_with_limit", run)
    monkeypatch.setattr(rehearsals, "link_kaggle_packages", lambda: tmp_path)
    result = rehearse(*built(tmp_path, wheel), competition / "inputs", 60, competition / "truth")
    assert result.passed is (not problem and not fault)
    assert result.problem == problem
    assert fault in " ".join(result.faults)
    assert bool(result.faults) is bool(fault)
    # A valid file is scored, even after the time limit.
    assert result.scores is None if fault else result.scores["score"] == 1.0


@pytest.mark.parametrize(
    ("limit_s", "imports", "explained"),
    [(0.01, "json", True), (100.0, "json", False), (1000.0, "json", False), (0.01, "no_such_module", False)],
)
def test_a_limit_shorter_than_the_start_is_explained(tmp_path, competition, wheel, monkeypatch, limit_s, imports, explained):
    monkeypatch.setattr(rehearsals, "IMPORTS", f"import {imports}")
    monkeypatch.setattr(rehearsals, "run_with_limit", lambda *_: (137, limit_s + 0.1))
    monkeypatch.setattr(rehearsals, "link_kaggle_packages", lambda: tmp_path)
    problem = rehearse(*built(tmp_path, wheel), competition / "inputs", limit_s).problem
    assert problem.startswith("the time limit was reached")
    found = re.search(r"; no limit below about (\d+) s can hold on this machine, .* alone takes (\d+\.\d) s$", problem)
    assert bool(found) is explained
    if found:  # a kernel takes longer to start than its imports
        limit_s, imports_s = int(found[1]), float(found[2])
        assert imports_s <= limit_s <= 2 * imports_s + 1


@pytest.mark.parametrize(
    ("usage", "fault"),
    [
        ([{"bundle": "effnet-fold0", "predicted": 9, "readable": 10}], "effnet-fold0 predicted 9 of 10 readable files"),
        ([{"bundle": "effnet-fold0", "predicted": 0, "readable": 0}], "effnet-fold0 predicted 0 of 0 readable files"),
        ([{"bundle": "other-fold0", "predicted": 10, "readable": 10}], "effnet-fold0 predicted 0 of 0 readable files"),
        ([], "effnet-fold0 predicted 0 of 0 readable files"),
        (None, "it is unknown which of the models effnet-fold0 were used"),
        (
            [{"bundle": "effnet-fold0", "readable": 10}],
            "usage.json is damaged (KeyError('predicted')), so it is unknown which",
        ),
        ([{"bundle": "effnet-fold0", "predicted": None, "readable": 10}], "usage.json is damaged (TypeError("),
        ({"bundle": "effnet-fold0"}, "usage.json is damaged (TypeError("),
    ],
)
def test_a_valid_file_without_a_models_predictions_does_not_pass(tmp_path, competition, wheel, monkeypatch, usage, fault):
    def run(_command, _environment, working, *_):
        (working / "submission.csv").write_text(SUBMISSION)
        if usage is not None:
            write_json(working / "usage.json", usage)
        (working.parent / "rehearsal.ipynb").write_text('{"cells": []}')
        return 0, 1.0

    monkeypatch.setattr(rehearsals, "run_with_limit", run)
    monkeypatch.setattr(rehearsals, "link_kaggle_packages", lambda: tmp_path)
    kernel = *built(tmp_path, wheel), competition / "inputs", 60, competition / "truth"
    result = rehearse(*kernel)
    assert not result.passed and fault in " ".join(result.faults) and result.scores["score"] == 1.0
    assert rehearse(*kernel, allow_placeholders=True).passed


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """A function that prepares a rehearsal; it returns the folders that the kernel gets, by their path below /kaggle/input.

    The kernel itself is not started.
    """

    def prepared(spec, out, inputs, **keys):
        notebooks = []
        monkeypatch.setattr(rehearsals, "stand_in_command", lambda notebook, _: notebooks.append(notebook) or ([], {}))
        monkeypatch.setattr(rehearsals, "link_kaggle_packages", lambda: tmp_path)
        monkeypatch.setattr(rehearsals, "run_with_limit", lambda *_: notebooks.append(read(notebooks[0])) or (1, 0.0))
        rehearse(spec, out, inputs, 60, **keys)
        return notebooks[1]

    def read(notebook):
        return {at: (folder, sorted(path.name for path in folder.iterdir())) for at, folder in notebook.inputs.items()}

    return prepared


@pytest.mark.parametrize(
    ("layout", "mount_points"),
    [
        ("plain", ["siim-covid19-detection", "pictures", "weights-of-me", "resnext/pytorch/small/1", "earlier-kernel"]),
        (
            "nested",
            [
                "competitions/siim-covid19-detection",
                "datasets/other/pictures",
                "datasets/somebody/weights-of-me",
                "models/timm/resnext/pytorch/small/1",
                "notebooks/somebody/earlier-kernel",
            ],
        ),
    ],
)
def test_inputs_are_mounted_where_kaggle_mounts_them(tmp_path, competition, wheel, prepare, layout, mount_points):
    """At their slug, or at their kind, owner and slug: both occur on Kaggle."""
    keys = {"dataset_sources": ["other/pictures", "weights-of-me"], "kernel_sources": ["earlier-kernel"]}
    kernel = built(tmp_path / "kernel", wheel, **keys, model_sources=["timm/resnext/pytorch/small/1"])
    inputs = tmp_path / "inputs"
    folders = ["siim-covid19-detection", "pictures", "weights-of-me", "resnext/pytorch/small/1", "earlier-kernel"]
    for folder in folders[1:]:
        (inputs / folder).mkdir(parents=True)
    (inputs / folders[0]).symlink_to(competition / "inputs" / folders[0])
    expected = {at: inputs / folder for at, folder in zip(mount_points, folders, strict=True)}
    prefix = "datasets/somebody/" if layout == "nested" else ""
    expected |= {f"{prefix}small-test-kernel-{part}": kernel[1] / part for part in ("weights", "wheels")}
    assert {at: folder for at, (folder, _) in prepare(*kernel, inputs, layout=layout).items()} == expected


def test_wheels_of_another_python_are_replaced_by_wheels_of_the_same_versions(tmp_path, wheel, prepare, monkeypatch):
    spec, out = built(tmp_path / "kernel", wheel, make=make_training)
    make_wheel(out / "wheels", "the_two", "2.5", tag="cp27-cp27mu-manylinux1_x86_64")
    own, asked = [make_wheel(tmp_path / "own", name, "1.2") for name in ("kit_extra", "the_two")], []
    monkeypatch.setattr(rehearsals, "local_wheels", lambda pins: asked.append(pins) or own)
    (tmp_path / "inputs").mkdir()
    ((folder, files),) = prepare(spec, out, tmp_path / "inputs").values()
    assert asked == [{"kit-extra": "1.2", "the-two": "2.5"}]
    assert files == [path.name for path in own]
    assert folder != out / "wheels" and not folder.exists()  # it was temporary


def test_a_rehearsal_sets_all_parameters_of_the_kernel(tmp_path):
    """papermill replaces the whole cell of injected parameters, if there are any for rehearsals."""
    keys = {"parameters": {"prepare_run": "siim", "epochs": 30}}
    assert papermill_options(read_spec(make_training(tmp_path, **keys))) == []
    option, text = papermill_options(read_spec(make_training(tmp_path, **keys, rehearsal={"epochs": 1})))
    assert option == "--parameters_base64"
    assert yaml.safe_load(base64.b64decode(text)) == {"prepare_run": "siim", "epochs": 1}


def test_an_unisolated_kernel_gets_links_to_its_inputs_and_only_the_gpus_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "no_sandbox_reason", lambda: "not permitted")
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "PYTHONPATH", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "set")
    (tmp_path / "one").mkdir()
    files = {"path": tmp_path / "kernel.ipynb", "executed": tmp_path / "executed.ipynb", "working": tmp_path / "out"}
    inputs, temporary = {"data": tmp_path / "one", "notebooks/me/earlier": tmp_path / "one"}, tmp_path / "temporary"
    notebook = launch.BuiltNotebook(**files, inputs=inputs, options=["--option"], temporary_folder=temporary)
    command, environment = launch.stand_in_command(notebook, tmp_path / "packages")
    root = Path(environment["KIT_KAGGLE_ROOT"])
    assert {name: (root / "input" / name).resolve() for name in inputs} == {name: tmp_path / "one" for name in inputs}
    assert (root / "working").resolve() == tmp_path / "out"
    assert command[1:5] == ["-m", "papermill", str(files["path"]), str(files["executed"])] and command[-1] == "--option"
    assert Path(command[0]).is_relative_to(temporary) and environment["PATH"].startswith(f"{Path(command[0]).parent}:")
    assert environment["CUDA_VISIBLE_DEVICES"] == "set"
    assert not {"HF_TOKEN", "PYTHONPATH", "PIP_INDEX_URL"} & set(environment)
    for folder in (environment["HOME"], environment["TMPDIR"]):
        assert Path(folder).is_dir() and Path(folder).is_relative_to(temporary)


@isolated
def test_a_sandbox_has_the_folders_of_kaggle_and_none_of_this_machines(tmp_path):
    files = {"path": tmp_path / "kernel.ipynb", "executed": tmp_path / "executed.ipynb", "working": tmp_path / "out"}
    notebook = launch.BuiltNotebook(**files, inputs={"a": tmp_path}, options=[], temporary_folder=tmp_path / "temporary")
    command, environment = launch.stand_in_command(notebook, tmp_path / "packages")
    plan = json.loads(command[-1])
    # If this machine's /kaggle were not hidden, the kernel would see its inputs, and the sandbox would make folders in it.
    assert plan["hidden"] == [str(PROJECT), "/kaggle"]
    folders = {"/image": tmp_path / "packages", "/rehearsal/kernel.ipynb": files["path"], "/kaggle/input/a": tmp_path}
    assert plan["read_only"] == {path: str(folder) for path, folder in folders.items()}
    writable = plan["writable"]
    assert set(writable) == {"/kaggle/working", "/rehearsal/executed.ipynb", "/environment", "/tmp"}
    assert (plan["folder"], writable["/kaggle/working"]) == ("/kaggle/working", str(files["working"]))
    assert (environment["HOME"], plan["command"][0]) == ("/tmp/home", "/environment/bin/python")
    assert all(Path(folder).is_dir() for folder in (plan["root"], writable["/tmp"], writable["/environment"]))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_container_gets_the_gpus_only_if_the_kernel_uses_them(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(launch.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    files = {"path": tmp_path / "kernel.ipynb", "executed": tmp_path / "executed.ipynb", "working": tmp_path / "out"}
    notebook = launch.BuiltNotebook(**files, inputs={"a:b": tmp_path / "a, b"}, options=[], temporary_folder=tmp_path)
    command, _ = launch.docker_command(notebook, "some/image", "its-name", gpu)
    options = command[: command.index("some/image")]
    assert ("--gpus=all" in options) is gpu and {"--network=none", "--pull=never", "--rm", "--name=its-name"} <= set(options)
    mounts = [next(csv.reader([value])) for option, value in itertools.pairwise(options) if option == "--mount"]
    read_only = {row[2].removeprefix("target=") for row in mounts if row[3:] == ["readonly"]}
    assert read_only == {"/kaggle/input/a:b", "/rehearsal/kernel.ipynb"}
    assert ["type=bind", f"source={tmp_path / 'a, b'}", "target=/kaggle/input/a:b", "readonly"] in mounts


@pytest.mark.parametrize("of_another_user", [True, False])
def test_files_of_another_user_in_a_container_become_those_of_this_user(tmp_path, monkeypatch, of_another_user):
    commands, user = [], os.getuid() + of_another_user
    monkeypatch.setattr(launch.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(launch.os, "getuid", lambda: user)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    launch.end_container("its-name", "some/image", tmp_path)
    ended, *changed = commands
    assert ended == ["docker", "rm", "--force", "its-name"] and len(changed) == of_another_user
    for command in changed:
        assert command[-5:] == ["some/image", "chown", "--recursive", f"{user}:{os.getgid()}", "/kaggle/working"]
        assert {"--rm", "--network=none", f"type=bind,source={tmp_path},target=/kaggle/working"} <= set(command)


@pytest.mark.parametrize("internet", [True, False])
def test_a_kernel_with_internet_is_rehearsed_without_and_told_so(tmp_path, wheel, prepare, caplog, internet):
    kernel = built(tmp_path / "kernel", wheel, make=make_training, internet=internet)
    (tmp_path / "inputs").mkdir()
    prepare(*kernel, tmp_path / "inputs")
    assert ("On Kaggle this kernel has internet access" in caplog.text) is internet


def test_a_kernel_that_was_not_built_is_not_rehearsed(tmp_path):
    with pytest.raises(KernelError, match=r"kernel-metadata\.json does not exist; build the kernel first"):
        rehearse(read_spec(make_training(tmp_path)), tmp_path / "out", tmp_path, 60)


@isolated
def test_a_sandbox_mounts_files_and_folders_anywhere_and_keeps_python(tmp_path):
    for name in ("root", "writable", "folder", "hidden"):
        (tmp_path / name).mkdir()
    for name in ("file.txt", "folder/file.txt"):
        (tmp_path / name).write_text(name)
    code = """
import os, shutil, sys
assert open("/new/place/a.txt").read() == "file.txt" and open("/other/new/place/file.txt").read() == "folder/file.txt"
assert not os.path.exists(sys.argv[1]) or os.listdir(sys.argv[1]) == []
for path in ("/new/place/a.txt", "/other/new/place/more", "/new/more"):
    try:
        open(path, "w")
    except OSError:
        pass
    else:
        raise AssertionError(path)
shutil.copy("/new/place/a.txt", "copy.txt")
"""
    (tmp_path / "hidden" / "secret").write_text("secret")
    command = sandbox.sandbox_command(
        # Python's own folder is hidden too, as it is if it lies in the project.
        [os.path.realpath(sys.executable), "-I", "-c", code, str(tmp_path / "hidden")],
        tmp_path / "root",
        read_only={"/new/place/a.txt": tmp_path / "file.txt", "/other/new/place": tmp_path / "folder"},
        writable={"/out/put": tmp_path / "writable"},
        hidden=[sys.base_prefix, tmp_path / "hidden"],
        folder="/out/put",
    )
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert (tmp_path / "writable" / "copy.txt").read_text() == "file.txt"


def test_inputs_without_the_competition_are_refused(tmp_path, wheel):
    kernel = built(tmp_path, wheel)
    (tmp_path / "inputs").mkdir()
    with pytest.raises(KernelError, match=r"inputs .* are missing: .*siim-covid19-detection, for .* in competition_sources"):
        rehearse(*kernel, tmp_path / "inputs", 60)
    (tmp_path / "inputs" / "siim-covid19-detection").mkdir()
    with pytest.raises(KernelError, match=r"siim-covid19-detection has neither ids in sample_submission\.csv"):
        rehearse(*kernel, tmp_path / "inputs", 60)


TRAIN = """
import json
from kitlib.paths import find_run, runs_root
import kit_extra
folder = runs_root() / run_folder
folder.mkdir()
(folder / "record.json").write_text("{}")
seen = {"prepared": (find_run(prepare_run) / "metrics.json").read_text(), "at": str(find_run(prepare_run)), "epochs": epochs}
seen["inputs"] = sorted(path.name for path in find_run(prepare_run).parent.parent.iterdir())
(folder / "seen.json").write_text(json.dumps(seen | {"extra": kit_extra.ANSWER}))
"""
FINISH = '(folder / "metrics.json").write_text("{}")'


@pytest.fixture
def prepared(tmp_path):
    """Inputs: the output of a kernel that prepared a run, and an input that the kernel does not name."""
    (tmp_path / "inputs" / "earlier-kernel" / "prepare").mkdir(parents=True)
    (tmp_path / "inputs" / "earlier-kernel" / "prepare" / "metrics.json").write_text("prepared")
    (tmp_path / "inputs" / "other-kernel").mkdir()
    return tmp_path / "inputs"


@pytest.mark.parametrize("layout", rehearsals.LAYOUTS)
def test_a_training_reads_the_run_of_another_kernel_and_is_shortened(tmp_path, prepared, wheel, layout):
    keys = {"kernel_sources": ["earlier-kernel"], "parameters": {"epochs": 30}, "rehearsal": {"epochs": 1}}
    kernel = built(tmp_path / "kernel", wheel, TRAIN, FINISH, make=make_training, **keys)
    result = rehearse(*kernel, prepared, 120, layout=layout)
    assert [result.problem, result.faults, result.passed] == ["", (), True]
    assert result.result == "study/metrics.json"
    seen = json.loads((result.working / "study" / "seen.json").read_text())
    # 42: the kernel's first cell installed the wheel, because the notebook has no parameter `wheels`.
    assert [seen["prepared"], seen["epochs"], seen["extra"]] == ["prepared", 1, 42]
    run = {"plain": "earlier-kernel/prepare", "nested": "notebooks/somebody/earlier-kernel/prepare"}[layout]
    assert seen["at"].endswith(f"/input/{run}")
    inputs = {"plain": ["earlier-kernel", "small-test-kernel-wheels"], "nested": ["earlier-kernel"]}[layout]
    assert seen["inputs"] == inputs


@pytest.mark.parametrize(
    ("files", "text", "unfinished", "fault"),
    [
        (["record.json", "metrics.json"], "{}", False, ""),
        (["record.json", "fold0/checkpoints/run.json"], "{}", True, ""),
        (["record.json"], "{}", False, "study/metrics.json does not exist in"),
        ([], "{}", False, "study/metrics.json does not exist in"),
        (["record.json", "fold0/checkpoints/run.json"], None, False, "study/metrics.json does not exist in"),
    ],
    ids=["finished", "session over", "nothing made", "not begun", "stopped in a cell"],
)
def test_how_a_training_is_judged(tmp_path, wheel, monkeypatch, files, text, unfinished, fault):
    def run(_command, _environment, working, *_):
        for name in files:
            (working / "study" / name).parent.mkdir(parents=True, exist_ok=True)
            (working / "study" / name).write_text("{}")
        (working.parent / "rehearsal.ipynb").write_text('{"cells": []}' if text else "")
        return 0, 1.0

    monkeypatch.setattr(rehearsals, "run_with_limit", run)
    monkeypatch.setattr(rehearsals, "link_kaggle_packages", lambda: tmp_path)
    (tmp_path / "inputs").mkdir()
    result = rehearse(*built(tmp_path, wheel, make=make_training), tmp_path / "inputs", 60)
    assert result.unfinished is unfinished
    assert result.passed is (not unfinished and not fault)
    assert re.match(fault, " ".join(result.faults))
    assert bool(result.faults) is bool(fault)


def test_the_error_that_stops_a_training_is_the_rehearsals_problem(tmp_path, prepared, wheel):
    stop = 'raise RuntimeError("This GPU is too old for torch: choose GPU T4 x2")'
    kernel = built(tmp_path / "kernel", wheel, TRAIN, stop, FINISH, make=make_training, kernel_sources=["earlier-kernel"])
    result = rehearse(*kernel, prepared, 120)
    assert not result.passed
    assert not result.unfinished
    assert result.problem.endswith("raised RuntimeError: This GPU is too old for torch: choose GPU T4 x2")


def test_missing_inputs_are_named_with_how_to_get_them(tmp_path, prepared, wheel):
    keys = {"kernel_sources": ["earlier-kernel", "other/their-kernel"], "dataset_sources": ["other/their-data"]}
    kernel = built(tmp_path / "kernel", wheel, make=make_training, **keys)
    with pytest.raises(KernelError) as raised:
        rehearse(*kernel, prepared, 60)
    line = f"{prepared / 'their-kernel'}, for other/their-kernel in kernel_sources (that kernel's output, or a link to"
    assert line in str(raised.value)
    assert f"{prepared / 'their-data'}, for other/their-data in dataset_sources" in str(raised.value)
    assert "earlier-kernel" not in str(raised.value)


def test_a_built_dataset_must_not_also_be_among_the_inputs(tmp_path, prepared, wheel):
    (prepared / "small-test-kernel-wheels").mkdir()
    with pytest.raises(KernelError, match="there are two copies of somebody/small-test-kernel-wheels"):
        rehearse(*built(tmp_path / "kernel", wheel, make=make_training), prepared, 60)


def test_a_truth_without_a_submission_is_refused(tmp_path, competition, wheel):
    with pytest.raises(KernelError, match="small-test-kernel makes no submission, so there is nothing to score"):
        rehearse(*built(tmp_path, wheel, make=make_training), competition / "inputs", 60, competition / "truth")


def test_another_kernels_build_is_refused(tmp_path, prepared, wheel):
    _, out = built(tmp_path / "kernel", wheel, make=make_training)
    other = read_spec(make_training(tmp_path / "other", title="Other kernel", slug="other-kernel"))
    with pytest.raises(KernelError, match="the kernel somebody/small-test-kernel; build somebody/other-kernel"):
        rehearse(other, out, prepared, 60)


def test_the_command_line_tells_an_unfinished_training_from_a_failed_one(tmp_path, prepared, wheel, monkeypatch):
    checkpoint = '(folder / "fold0" / "checkpoints").mkdir(parents=True)'
    spec = make_training(tmp_path / "kernel", TRAIN, checkpoint, kernel_sources=["earlier-kernel"])
    monkeypatch.setattr(command_line, "kaggle_wheels", lambda _: [wheel])
    app = command_line.typer.Typer()
    app.command()(command_line.main)
    arguments = [str(spec), "--out", str(tmp_path / "out"), "--rehearse", "--inputs", str(prepared), "--push"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 3, result.output  # and it was not pushed: that would have asked for a token
    assert "the session ended before the training" in " ".join(result.output.split())

    def run(_command, _environment, working, *_):  # a training that leaves nothing
        (working.parent / "rehearsal.ipynb").write_text('{"cells": []}')
        return 0, 1.0

    monkeypatch.setattr(rehearsals, "run_with_limit", run)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 1 and "1 fault: study/metrics.json does not exist" in " ".join(result.output.split())


def test_a_chain_of_shipped_kernels_is_rehearsed(tmp_path):
    """10_prepare, then 30_train_study on its output, with the packages of the image and the wheels that they need."""
    needed = [name for name in INFERENCE if not name.startswith("ultralytics")]  # neither notebook imports it
    wheels = [installed_wheel(tmp_path / "wheels", name) for name in needed]
    inputs = tmp_path / "inputs"
    sizes = {"train_studies": 16, "test_studies": 4, "side": 96, "seed": 1, "damaged_test_files": 0, "progress": False}
    write_competition(inputs, tmp_path / "truth", **sizes)
    # The starting weights of the study model: the network that the backbone's rehearsal trains.
    network = timm.create_model("test_efficientnet", in_chans=1, num_classes=0)
    stated = {"family": "findings", "model": "backbone", "image_size": 96, "longest_side": 96, "placement": "letterbox"}
    stated |= {"classes": ["a"], "mean": [0.0], "std": [1.0], "fold": 0, "recipe": {}, "architecture": {}}
    weights = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    bundle = inputs / "chest-nih-backbone" / "backbone" / "fold0" / "bundle"
    save_bundle(bundle, weights, stated | {"data_fingerprint": "", "precision": "float32", "validation": {}})
    for name in ("siim_prepare", "siim_study"):
        spec = read_spec(KERNELS / f"{name}.yaml", owner="somebody")
        build_kernel(spec, tmp_path / name, wheels)
        result = rehearse(spec, tmp_path / name, inputs, 240, layout="nested")
        assert result.passed, result
        result.working.rename(inputs / spec.slug)
    metrics = json.loads((inputs / "chest-siim-study" / "study" / "metrics.json").read_text())
    assert [metrics["model"], metrics["folds"]] == ["study", [0]]
    fold = json.loads((inputs / "chest-siim-study" / "study" / "fold0" / "metrics.json").read_text())
    # All tensors of the backbone come from the other kernel; only the head's two layers are new.
    assert fold["starting_weights"] == f"backbone/fold0/bundle: {len(weights)} tensors, 4 left random"


def test_a_package_at_another_version_than_the_images_is_an_error(tmp_path):
    version = importlib.metadata.version("pandas")
    with pytest.raises(KernelError, match=f"pandas {version} .the image has 1.0.0."):
        kaggle_environment.link_kaggle_packages(tmp_path / "stand-in", {"pandas": "1.0.0"})
    assert not (tmp_path / "stand-in").exists()


@pytest.fixture
def image(tmp_path, monkeypatch):
    """An image with Typer alone, at the installed version; few packages are installed."""
    few = [importlib.metadata.distribution(name) for name in ("pip", "papermill", "ipykernel", "typer")]
    monkeypatch.setattr(kaggle_environment.importlib.metadata, "distributions", lambda: few)
    (tmp_path / "requirements.txt").write_text("")
    monkeypatch.setenv("KIT_ROOT", str(tmp_path))
    return {"typer": few[-1].version}


def linked(folder) -> Path:
    """Return a file in the stand-in, and assert that it has the content of the installed one."""
    (package,) = folder.glob("*.dist-info")
    installed = Path(importlib.metadata.distribution("typer").locate_file(package.name)) / "METADATA"
    assert (package / "METADATA").read_bytes() == installed.read_bytes()
    return package / "METADATA"


def test_an_environment_has_the_packages_of_a_folder_beside_its_own(tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "extra.py").write_text("ANSWER = 42")
    python = kaggle_environment.create_environment(tmp_path / "environment", tmp_path / "packages")
    code = "import extra, importlib.util, sys; print(extra.ANSWER, importlib.util.find_spec('pip'), sys.prefix)"
    printed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["42", "None", str(tmp_path / "environment")]


def test_the_stand_in_is_made_again_only_for_other_packages(tmp_path, image):
    folder = tmp_path / "new" / "stand-in"
    assert kaggle_environment.link_kaggle_packages(folder, image) == folder
    file = linked(folder)
    (folder / "mark").touch()
    ending = f".{sys.implementation.cache_tag}.pyc"
    installed = Path(importlib.metadata.distribution("typer").locate_file("typer"))
    compiled = {path.name for path in installed.glob(f"__pycache__/*{ending}")}
    kaggle_environment.link_kaggle_packages(folder, image)
    assert (folder / "mark").exists() and linked(folder) == file
    # Other processes may have compiled more files meanwhile.
    of_folder = {path.name for path in (folder / "typer").glob("__pycache__/*")}
    assert compiled <= of_folder and all(name.endswith(ending) for name in of_folder)
    kaggle_environment.link_kaggle_packages(folder, image | {"typer": "0.0.1"})
    assert not (folder / "mark").exists() and not file.exists()


def test_a_stand_in_needs_the_packages_that_run_a_notebook(tmp_path, image, monkeypatch):
    few = [importlib.metadata.distribution(name) for name in ("pip", "typer")]
    monkeypatch.setattr(kaggle_environment.importlib.metadata, "distributions", lambda: few)
    with pytest.raises(KernelError, match="needs packages that are not installed: papermill, ipykernel; run `make` again"):
        kaggle_environment.link_kaggle_packages(tmp_path / "stand-in", image)


def test_packages_are_copied_where_they_cannot_be_linked(tmp_path, image, monkeypatch):
    def refuse(*_):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(kaggle_environment.os, "link", refuse)
    assert linked(kaggle_environment.link_kaggle_packages(tmp_path / "stand-in", image)).stat().st_nlink == 1


def test_dependencies_are_those_that_are_installed_and_needed_here():
    requires = {
        "root": ["Branch.One>=1", "leaf; python_version > '3'", "other; extra == 'more'", "other; sys_platform == 'x'"],
        "branch-one": ["root", "absent"],  # a circle
        "leaf": None,
        "other": [],
    }
    installed = {name: SimpleNamespace(requires=values) for name, values in requires.items()}
    assert kaggle_environment.find_dependencies(["root", "missing"], installed) == {"root", "branch-one", "leaf"}
    assert kaggle_environment.find_dependencies([], installed) == set()


def test_a_tool_at_another_version_than_the_images_is_left_out(tmp_path):
    image = image_pins()
    assert image["gradio"] != importlib.metadata.version("gradio")
    packages = kaggle_environment.link_kaggle_packages(
        tmp_path / "stand-in", {name: image[name] for name in ("pip", "gradio", "tqdm")}
    )
    names = {path.name.split("-")[0] for path in packages.glob("*.dist-info")}
    assert {"pip", "tqdm"} <= names and "gradio" not in names


def test_the_stand_in_has_the_images_packages_and_the_dependencies_of_torch():
    packages = kaggle_environment.link_kaggle_packages()
    names = {path.name.split("-")[0].lower() for path in packages.glob("*.dist-info")}
    assert {"torch", "pandas", "pydicom", "pip"} <= names
    assert not names & {"ultralytics", "ensemble_boxes", "pylibjpeg", "imagecodecs", "pebble", "hypothesis", "uv"}
    required = {
        line.split("=")[0].split(">")[0].strip() for line in importlib.metadata.requires("torch") if "extra" not in line
    }
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    assert {name.replace("-", "_") for name in required & installed} <= names


def test_the_command_line_prints_the_error_and_exits_with_2(tmp_path):
    app = command_line.typer.Typer()
    app.command()(command_line.main)
    result = CliRunner().invoke(app, [str(make_submission(tmp_path, titel="x")), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "KernelError" in result.output
    assert "no field 'titel'" in result.output
