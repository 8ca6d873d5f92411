"""Check the files that a kernel has written to its output folder, in a rehearsal or on Kaggle."""

import json
from collections.abc import Sequence
from pathlib import Path

from kitlib.kernels.spec import KernelSpec

USAGE = "usage.json"  # in the kernel's output: how many files each bundle has predicted, see SubmissionRun.usage


def check_result(spec: KernelSpec, working: Path, ids: tuple[str, ...]) -> tuple[str, bool, tuple[str, ...]]:
    """Check the kernel's result file; return the file's path below `working`, whether the run can be resumed, and faults.

    A kernel that submits must write submission.csv with the ids `ids`. Any other kernel that makes a run must write
    metrics.json in the run's folder. A missing file is a fault. If there is no run, the path is "" and there are no faults.
    """
    if spec.is_submission:
        result = working / "submission.csv"
        faults = (
            tuple(map(str, spec.rules.find_faults(list(ids), result, "the sample submission")))
            if result.is_file()
            else (f"{result.name} does not exist in {working}",)
        )
        return result.name, False, faults
    run = spec.run_folder(rehearsed=True)
    if run is None:
        return "", False, ()
    result, record = working / run / "metrics.json", working / run / "record.json"
    if result.is_file():
        return f"{run}/{result.name}", False, ()
    # A training run that ended at its session's deadline has left a record and checkpoints.
    unfinished = record.is_file() and any((working / run).rglob("checkpoints"))
    return f"{run}/{result.name}", unfinished, (f"{run}/{result.name} does not exist in {working}",)


def list_bundles(weights: Path) -> tuple[str, ...]:
    """Return the names of the bundles (trained models) in the folder `weights`; () if the folder does not exist."""
    if not weights.is_dir():
        return ()
    manifest = json.loads((weights / "weights.json").read_text(encoding="utf-8"))
    return tuple(entry["folder"] for entry in manifest["bundles"])


def find_unused_bundles(names: Sequence[str], usage: Path) -> tuple[str, ...]:
    """Return a message for each bundle (trained model) in `names` with which not every readable file was predicted.

    `usage` is the path of the kernel's usage.json, which has the numbers of readable and of predicted files per bundle. If
    usage.json is missing or damaged, the only message says so.
    """
    unknown = f"so it is unknown which of the models {', '.join(names)} were used"
    if not usage.is_file():
        return (f"{usage.name} does not exist in {usage.parent}, {unknown}",)
    try:
        entries = json.loads(usage.read_text(encoding="utf-8"))
        used = {entry["bundle"]: (int(entry["predicted"]), int(entry["readable"])) for entry in entries}
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        return (f"{usage} is damaged ({error!r}), {unknown}",)
    counts = [(name, *used.get(name, (0, 0))) for name in names]
    return tuple(
        f"{name} predicted {predicted} of {readable} readable files; ledger.csv says why"
        for name, predicted, readable in counts
        if not 0 < predicted == readable
    )
