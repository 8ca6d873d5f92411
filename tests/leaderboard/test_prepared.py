"""The prepared run of a model is found by its fingerprint, and each prepared run is read once."""

from types import SimpleNamespace

from kitlib.bundle import data_fingerprint
from kitlib.leaderboard import prepared
from kitlib.leaderboard.listing import list_runs
from tests.small_runs import prepare, tables_of
from tests.small_xrays import SmallXrays

TABLES = tables_of(SmallXrays())
OTHER = {**TABLES, "folds": TABLES["folds"].assign(fold=1 - TABLES["folds"].fold)}


def test_each_prepared_run_is_read_once_whether_it_matches_or_not(tmp_path, monkeypatch):
    read, names = prepared.read_prepared, []

    def counted(folder):
        names.append(folder.name)
        return read(folder)

    monkeypatch.setattr(prepared, "read_prepared", counted)
    for name, tables in (("unnamed", OTHER), ("named", TABLES)):
        prepare(tmp_path / "runs" / name, tables)
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "metrics.json").write_text("{}")
    finder = prepared.PreparedRuns(list_runs([tmp_path / "runs" / "unnamed"]))
    run = SimpleNamespace(folder=tmp_path / "runs" / "model", parameters={"prepare_run": "named"})
    without = SimpleNamespace(folder=tmp_path / "runs" / "model", parameters={"prepare_run": "damaged"})
    assert finder.find("of no run", run) is None and names == ["named", "unnamed"]
    for _ in range(2):
        assert finder.find("of no run", run) is None and finder.find("of no run", without) is None
        for tables in (TABLES, OTHER):
            folds, found = finder.find(data_fingerprint(**tables), run)
            assert folds == data_fingerprint(folds=tables["folds"]) and found["folds"].equals(tables["folds"])
    assert names == ["named", "unnamed", "damaged"]
