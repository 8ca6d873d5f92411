"""Kaggle's scores of a run's submissions: kaggle.json in the run's folder."""

import json
from pathlib import Path
from typing import Any

from kitlib.atomic import write_json
from kitlib.errors import RunError

KAGGLE = "kaggle.json"


def add_score(run: str | Path, submission: dict[str, Any]) -> None:
    """Add a submission to kaggle.json in the folder `run`, or replace the submission of the same kernel and version.

    `submission` has at least the keys kernel, version, pushed (the time of the push, UTC, in ISO format), public_score and
    private_score. Raises RunError if kaggle.json is damaged.
    """
    path, same = Path(run) / KAGGLE, ("kernel", "version")
    try:
        submissions = json.loads(path.read_text(encoding="utf-8"))["submissions"] if path.is_file() else []
        others = [other for other in submissions if any(other[key] != submission[key] for key in same)]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); remove it and run the command again") from error
    write_json(path, {"submissions": [*others, submission]})


def current_score(kaggle: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the run's last submission in `kaggle` (the contents of kaggle.json), or {} if there is none.

    Submissions pushed before the run began are ignored, because they belong to an earlier run in the same folder. `record`
    is the contents of record.json.
    """
    submissions = kaggle.get("submissions")
    current = [
        submission
        for submission in (submissions if isinstance(submissions, list) else [])
        if isinstance(submission, dict) and str(submission.get("pushed", "")) >= str(record.get("started", ""))
    ]
    return current[-1] if current else {}
