"""The command that spends a GPU's minutes: parts that fail or hang cost no other, and every minute has its part."""

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
    # A process of its own, which must not live on either.
    "hangs.py": "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('figures:', child.pid, flush=True)\nchild.wait()",
    "works.py": "import sys\nprint('figures: too early')\nprint('figures:', *sys.argv[1:])",
}


@pytest.fixture
def parts(tmp_path):
    """A folder of parts; `machine.py` is the real one."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "machine.py").symlink_to(GPU / "machine.py")
    return tmp_path


def run(parts, listing, **environment):
    (parts / "parts.txt").write_text(listing)
    given = {"PARTS": str(parts / "parts.txt"), "OUT": str(parts / "out"), "PYTHON": sys.executable, **environment}
    command = ["bash", str(GPU.parent / "gpu.sh"), "--small"]
    ended = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=300)
    rows = [line.strip("| ").split(" | ") for line in (parts / "out" / "table.md").read_text().splitlines()[2:-1]]
    assert [each for each in ended.stdout.splitlines() if each.startswith("|")][2:] == [
        line for line in (parts / "out" / "table.md").read_text().splitlines()[2:-1]
    ]
    return ended.returncode, {name: (result, *figures) for name, result, _, *figures in rows}


def test_parts_that_fail_or_hang_are_told_and_cost_no_other(parts):
    listing = ["# comment", "", "broken 60 fails.py", "stuck 9 hangs.py", "machine 200 machine.py"]
    listing += ["well-a 60 works.py one two", "well-b 60 works.py", ""]
    status, rows = run(parts, "\n".join(listing))
    assert status == 1
    assert rows["broken"] == ("failed, exit status 3", "half of it")
    assert rows["stuck"][0] == "stopped at its 9 s" and not psutil.pid_exists(int(rows["stuck"][1]))
    assert rows["machine"][0] == "ok" and "torch" in rows["machine"][1]
    assert rows["well-a"] == ("ok", "one two --small") and rows["well-b"] == ("ok", "--small")
    logs = {path.name for path in (parts / "out").iterdir()}
    assert logs == {"table.md", "broken.log", "stuck.log", "machine.log", "well.log"}


def test_the_whole_ends_in_time_and_what_is_left_out_is_told(parts):
    # Five seconds are kept for killing a part; four or less are left to the first.
    status, rows = run(parts, "stuck 60 hangs.py\nlate 60 works.py\n", LIMIT="9")
    assert status == 1
    assert rows["stuck"][0] in [f"stopped at its {limit} s" for limit in (1, 2, 3, 4)] and rows["late"][0] == "no time left"


def test_wheels_that_cannot_be_installed_are_told_and_the_parts_run_all_the_same(parts):
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
        # As torch warns, below a line of the kit, inside of Lightning's loop.
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
