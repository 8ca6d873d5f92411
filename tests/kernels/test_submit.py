"""From push to score, against a local fake of Kaggle's server, by Kaggle's own client."""

import json
import logging
import re
import shutil
from datetime import datetime

import pytest
from typer.testing import CliRunner

import build_kernel as command_line
from kitlib.errors import KernelError
from kitlib.kernels import client as kaggle_client
from kitlib.kernels import submit as steps
from kitlib.kernels.pushed import read_pushed
from kitlib.kernels.submit import check_output, fetch_output, submit_version, wait_for_run, wait_for_score
from kitlib.runs.kaggle_scores import current_score
from tests.small_kernels import PARAMETERS, make_notebook, make_run, make_submission, make_training, make_wheel

KERNEL, COMPETITION = "somebody/small-test-kernel", "siim-covid19-detection"
SUBMISSION = b"id,PredictionString\na_study,negative 1 0 0 1 1\nb_image,none 1 0 0 1 1\n"
USAGE = [{"bundle": "effnet-fold0", "predicted": 5, "readable": 5}]
FAST = {"wait_s": 5, "poll_s": 0.01}


@pytest.fixture
def finished(kaggle):
    """The server, on which the pushed kernel runs without an error and writes a valid file."""
    kaggle.output = {"submission.csv": SUBMISSION, "usage.json": json.dumps(USAGE).encode(), "other.csv": b"x"}
    kaggle.competition_files = {"sample_submission.csv": SUBMISSION}
    return kaggle


@pytest.fixture
def spec(tmp_path):
    """A kernel whose fusion belongs to a fused run."""
    fused = tmp_path / "fuse"
    fused.mkdir()
    (fused / "record.json").write_text('{"started": "2026-01-01T00:00:00+00:00"}')
    (fused / "fusion.json").write_text("{}")
    return make_submission(tmp_path / "spec", "print(1)", fusion=str(fused / "fusion.json"))


@pytest.fixture
def run(spec, tmp_path, monkeypatch):
    """A function that runs build_kernel.py with the given options and returns its exit code and output."""
    wheel = make_wheel(tmp_path / "wheels", "kit_extra", "1.2")
    monkeypatch.setattr(command_line, "kaggle_wheels", lambda _: [wheel])
    monkeypatch.setattr(command_line, "push", lambda out, run, rules: command_line_push(out, run, **FAST, rules=rules))
    monkeypatch.setattr(command_line, "wait_for_run", lambda out: wait_for_run(out, **FAST))
    monkeypatch.setattr(command_line, "wait_for_score", lambda out: wait_for_score(out, **FAST))
    app = command_line.typer.Typer()
    app.command()(command_line.main)

    def invoke(*options, kernel=spec):
        result = CliRunner().invoke(app, [str(kernel), "--out", str(tmp_path / "out"), *options], catch_exceptions=False)
        return result.exit_code, " ".join(result.output.split())

    return invoke


command_line_push = command_line.push


def calls(kaggle, *names):
    return [name for name, _ in kaggle.asked if name in names]


def test_from_push_to_score(finished, run, tmp_path):
    code, printed = run("--push", "--submit", "--message", "first try")
    assert code == 0, printed
    assert "public score: 0.612" in printed and "private score: 0.598" in printed
    (submitted,) = finished.requests("CreateCodeSubmission")
    assert submitted == {
        "competitionName": COMPETITION,
        "kernelOwner": "somebody",
        "kernelSlug": "small-test-kernel",
        "kernelVersion": 3,
        "fileName": "submission.csv",
        "submissionDescription": "first try (small-test-kernel version 3)",
    }
    # Queued, running, complete; all of them ask for this version.
    assert [body["versionLabel"] for body in finished.requests("GetKernelSessionStatus")] == ["v3"] * 3
    assert (tmp_path / "out" / "output" / "submission.csv").read_bytes() == SUBMISSION
    assert not (tmp_path / "out" / "output" / "other.csv").exists()
    pushed = read_pushed(tmp_path / "out")
    assert (pushed.submission, pushed.public_score, pushed.private_score) == (700, 0.612, 0.598)
    times = [datetime.fromisoformat(moment) for moment in (pushed.pushed, pushed.submitted, pushed.scored)]
    assert times == sorted(times)
    kaggle_scores = json.loads((tmp_path / "fuse" / "kaggle.json").read_text())
    shown = current_score(kaggle_scores, {"started": "2026-01-01T00:00:00+00:00"})
    assert (shown["kernel"], shown["version"], shown["public_score"]) == (KERNEL, 3, 0.612)
    # A run that was made again afterwards does not show it.
    assert current_score(kaggle_scores, {"started": "2999-01-01T00:00:00+00:00"}) == {}


def test_a_file_is_uploaded_to_a_competition_that_takes_no_notebook(finished, run, tmp_path):
    rows = b"patientId,PredictionString\na,0.5 0 0 9 9\nb,\n"
    finished.output["submission.csv"], finished.competition_files = rows, {"stage_2_sample_submission.csv": rows}
    rsna = {"title": "Small RSNA kernel", "slug": "small-rsna-kernel", "competition": "rsna-pneumonia-detection-challenge"}
    detector = str(make_run(tmp_path / "detector", family="yolo"))
    kernel = make_submission(tmp_path / "rsna", "print(1)", runs=[detector], **rsna)
    code, printed = run("--push", "--submit", "--quick-save", "2", kernel=kernel)
    assert code == 2 and "rsna-pneumonia takes a file with all predictions, not a notebook; leave --quick-save" in printed
    code, printed = run("--push", "--submit", kernel=kernel)
    assert code == 0 and "public score: 0.612" in printed, printed
    assert finished.uploads["submission.csv"] == rows and calls(finished, "CreateCodeSubmission") == []
    (submitted,) = finished.requests("CreateSubmission")
    assert submitted["submissionDescription"] == "small-rsna-kernel version 3"


def test_the_rules_of_a_copy_of_the_data_are_kept_with_the_version(finished, run, tmp_path):
    """A kernel on a competition that the kit does not know names its rules, by which the file is checked."""
    (tmp_path / "copy").mkdir()
    parameters = PARAMETERS + '\nrules = ""'
    copy = {"competition": "copy-of-siim-acr", "runs": [str(make_run(tmp_path / "detector", family="yolo"))]}
    notebook = str(make_notebook(tmp_path / "copy" / "rules.ipynb", "print(1)", parameters=parameters))
    kernel = make_submission(tmp_path / "copy", notebook=notebook, **copy)
    code, printed = run("--push", kernel=kernel)
    assert code == 2 and "unknown competition 'copy-of-siim-acr'" in printed and "set the parameter `rules`" in printed
    rows = b"patientId,PredictionString\na,0.5 0 0 9 9\nb,\n"
    finished.output["submission.csv"], finished.competition_files = rows, {"stage_2_sample_submission.csv": rows}
    kernel = make_submission(tmp_path / "copy", notebook=notebook, parameters={"rules": "rsna-pneumonia"}, **copy)
    code, printed = run("--push", "--submit", kernel=kernel)
    assert code == 0 and read_pushed(tmp_path / "out").rules == "rsna-pneumonia", printed
    assert finished.uploads["submission.csv"] == rows


def test_what_is_logged_during_a_call_is_not_the_clients_complaint(finished, run, monkeypatch):
    def warn(body):
        logging.getLogger("urllib3.connectionpool").warning("Retrying after the connection was broken")
        return finished._SaveKernel(body)

    finished.answers["SaveKernel"] = warn
    monkeypatch.setattr(logging.root, "handlers", [])  # so that the command adds its own
    monkeypatch.setattr(logging.root, "level", logging.root.level)  # which the command changes
    code, printed = run("--push")
    assert code == 0 and "Retrying after the connection was broken" in printed, printed


def test_a_command_that_is_repeated_neither_pushes_nor_submits_again(finished, run):
    assert run("--push", "--submit")[0] == 0
    finished.asked.clear()
    code, printed = run("--push", "--submit")
    assert code == 0 and "pushed before" in printed and "public score: 0.612" in printed
    assert finished.asked == []
    assert run("--submit")[0] == 0
    assert finished.asked == []


def test_each_step_can_be_called_alone(finished, run, tmp_path):
    out = tmp_path / "out"
    assert run("--push")[0] == 0
    with pytest.raises(KernelError, match=r"the run of .*/3 is not complete; wait for it first, with --wait"):
        submit_version(out)
    with pytest.raises(KernelError, match="was not submitted yet"):
        wait_for_score(out)
    assert run("--wait")[0] == 0
    assert calls(finished, "CreateCodeSubmission") == []
    finished.statuses = ["ERROR"]  # is not asked for again
    assert wait_for_run(out, **FAST).status == "complete"
    assert fetch_output(out) == out / "output"
    check_output(out)
    assert submit_version(out).submission == 700
    assert wait_for_score(out, **FAST).public_score == 0.612


def test_a_submission_that_was_interrupted_is_found(finished, run, tmp_path):
    assert run("--push", "--wait")[0] == 0
    refuse = (503, {"code": 503, "message": "Service unavailable"})
    answer = finished._CreateCodeSubmission
    finished.answers["CreateCodeSubmission"] = lambda body: (answer(body), refuse)[1]  # submitted, but the answer is lost
    with pytest.raises(KernelError, match=r"submitting .* Kaggle answered .*Service unavailable"):
        submit_version(tmp_path / "out")
    assert submit_version(tmp_path / "out").submission == 700
    assert len(finished.submissions) == 1


def test_a_changed_build_is_pushed_again(finished, run, spec, tmp_path):
    assert run("--push", "--submit")[0] == 0
    make_notebook(tmp_path / "spec" / "submit.ipynb", "print(2)")
    finished.answers["SaveKernel"] = (
        200,
        {"url": f"https://www.kaggle.com/code/{KERNEL}", "versionNumber": 4},
    )
    code, printed = run("--push", "--submit")
    assert code == 0, printed
    assert [body["kernelVersion"] for body in finished.requests("CreateCodeSubmission")] == [3, 4]
    assert json.loads((tmp_path / "out" / "pushed-3.json").read_text())["submission"] == 700
    scores = json.loads((tmp_path / "fuse" / "kaggle.json").read_text())["submissions"]
    assert [entry["version"] for entry in scores] == [3, 4]


def test_a_failed_push_leaves_the_version_that_was_pushed_before(finished, run, tmp_path):
    assert run("--push", "--wait")[0] == 0
    make_submission(tmp_path / "spec", "print(2)", runs=[str(make_run(tmp_path / "other", "other", fold=1))])
    finished.upload_status = 503
    code, printed = run("--push", "--submit")
    assert code == 2 and "Upload unsuccessful" in printed
    # The models of version 3, not those that are built now, must have predicted every file.
    code, printed = run("--submit")
    assert code == 0 and "public score: 0.612" in printed, printed
    assert [body["kernelVersion"] for body in finished.requests("CreateCodeSubmission")] == [3]


def test_damaged_state_stops_a_push_before_anything_is_sent(finished, run, tmp_path):
    assert run("--push")[0] == 0
    (tmp_path / "out" / "pushed.json").write_text("{")
    finished.asked.clear()
    code, printed = run("--push")
    assert code == 2 and "is damaged" in printed
    assert finished.asked == []


def test_the_score_belongs_to_the_run_that_was_pushed(finished, run, tmp_path, caplog):
    assert run("--push")[0] == 0
    shutil.copytree(tmp_path / "fuse", tmp_path / "fuse2")
    make_submission(tmp_path / "spec", "print(1)", fusion=str(tmp_path / "fuse2" / "fusion.json"))
    assert run("--submit")[0] == 0
    assert (tmp_path / "fuse" / "kaggle.json").is_file() and not (tmp_path / "fuse2" / "kaggle.json").exists()
    shutil.rmtree(tmp_path / "fuse")
    assert run("--submit")[0] == 0
    assert f"{tmp_path / 'fuse'} is no longer the folder of a run" in caplog.text


LOG = json.dumps([{"stream_name": "stdout", "time": 0.1, "data": f"line {n}\n"} for n in range(40)])


def test_a_failed_run_shows_the_end_of_its_log_and_is_pushed_again(finished, run, tmp_path):
    finished.statuses, finished.failure, finished.log = ["RUNNING", "ERROR"], "Out of memory", LOG
    code, printed = run("--push", "--submit")
    assert code == 2
    assert "ended with the status 'error': Out of memory" in printed
    assert "line 39" in printed and "line 10" in printed and "line 9 " not in printed  # the last 30
    assert (tmp_path / "out" / "kaggle.log").read_text().startswith("line 0\nline 1\n")
    finished.statuses, finished.failure = ["COMPLETE"], ""
    assert run("--push", "--submit")[0] == 0
    assert len(finished.requests("SaveKernel")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": {}}, "has written no submission.csv"),
        ({"submission.csv": SUBMISSION.replace(b"b_image", b"c_image")}, "is not submitted because of 2 faults"),
        ({"usage.json": b"[]"}, "effnet-fold0 predicted 0 of 0 readable files"),
        ({"usage.json": b'[{"bundle": "eff'}, "because of 1 fault; ledger.csv"),
        (
            {"usage.json": b'[{"bundle": "a", "predicted": Infinity, "readable": 1}]'},
            "usage.json is damaged (OverflowError(",
        ),
        ({"usage.json": b"{"}, "usage.json is damaged (JSONDecodeError("),
        ({"competition_files": {}}, "downloading sample_submission.csv of siim-covid19-detection"),
    ],
    ids=["no file", "faulty file", "unused model", "one fault", "infinite usage", "truncated usage", "no sample"],
)
def test_a_faulty_result_is_not_submitted(finished, run, change, message):
    for name, value in change.items():
        if hasattr(finished, name):
            setattr(finished, name, value)
        else:
            finished.output[name] = value
    code, printed = run("--push", "--submit")
    assert code == 2 and message in printed, printed
    assert not finished.submissions


def test_placeholders_are_submitted_if_allowed(finished, run):
    finished.output["usage.json"] = b"[]"
    assert run("--push", "--submit", "--allow-placeholders")[0] == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"code": 400, "message": "You have used all your submissions"}), "You have used all your submissions"),
        ((200, {"message": "Not accepted"}), "Kaggle answered Not accepted"),
        ((403, {"code": 403, "message": "Forbidden"}), "accepted the competition's rules"),
    ],
)
def test_a_refused_submission_is_an_error(finished, run, answer, message):
    finished.answers["CreateCodeSubmission"] = answer
    code, printed = run("--push", "--submit")
    assert code == 2 and message in printed


def test_a_file_that_kaggle_could_not_score_can_be_submitted_again(finished, run, tmp_path):
    finished.answers["GetSubmission"] = (200, {"ref": 700, "status": "ERROR", "errorDescription": "Notebook Timeout"})
    code, printed = run("--push", "--submit")
    assert code == 2 and "Kaggle could not score submission 700 of somebody/small-test-kernel/3: Notebook Timeout" in printed
    assert "Run --submit again, or push a corrected build" in printed
    finished.submissions[0]["status"] = "ERROR"
    # The next submission does not reach Kaggle; the one that failed has the same description, but is not taken for it.
    finished.answers["CreateCodeSubmission"] = (503, {"code": 503, "message": "Service unavailable"})
    assert run("--submit")[0] == 2
    finished.answers.clear()
    code, printed = run("--submit")
    assert code == 0 and "public score: 0.612" in printed, printed
    assert read_pushed(tmp_path / "out").submission == 701
    assert len(finished.requests("SaveKernel")) == 1


def test_a_score_that_is_not_published_is_none(finished, run, tmp_path):
    finished.answers["GetSubmission"] = (200, {"ref": 700, "status": "COMPLETE", "publicScore": "0.5"})
    assert "private score: not published" in run("--push", "--submit")[1]
    assert read_pushed(tmp_path / "out").private_score is None


@pytest.mark.parametrize("score", ["0,612", "nan"])
def test_a_score_that_is_no_number_is_an_error(finished, run, tmp_path, score):
    finished.answers["GetSubmission"] = (200, {"ref": 700, "status": "COMPLETE", "publicScore": score})
    code, printed = run("--push", "--submit")
    assert code == 2 and f"KernelError: Kaggle's score of submission 700 is '{score}', expected a number" in printed
    finished.answers.clear()
    assert run("--submit")[0] == 0
    assert read_pushed(tmp_path / "out").public_score == 0.612


def test_waiting_survives_failures_of_the_network_but_not_for_ever(finished, run, tmp_path, monkeypatch):
    assert run("--push")[0] == 0
    answers = iter([(502, {}), (404, {"code": 404, "message": "Not Found"}), (200, {"status": "COMPLETE"})])
    finished.answers["GetKernelSessionStatus"] = lambda _: next(answers)
    assert wait_for_run(tmp_path / "out", **FAST).status == "complete"
    assert run("--push")[0] == 0
    monkeypatch.setattr(kaggle_client, "PATIENCE_S", 0.0)
    finished.answers["GetKernelSessionStatus"] = (502, {})
    with pytest.raises(KernelError, match=r"asking for the run .* Kaggle answered 502"):
        wait_for_run(tmp_path / "out", **FAST)


def test_a_run_or_score_that_takes_too_long_is_an_error_that_says_how_to_go_on(finished, run, tmp_path):
    assert run("--push")[0] == 0
    finished.statuses, finished.scores = ["RUNNING"], ["PENDING"]
    with pytest.raises(KernelError, match=r"has not ended after 0\.1 s; .*run the command again"):
        wait_for_run(tmp_path / "out", 0.1, 0.01)
    finished.statuses = ["COMPLETE"]
    assert run("--wait")[0] == 0
    submit_version(tmp_path / "out")
    with pytest.raises(KernelError, match=r"submission 700 has no score after 0\.1 s; run the command again"):
        wait_for_score(tmp_path / "out", wait_s=0.1, poll_s=0.01)


def test_progress_is_reported_when_the_status_changes(finished, run, tmp_path, caplog):
    assert run("--push")[0] == 0
    finished.statuses = ["QUEUED"] * 3 + ["RUNNING"] * 3 + ["COMPLETE"]
    with caplog.at_level("INFO", logger=steps.__name__):
        wait_for_run(tmp_path / "out", **FAST)
    reports = [re.sub(r" after \d+ s", "", line) for line in caplog.messages if "version 3" in line]
    assert [line.split(": ")[1] for line in reports] == ["queued", "running", "complete"]


def test_a_run_that_was_made_again_does_not_get_the_score(finished, run, tmp_path, caplog):
    (tmp_path / "fuse" / "record.json").write_text('{"started": "2999-01-01T00:00:00+00:00"}')
    assert run("--push", "--submit")[0] == 0
    assert "was made again after the push; the score" in caplog.text
    assert not (tmp_path / "fuse" / "kaggle.json").exists()


def test_a_training_is_waited_for(finished, run, tmp_path):
    kernel = make_training(tmp_path / "training")
    assert run("--push", "--wait", kernel=kernel)[0] == 0
    assert not (tmp_path / "out" / "output").exists()
    code, printed = run("--push", "--submit", kernel=kernel)
    assert code == 2 and "small-test-kernel makes no submission; leave --submit out" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--submit"], "pushed.json does not exist; push the kernel first, with --push"),
        (["--submit", "--rehearse", "--inputs", "x"], "--rehearse and --quick-save need a build"),
        (["--message", "x"], "--message needs --submit"),
        (["--docker"], "--docker needs --rehearse"),
    ],
)
def test_options_that_make_no_sense_are_errors(run, options, message):
    code, printed = run(*options)
    assert code == 2 and message in printed.replace("│ ", "").replace(" │", "")


def test_damaged_state_is_an_error(run, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("{", '{"kernel": 1}', "[]"):
        (tmp_path / "out" / "pushed.json").write_text(text)
        code, printed = run("--submit")
        assert code == 2 and "is damaged" in printed and "remove it and push again" in printed
