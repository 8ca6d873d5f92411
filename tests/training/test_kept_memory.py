"""The memory for canvases: that of the machine or its container, whichever is smaller, divided among processes."""

import psutil
import pytest

from kitlib.training.kept_memory import SHARE, KeptMemory, available_memory


def group(folder, limit, used, file_cache, version):
    """Write a control group's files."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {file_cache}\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/kaggle/job:1"), (1, "4:cpu,memory:/kaggle/job:1")])
@pytest.mark.parametrize("outside", [False, True])
def test_the_smallest_limit_of_the_control_groups_counts(tmp_path, version, line, outside):
    own, root = tmp_path / "cgroup", tmp_path / "fs" / ("memory" if version == 1 else "")
    own.write_text(f"7:cpuset:/elsewhere\n{line}\n")
    folder = root if outside else root / "kaggle"  # in a container, the process's path does not exist
    group(folder, 1_000_000, 600_000, 100_000, version)
    if not outside:
        group(folder / "job:1", "max" if version == 2 else 2**63 - 4096, 300_000, 0, version)
    assert available_memory(own, tmp_path / "fs") == 500_000
    group(folder, 1_000_000, 1_200_000, 100_000, version)
    assert available_memory(own, tmp_path / "fs") == 0


def test_without_control_groups_the_machine_decides(tmp_path):
    assert available_memory(tmp_path / "none", tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_folds_side_by_side_and_their_processes_share_the_memory(monkeypatch, caplog):
    class Owner:
        pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    memory, owner = KeptMemory(lambda: int(100 / SHARE)), Owner()
    memory.folds_at_once = 2
    assert memory.reserve(owner, 1, 10) == 1 and not caplog.text
    assert [memory.reserve(owner, 5, 10) for _ in range(2)] == [1, 0]  # 25 bytes for each of four processes
    assert "1 of 5 canvases" in caplog.text
    memory.folds_at_once = 1
    monkeypatch.delenv("WORLD_SIZE")
    del owner
    assert memory.reserve(Owner(), 50, 10) == 10
