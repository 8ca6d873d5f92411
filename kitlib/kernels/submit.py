"""From a pushed kernel to its score: wait for the run, download and check its file, submit it, wait for the score.

Each step reads pushed.json next to the built kernel (kitlib.kernels.pushed) and adds its result. Therefore each step can be
called alone, and again after an interruption; a step that is already done returns at once.
"""

import dataclasses
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from kitlib.atomic import write_text
from kitlib.errors import KaggleUnreachable, KernelError
from kitlib.kernels.client import KaggleClient, poll
from kitlib.kernels.pushed import COMPLETE, OUTPUT, Pushed, read_pushed, write_pushed
from kitlib.kernels.result import USAGE, find_unused_bundles
from kitlib.runs.kaggle_scores import add_score
from kitlib.runs.record import RECORD

logger = logging.getLogger(__name__)

# Kaggle's status of a run that has ended without success, or of a submission that it could not score.
FAILED = ("error", "cancel_acknowledged")
SUBMISSION = "submission.csv"
LOG = "kaggle.log"
LOG_LINES = 30  # lines of a failed run's log in the error message
# A session and a scored rerun each last at most 12 hours, and may have to queue.
WAIT_S, POLL_S = 14 * 3600.0, 30.0
PROGRESS_S = 300.0  # seconds between two reports of the same status
SUBMISSIONS = 100  # number of latest submissions among which an interrupted one is looked for


def wait_for_run(out: str | Path, wait_s: float = WAIT_S, poll_s: float = POLL_S) -> Pushed:
    """Wait until the pushed kernel's run on Kaggle has ended; return its record, whose status is "complete".

    `out` is the folder that the kernel was pushed from. Raises KernelError if nothing was pushed, if the run has failed, or
    if it has not ended after `wait_s` seconds. The log of a failed run is written to `out`/kaggle.log, and the error quotes
    its last lines.
    """
    pushed = read_pushed(out)
    if pushed.status == COMPLETE:
        return pushed
    client, report = KaggleClient(), _reporter(f"{pushed.kernel} version {pushed.version}")

    def ask() -> Any:
        answer = _ask(client, f"asking for the run {pushed.name}", lambda: client.api.kernels_status(pushed.name))
        status = answer.status.name.lower()
        report(status)
        return answer if status in (COMPLETE, *FAILED) else None

    answer = poll(ask, wait_s, poll_s)
    if answer is None:
        raise KernelError(
            f"{pushed.name} has not ended after {wait_s:g} s; see {pushed.url}, and run the command again to go on waiting"
        )
    pushed = dataclasses.replace(pushed, status=answer.status.name.lower())
    write_pushed(out, pushed)
    if pushed.status != COMPLETE:
        reason = f": {answer.failure_message}" if answer.failure_message else ""
        raise KernelError(
            f"{pushed.name} ended with the status {pushed.status!r}{reason}; see {pushed.url}. Correct the cause and push "
            f"again.{_save_log(client, pushed, Path(out) / LOG)}"
        )
    return pushed


def fetch_output(out: str | Path) -> Path:
    """Download the output of a submission kernel's complete run; return the folder with the files, `out`/output.

    The files are submission.csv, ledger.csv and usage.json, the run's log, and the competition's sample submission. If the
    folder exists, nothing is downloaded. Raises KernelError if the run is not complete, or has not written submission.csv.
    """
    folder, pushed = Path(out) / OUTPUT, _read_complete(out)
    if folder.is_dir():
        return folder
    client, sample = KaggleClient(), pushed.challenge.sample
    with tempfile.TemporaryDirectory(dir=out, prefix=".output-") as temporary_folder:
        unfinished = Path(temporary_folder) / OUTPUT
        logger.info("downloading the output of %s", pushed.name)
        with client.calling(f"downloading the output of {pushed.name}"):
            client.api.kernels_output(
                pushed.name, str(unfinished), file_pattern=r"^(submission\.csv|ledger\.csv|usage\.json)$", force=True
            )
        if not (unfinished / SUBMISSION).is_file():
            raise KernelError(f"{pushed.name} has written no {SUBMISSION}; see {pushed.url}")
        with client.calling(f"downloading {sample} of {pushed.competition}"):
            client.api.competition_download_file(
                pushed.competition, sample, str(unfinished), force=True, quiet=True, unzip=True
            )
        unfinished.rename(folder)
    return folder


def check_output(out: str | Path, allow_placeholders: bool = False) -> None:
    """Check the downloaded submission.csv as Kaggle would, and check that every model of the version was used.

    Raises KernelError if submission.csv is faulty. Unless `allow_placeholders` is True, also raises KernelError if a model
    has not predicted every readable image file.
    """
    folder = Path(out) / OUTPUT
    pushed = read_pushed(out)
    sample = folder / pushed.challenge.sample
    faults = [str(fault) for fault in pushed.challenge.validate_file(folder / SUBMISSION, sample)]
    if not allow_placeholders:
        faults += find_unused_bundles(pushed.bundles, folder / USAGE)
    if faults:
        listing = "".join(f"\n  {fault}" for fault in faults[:20])
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise KernelError(
            f"{folder / SUBMISSION} is not submitted because of {count}; ledger.csv in the same folder says what the "
            f"kernel did. To submit although models were not used, give --allow-placeholders. Found:{listing}"
        )
    logger.info("%s is valid", folder / SUBMISSION)


def submit_version(out: str | Path, message: str = "") -> Pushed:
    """Submit the pushed version to the kernel's competition; return the version's record, with the submission's number.

    If the competition takes a file instead of a notebook, the version's submission.csv is uploaded; if necessary, it is
    downloaded first. The submission's description is `message` with the kernel's name and version. If an interrupted call
    has already made the submission, the submission is recognised by its description and not repeated. Raises KernelError if
    the run is not complete or Kaggle refuses the submission.
    """
    pushed = _read_complete(out)
    if pushed.submission:
        return pushed
    if not pushed.competition:
        raise KernelError(f"{pushed.kernel} belongs to no competition; give its YAML file the key `competition`")
    client, number = KaggleClient(), 0
    if pushed.description:
        number = _find_submission(client, pushed)
    if not number:
        version = f"{pushed.kernel.split('/')[1]} version {pushed.version}"
        pushed = dataclasses.replace(pushed, description=f"{message} ({version})" if message else version)
        write_pushed(out, pushed)
        number = _submit(client, pushed, out)
    pushed = dataclasses.replace(pushed, submission=number, submitted=_now())
    write_pushed(out, pushed)
    logger.info("submitted %s to %s: submission %d", pushed.name, pushed.competition, number)
    return pushed


def wait_for_score(out: str | Path, wait_s: float = WAIT_S, poll_s: float = POLL_S) -> Pushed:
    """Wait until Kaggle has scored the submission; return the pushed version's record, with the scores.

    If the version uses a run's fusion settings, the scores are also written to this run's kaggle.json. The kit's leaderboard
    shows them next to the out-of-fold score. A score that Kaggle does not publish is None. Raises KernelError if nothing was
    submitted, if there is no score after `wait_s` seconds, or if the scoring failed; then the version can be resubmitted.
    """
    pushed = read_pushed(out)
    if not pushed.submission:
        raise KernelError(f"{pushed.name} was not submitted yet; submit it first, with --submit")
    if not pushed.scored:
        answer = _wait_for_answer(pushed, wait_s, poll_s)
        if answer.status.name.lower() != COMPLETE:
            write_pushed(out, dataclasses.replace(pushed, submission=0, description="", submitted=""))
            reason = answer.error_description.strip() or "it gave no reason"
            raise KernelError(
                f"Kaggle could not score submission {pushed.submission} of {pushed.name}: {reason}; see "
                f"https://www.kaggle.com/competitions/{pushed.competition}/submissions. Run --submit again, or push a "
                "corrected build"
            )
        public, private = (_parse_score(pushed, score) for score in (answer.public_score, answer.private_score))
        pushed = dataclasses.replace(pushed, public_score=public, private_score=private, scored=_now())
        write_pushed(out, pushed)
    if pushed.fused_run:
        _record_score(Path(pushed.fused_run), pushed)
    return pushed


def _wait_for_answer(pushed: Pushed, wait_s: float, poll_s: float) -> Any:
    """Wait until Kaggle has scored the submission or has failed to; return Kaggle's record of the submission."""
    client, report = KaggleClient(), _reporter(f"submission {pushed.submission}")

    def ask() -> Any:
        action = f"asking for submission {pushed.submission}"
        answer = _ask(client, action, lambda: client.api.get_submission(pushed.submission))
        status = answer.status.name.lower()
        report(status)
        return None if status == "pending" else answer

    answer = poll(ask, wait_s, poll_s)
    if answer is None:
        raise KernelError(
            f"submission {pushed.submission} has no score after {wait_s:g} s; run the command again to go on waiting"
        )
    return answer


def _parse_score(pushed: Pushed, text: str) -> float | None:
    """Return the number in a score's text, None if the text is empty."""
    try:
        score = float(text) if text else None
    except ValueError:
        score = math.nan
    if score is not None and not math.isfinite(score):
        raise KernelError(
            f"Kaggle's score of submission {pushed.submission} is {text!r}, expected a number; see "
            f"https://www.kaggle.com/competitions/{pushed.competition}/submissions, and run the command again"
        )
    return score


def _read_complete(out: str | Path) -> Pushed:
    pushed = read_pushed(out)
    if pushed.status != COMPLETE:
        raise KernelError(f"the run of {pushed.name} is not complete; wait for it first, with --wait")
    return pushed


def _ask(client: KaggleClient, action: str, call: Callable[[], Any]) -> Any:
    """Return the result of `call()`, a request to Kaggle. If Kaggle answers "not found", KaggleUnreachable is raised."""
    with client.calling(action):
        try:
            return call()
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code == requests.codes.not_found:
                raise KaggleUnreachable(f"{action}: Kaggle does not list this run or submission yet") from error
            raise


def _reporter(name: str) -> Callable[[str], None]:
    """Return a function that logs the status passed to it, if the status has changed or was last logged 5 minutes ago."""
    started, last = time.monotonic(), ("", 0.0)

    def report(status: str) -> None:
        nonlocal last
        now = time.monotonic()
        if status != last[0] or now - last[1] >= PROGRESS_S:
            logger.info("%s: %s after %.0f s", name, status, now - started)
            last = status, now

    return report


def _find_submission(client: KaggleClient, pushed: Pushed) -> int:
    """Return the number of the submission with the description in `pushed`; 0 if none exists or its scoring failed."""
    with client.calling(f"asking for the submissions to {pushed.competition}"):
        listed = client.api.competition_submissions(pushed.competition, page_size=SUBMISSIONS) or []
    found = (entry for entry in listed if entry and entry.description == pushed.description)
    return next((entry.ref for entry in found if entry.status.name.lower() not in FAILED), 0)


def _submit(client: KaggleClient, pushed: Pushed, out: str | Path) -> int:
    action, to = f"submitting {pushed.name} to {pushed.competition}", (pushed.description, pushed.competition)
    is_notebook = pushed.challenge.is_notebook
    file = SUBMISSION if is_notebook else str(fetch_output(out) / SUBMISSION)
    with client.calling(action):
        if is_notebook:
            answer = client.api.competition_submit_code(file, *to, pushed.kernel, pushed.version, quiet=True)
        else:
            answer = client.api.competition_submit(file, *to, quiet=True)
    if client.complaints() or not answer.ref:
        raise KernelError(f"{action}: Kaggle answered {answer.message or 'nothing'}{client.quote_output()}")
    return answer.ref


def _save_log(client: KaggleClient, pushed: Pushed, path: Path) -> str:
    """Write the run's log to `path`; return a text for an error message: its last lines, or why there is no log."""
    try:
        with client.calling(f"downloading the log of {pushed.name}"):
            log = client.api.kernels_logs(pushed.name)
    except KernelError as error:
        return f"\n{error}"
    try:
        # Kaggle's logs are JSON: a list of pieces of output.
        text = "".join(str(piece["data"]) for piece in json.loads(log))
    except (ValueError, TypeError, KeyError):
        text = log
    write_text(path, text)
    lines = "".join(f"\n  {line}" for line in text.rstrip().splitlines()[-LOG_LINES:])
    return f" The log is in {path} and ends with:{lines}" if lines else " The run has printed nothing."


def _record_score(run: Path, pushed: Pushed) -> None:
    """Write the scores into the run's kaggle.json, unless the run was removed or made again since the push."""
    if not (run / RECORD).is_file():
        logger.warning("%s is no longer the folder of a run; the score of %s is not saved", run, pushed.name)
        return
    try:
        started = str(json.loads((run / RECORD).read_text(encoding="utf-8")).get("started", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise KernelError(f"{run / RECORD} is damaged ({error!r}); the score is not saved in this run") from error
    if started > pushed.pushed:
        logger.warning("the run %s was made again after the push; the score of %s is not saved in it", run, pushed.name)
        return
    keys = ("kernel", "version", "competition", "description", "submission", "pushed", "submitted", "scored")
    scores = {"public_score": pushed.public_score, "private_score": pushed.private_score}
    add_score(run, {key: getattr(pushed, key) for key in keys} | scores)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
