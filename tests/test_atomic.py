import json
import subprocess
import sys

import pytest

from kitlib.atomic import replacing, write_json


def test_a_failed_write_leaves_the_previous_file_and_no_temporary_file(tmp_path):
    target = tmp_path / "submission.csv"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as temporary_path:
        temporary_path.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]
    assert target.read_text() == "before"


def test_a_killed_writer_leaves_the_previous_file(tmp_path):
    target = tmp_path / "metrics.json"
    write_json(target, {"a": 1})
    script = (
        "import os, signal, sys; from kitlib.atomic import replacing\n"
        "with replacing(sys.argv[1]) as path:\n"
        "    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert json.loads(target.read_text()) == {"a": 1}


def test_nan_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())
