"""Images without lungs leave the folds, and are counted by class."""

import pytest

from kitlib.training.split import leave_out_rejected
from tests.small_lungs import stored_lungs
from tests.small_xrays import SmallXrays


def test_images_without_lungs_leave_the_folds_and_are_counted_by_class(tmp_path):
    small = SmallXrays(8)
    tables = {"images": small.images, "labels": small.labels, "folds": small.fold_table}
    ill = small.labels.columns[1]
    missed = small.images.image_id[:3].tolist()
    folds, counts = leave_out_rejected(tables, stored_lungs(tmp_path, small, missed=missed))
    assert folds.id.tolist() == [name for name in small.fold_table.id if name not in missed]
    assert folds.columns.equals(small.fold_table.columns) and folds.index.tolist() == list(range(5))
    counts = counts.set_index("class")
    assert counts.loc["all"].tolist() == [8, 3]
    expected = small.labels.set_index("id").loc[small.images.study_id[:3], ill].sum()
    assert counts.loc[ill, "dropped"] == expected
    with pytest.raises(ValueError, match="`drop_rejected` requires `lungs_run`"):
        leave_out_rejected(tables, None)
