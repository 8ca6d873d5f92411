"""Which folders of a run are its folds."""

from kitlib.runs.run_kinds import fold_folders


def test_only_folders_with_numbers_are_folds(tmp_path):
    folds = ("fold0", "fold10", "outer0/fold1", "outer12/fold0")
    for name in (*folds, "fold", "folds", "fold-1", "outer0/foldx", "outerx/fold1", "outer/fold2", "inner0/fold1"):
        (tmp_path / name).mkdir(parents=True)
    expected = dict(zip((0, 10, "0/1", "12/0"), (tmp_path / name for name in folds), strict=True))
    assert fold_folders(tmp_path) == expected
