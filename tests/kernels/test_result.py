"""What a kernel has to leave in its output folder."""

import json

import pytest

from kitlib.atomic import write_json
from kitlib.kernels.result import check_result, find_unused_bundles, list_bundles
from kitlib.kernels.spec import read_spec
from tests.small_kernels import make_submission, make_training


def test_a_notebook_without_a_run_has_no_result(tmp_path):
    spec = read_spec(make_training(tmp_path, notebook_parameters="epochs = 1"))
    assert check_result(spec, tmp_path / "working", ()) == ("", False, ())


def test_the_result_of_a_training_is_in_the_run_folder_of_its_rehearsal(tmp_path):
    keys = {"parameters": {"run_folder": "full"}, "rehearsal": {"run_folder": "short"}}
    spec = read_spec(make_training(tmp_path, **keys))
    working = tmp_path / "working"
    missing = (f"short/metrics.json does not exist in {working}",)
    write_json(working / "full" / "metrics.json", {})
    assert check_result(spec, working, ()) == ("short/metrics.json", False, missing)
    # Checkpoints with the record are a training that its session's deadline has ended.
    (working / "short" / "fold0" / "checkpoints").mkdir(parents=True)
    assert check_result(spec, working, ()) == ("short/metrics.json", False, missing)
    write_json(working / "short" / "record.json", {})
    assert check_result(spec, working, ()) == ("short/metrics.json", True, missing)
    write_json(working / "short" / "metrics.json", {})
    assert check_result(spec, working, ()) == ("short/metrics.json", False, ())


def test_a_submission_has_the_ids_of_the_test_set(tmp_path):
    spec = read_spec(make_submission(tmp_path))
    ids = ("a_study", "b_image")
    missing = (f"submission.csv does not exist in {tmp_path}",)
    assert check_result(spec, tmp_path, ids) == ("submission.csv", False, missing)
    (tmp_path / "submission.csv").write_text("id,PredictionString\na_study,negative 1 0 0 1 1\nb_image,none 1 0 0 1 1\n")
    assert check_result(spec, tmp_path, ids) == ("submission.csv", False, ())
    name, is_unfinished, (fault,) = check_result(spec, tmp_path, (*ids, "c_image"))
    assert (name, is_unfinished) == ("submission.csv", False) and "c_image" in fault


def test_bundles_are_listed_in_the_order_of_the_weights(tmp_path):
    assert list_bundles(tmp_path / "gone") == ()
    write_json(tmp_path / "weights.json", {"bundles": [{"folder": "b"}, {"folder": "a"}]})
    assert list_bundles(tmp_path) == ("b", "a")


@pytest.mark.parametrize(("predicted", "is_used"), [(0, False), (1, False), (2, True), (3, False)])
def test_a_bundle_is_used_if_it_has_predicted_every_readable_file(tmp_path, predicted, is_used):
    usage = tmp_path / "usage.json"
    entries = [{"bundle": "a", "predicted": predicted, "readable": 2}, {"bundle": "other", "predicted": 0, "readable": 2}]
    usage.write_text(json.dumps(entries))
    message = f"a predicted {predicted} of 2 readable files; ledger.csv says why"
    assert find_unused_bundles(["a"], usage) == (() if is_used else (message,))
    assert find_unused_bundles([], usage) == ()
