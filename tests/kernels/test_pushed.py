"""The record of a pushed version, and the steps that it makes unnecessary or impossible. No request is sent."""

import dataclasses
import json

import pytest

from kitlib.errors import KernelError
from kitlib.kernels.pushed import Pushed, digest_build, is_pushed, read_pushed, write_new_version, write_pushed
from kitlib.kernels.submit import check_output, fetch_output, submit_version, wait_for_run, wait_for_score

FIRST = Pushed("somebody/small-kernel", "https://www.kaggle.com/code/somebody/small-kernel", 3, ("effnet-fold0",), "")
SCORED = dataclasses.replace(FIRST, status="complete", competition="siim-covid19-detection", submission=700)
SCORED = dataclasses.replace(SCORED, pushed="2026-02-01T00:00:00+00:00", public_score=0.612, scored="2026-02-02")
BUILT = {"kernel/small.ipynb": "notebook", "wheels/one.whl": "wheel", "weights/a/model.json": "model"}


@pytest.fixture
def out(tmp_path):
    for name, text in BUILT.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    return tmp_path / "out"


def test_a_record_is_read_as_it_was_written(out):
    for pushed in (FIRST, SCORED):
        write_pushed(out, pushed)
        assert read_pushed(out) == pushed


def test_a_new_version_keeps_the_earlier_record_and_drops_its_output(out):
    (out / "output").mkdir()
    write_new_version(out, FIRST, None)
    assert not (out / "output").exists() and not list(out.glob("pushed-*.json"))
    write_new_version(out, dataclasses.replace(FIRST, version=4), read_pushed(out))
    assert read_pushed(out).version == 4
    assert json.loads((out / "pushed-3.json").read_text())["version"] == 3


def test_the_digest_is_that_of_the_built_files_and_their_names(out):
    digests = [digest_build(out)]
    write_pushed(out, FIRST)
    (out / "output").mkdir()
    (out / "output" / "submission.csv").write_text("id")
    (out / "rehearsal.log").write_text("log")
    (out / "kernel" / "empty").mkdir()
    assert digest_build(out) == digests[0]
    for name in BUILT:
        (out / name).write_text("changed")
        digests.append(digest_build(out))
        (out / name).rename((out / name).with_name("renamed"))
        digests.append(digest_build(out))
    (out / "weights" / "more").touch()
    digests.append(digest_build(out))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("status", "done"), [("", True), ("complete", True), ("error", False), ("cancel_acknowledged", False)]
)
def test_a_build_is_pushed_until_it_changes_or_its_run_fails(out, status, done):
    assert not is_pushed(out)
    write_pushed(out, dataclasses.replace(FIRST, status=status, digest=digest_build(out)))
    assert is_pushed(out) is done
    (out / "kernel" / "small.ipynb").write_text("changed")
    assert not is_pushed(out)


def test_a_step_without_its_earlier_step_is_an_error(out):
    for step in (wait_for_run, fetch_output, submit_version, wait_for_score):
        with pytest.raises(KernelError, match=r"pushed\.json does not exist; push the kernel first"):
            step(out)
    for status in ("", "error"):
        write_pushed(out, dataclasses.replace(FIRST, status=status))
        for step in (fetch_output, submit_version):
            with pytest.raises(KernelError, match="the run of somebody/small-kernel/3 is not complete"):
                step(out)
    write_pushed(out, dataclasses.replace(FIRST, status="complete"))
    with pytest.raises(KernelError, match="somebody/small-kernel belongs to no competition"):
        submit_version(out)
    with pytest.raises(KernelError, match="was not submitted yet"):
        wait_for_score(out)


def test_a_step_that_is_done_returns_its_record(out):
    write_pushed(out, SCORED)
    (out / "output").mkdir()
    assert wait_for_run(out) == submit_version(out) == wait_for_score(out) == SCORED
    assert fetch_output(out) == out / "output"


def test_a_file_with_a_fault_or_without_a_models_predictions_is_not_submitted(out):
    rows = [f"i{number}_image,none 1 0 0 1 1\n" for number in range(25)]
    text = "id,PredictionString\na_study,negative 1 0 0 1 1\n" + "".join(rows)
    (out / "output").mkdir()
    for name in ("submission.csv", "sample_submission.csv"):
        (out / "output" / name).write_text(text)
    (out / "output" / "usage.json").write_text('[{"bundle": "effnet-fold0", "predicted": 1, "readable": 2}]')
    write_pushed(out, SCORED)
    with pytest.raises(KernelError, match=r"because of 1 fault; ledger.*Found:\n  effnet-fold0 predicted 1 of 2 readable"):
        check_output(out)
    check_output(out, allow_placeholders=True)
    (out / "output" / "submission.csv").write_text(text.replace("_image", "_other"))
    with pytest.raises(KernelError, match=r"because of \d\d faults") as raised:
        check_output(out)
    assert 1 < len(str(raised.value).splitlines()) < 25  # the first faults are enough


@pytest.mark.parametrize(
    ("record", "gets_score"),
    [
        ({"started": "2026-01-31T23:59:59+00:00"}, True),
        ({"started": "2026-02-01T00:00:01+00:00"}, False),  # after the push
        ({}, True),
        (None, False),
    ],
)
def test_the_run_whose_fusion_was_pushed_gets_the_score(out, tmp_path, record, gets_score):
    run = tmp_path / "fuse"
    run.mkdir()
    if record is not None:
        (run / "record.json").write_text(json.dumps(record))
    write_pushed(out, dataclasses.replace(SCORED, fused_run=str(run)))
    wait_for_score(out)
    assert (run / "kaggle.json").is_file() is gets_score
    if gets_score:
        (entry,) = json.loads((run / "kaggle.json").read_text())["submissions"]
        shown = (entry["version"], entry["submission"], entry["public_score"], entry["private_score"])
        assert shown == (3, 700, 0.612, None)


@pytest.mark.parametrize("record", ["{", "[]"])
def test_a_run_whose_record_is_damaged_gets_no_score(out, tmp_path, record):
    (tmp_path / "record.json").write_text(record)
    write_pushed(out, dataclasses.replace(SCORED, fused_run=str(tmp_path)))
    with pytest.raises(KernelError, match=r"record\.json is damaged .* the score is not saved"):
        wait_for_score(out)
    assert not (tmp_path / "kaggle.json").exists()
