"""kaggle.json: one entry per kernel and version, in the order in which they were added last."""

import json

import pytest

from kitlib.errors import RunError
from kitlib.runs.kaggle_scores import KAGGLE, add_score, current_score


def entry(kernel, version, score, pushed="2026-11-02"):
    return {"kernel": kernel, "version": version, "pushed": pushed, "public_score": score, "private_score": score}


def test_a_score_replaces_only_that_of_its_kernel_and_version(tmp_path):
    for submission in (entry("a", 1, 0.1), entry("a", 2, 0.2), entry("b", 1, 0.3), entry("a", 1, 0.4)):
        add_score(tmp_path, submission)
    kept = json.loads((tmp_path / KAGGLE).read_text())["submissions"]
    assert [(one["kernel"], one["version"], one["public_score"]) for one in kept] == [
        ("a", 2, 0.2),
        ("b", 1, 0.3),
        ("a", 1, 0.4),
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"submissions": 3}', '{"submissions": [{"kernel": "a"}]}'])
def test_a_damaged_file_is_an_error_and_is_kept(tmp_path, content):
    (tmp_path / KAGGLE).write_text(content)
    with pytest.raises(RunError, match=r"kaggle\.json is damaged .*; remove it"):
        add_score(tmp_path, entry("a", 1, 0.1))
    assert (tmp_path / KAGGLE).read_text() == content


def test_the_current_score_was_pushed_since_the_run_began():
    old, new = entry("a", 1, 0.1, "2026-11-01"), entry("a", 2, 0.2, "2026-11-03")
    assert current_score({"submissions": [old, new]}, {"started": "2026-11-02"}) == new
    assert current_score({"submissions": [new, old]}, {"started": "2026-11-02"}) == new
    assert current_score({"submissions": [old]}, {"started": "2026-11-02"}) == {}
    assert current_score({"submissions": [old]}, {"started": "2026-11-01"}) == old
    assert current_score({"submissions": [old]}, {}) == old
    assert current_score({"submissions": [new, "damaged"]}, {}) == new
    assert current_score({"submissions": 3}, {}) == current_score({}, {}) == {}
