import json
import os
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


def test_a_written_file_has_the_permissions_of_any_other_and_the_umask_stays(tmp_path):
    """A umask of 027 lets the group read: 666 without 027 is 640."""
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "metrics.json", {"a": 1})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "metrics.json").stat().st_mode & 0o777 == 0o640
