"""benchmarks/gpu.sh: if a part fails or hangs, the others still run, and all parts fit into nine minutes."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from kitlib.recipes.named import RECIPES

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
SCRIPTS = {
    "fails.py": "print('figures: half of it')\nraise SystemExit(3)",
    # A child process, which must be killed as well.
    "hangs.py": "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('figures:', child.pid, flush=True)\nchild.wait()",
    "works.py": "import sys\nprint('figures: too early')\nprint('figures:', *sys.argv[1:])",
}


@pytest.fixture
def parts(tmp_path):
    """Return a folder with test scripts as parts, and the real `machine.py`."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "machine.py").symlink_to(GPU / "machine.py")
    return tmp_path


def run(parts, listing, **environment):
    (parts / "parts.txt").write_text(listing)
    variables = {"PARTS": str(parts / "parts.txt"), "OUT": str(parts / "out"), "PYTHON": sys.executable, **environment}
    command = ["bash", str(GPU.parent / "gpu.sh"), "--small"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    rows = [line.strip("| ").split(" | ") for line in (parts / "out" / "table.md").read_text().splitlines()[2:-1]]
    assert [line for line in done.stdout.splitlines() if line.startswith("|")][2:] == [
        line for line in (parts / "out" / "table.md").read_text().splitlines()[2:-1]
    ]
    return done.returncode, {name: (result, *figures) for name, result, _, *figures in rows}


def test_parts_that_fail_or_hang_are_reported_and_the_others_run(parts):
    listing = ["# comment", "", "broken 60 fails.py", "stuck 4 hangs.py", "machine 200 machine.py"]
    listing += ["well-a 60 works.py one two", "well-b 60 works.py", ""]
    status, rows = run(parts, "\n".join(listing))
    assert status == 1
    assert rows["broken"] == ("failed, exit status 3", "half of it")
    assert rows["stuck"][0] == "stopped after 4 s" and not psutil.pid_exists(int(rows["stuck"][1]))
    assert rows["machine"][0] == "ok" and "torch" in rows["machine"][1]
    assert rows["well-a"] == ("ok", "one two --small") and rows["well-b"] == ("ok", "--small")
    logs = {path.name for path in (parts / "out").iterdir()}
    assert logs == {"table.md", "broken.log", "stuck.log", "machine.log", "well.log"}


def test_the_script_ends_in_time_and_reports_parts_that_did_not_run(parts):
    # Five seconds are reserved for killing a part, so the first part has at most four.
    status, rows = run(parts, "stuck 60 hangs.py\nlate 60 works.py\n", LIMIT="9")
    assert status == 1
    assert rows["stuck"][0] in [f"stopped after {limit} s" for limit in (1, 2, 3, 4)] and rows["late"][0] == "no time left"


def test_wheels_that_cannot_be_installed_are_reported_and_the_parts_still_run(parts):
    (parts / "wheels").mkdir()
    (parts / "wheels" / "broken-1-py3-none-any.whl").write_text("no wheel")
    status, rows = run(parts, "well 60 works.py\n", WHEELS=str(parts / "wheels"))
    assert status == 1 and rows["wheels"][0] == "failed, see wheels.log" and rows["well"][0] == "ok"


def test_the_parts_fit_nine_minutes_and_eight_files():
    listing = [line.split() for line in (GPU / "parts.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert sum(int(limit) for _, limit, *_ in listing) <= 525  # of 530 s, and five to kill the last one
    assert len({name.split("-")[0] for name, *_ in listing}) + 1 <= 8
    assert all((GPU / script).is_file() for _, _, script, *_ in listing)


@pytest.fixture
def on_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(GPU), *sys.path])


@pytest.mark.usefixtures("on_path")
def test_waits_are_counted_by_phase_and_line_of_the_kit():
    from waits import REST, STEPS, Waits

    from kitlib.device import seed_everything

    def advance(line):
        # Warn as torch does: called by a line of the kit, inside Lightning's loop.
        source = "def step(warn):\n    warn()\n"
        space = {}
        exec(compile(source, line, "exec"), space)
        space["step"](lambda: warnings.warn(Waits.MESSAGE, stacklevel=1))

    with Waits() as waits:
        for _ in range(2):
            advance("/x/kitlib/some.py")
        loop = {}
        exec(compile("def advance(of):\n    of('/x/kitlib/other.py')\n", "/x/loops/training_epoch_loop.py", "exec"), loop)
        loop["advance"](advance)
        seed_everything(0)
    assert waits.counted == {(REST, "some.py:2 "): 2, (STEPS, "other.py:2 "): 1}


@pytest.mark.usefixtures("on_path")
def test_every_recipe_is_measured_once_and_the_published_ones_without_the_small():
    from recipes import names

    assert sorted(names(False) + names(True)) == sorted(RECIPES)
    assert names(False)[0].startswith("strong_") and all(name.startswith("small_") for name in names(True))
