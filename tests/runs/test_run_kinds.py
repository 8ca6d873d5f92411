"""Which folders are runs, of which kind they are, which of their folders are folds, and which run a parameter names."""

from kitlib import paths
from kitlib.runs.run_kinds import KINDS, find_kind, fold_folders, is_run, named_folder, walk_runs


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_only_folders_with_numbers_are_folds(tmp_path):
    folds = ("fold0", "fold10", "outer0/fold1", "outer12/fold0")
    for name in (*folds, "fold", "folds", "fold-1", "outer0/foldx", "outerx/fold1", "outer/fold2", "inner0/fold1"):
        (tmp_path / name).mkdir(parents=True)
    expected = dict(zip((0, 10, "0/1", "12/0"), (tmp_path / name for name in folds), strict=True))
    assert fold_folders(tmp_path) == expected


def test_a_kind_is_that_of_a_file_in_the_run_or_in_a_fold(tmp_path):
    for kind, names in KINDS.items():
        for number, name in enumerate(names):
            touch(tmp_path / f"{kind}{number}" / name)
            assert find_kind(tmp_path / f"{kind}{number}") == kind
    touch(tmp_path / "folds" / "fold1" / "tables" / "class_scores.parquet")
    assert find_kind(tmp_path / "folds") == "findings"
    # A fusion also has tables of predictions, and a folder is not a file.
    touch(tmp_path / "fused" / "fusion.json", tmp_path / "fused" / "tables" / "study_scores.parquet")
    (tmp_path / "other" / "fusion.json").mkdir(parents=True)
    assert find_kind(tmp_path / "fused") == "fusion" and find_kind(tmp_path / "other") == ""


def test_runs_are_found_in_order_but_not_inside_runs_or_hidden_folders(tmp_path):
    touch(tmp_path / "c" / "record.json", tmp_path / "b" / "metrics.json", tmp_path / "a" / "fold0" / "metrics.json")
    touch(tmp_path / "d" / "fold1" / "checkpoints" / "last.ckpt", tmp_path / "c" / "inner" / "record.json")
    touch(tmp_path / ".hidden" / "record.json", tmp_path / "e" / "notes.txt", tmp_path / "e" / "run" / "record.json")
    assert [run.relative_to(tmp_path).as_posix() for run in walk_runs(tmp_path)] == ["a", "b", "c", "d", "e/run"]
    assert is_run(tmp_path / "c") and not is_run(tmp_path / "e")


def test_a_named_run_is_next_to_the_run_or_where_runs_are(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_ROOT", str(tmp_path / "project"))
    monkeypatch.setattr(paths, "on_kaggle", lambda: False)
    for folder in ("moved/model", "moved/prepare", "project/runs/only_there"):
        touch(tmp_path / folder / "record.json")
    run = tmp_path / "moved" / "model"
    assert named_folder("prepare", run) == named_folder("/kaggle/working/prepare", run) == tmp_path / "moved" / "prepare"
    assert named_folder("only_there", run) == tmp_path / "project" / "runs" / "only_there"
    assert [named_folder(name, run) for name in (None, "", 3, "nowhere")] == [None] * 4
