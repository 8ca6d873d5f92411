"""Robustness: submissions killed at random moments, submissions with too little time, and decoding of damaged files.

Part of `make bench`. Needs the weights and the phantoms of `make demo`, or others by --weights and --competition. Every
submission must be valid, every run must end within its time limit, and every damaged file must have an outcome.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.processes import kill_family
from kitlib.scoring.validate import validate
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.writing import WRITABLE, write_xray

# Arguments of `main` for the tests, with which it takes some seconds and needs no weights.
SMALLEST = {"kills": 0, "files": 60}
# What notebook 70 does, without papermill.
SUBMIT = """
import sys
from kitlib.competitions.registry import choose_competition
competition, output, weights, scratch = sys.argv[1:]
choose_competition("siim-covid19-detection")[0].write_first(competition, output)
from kitlib.inference.submit import SubmissionRun, SubmitSettings
run = SubmissionRun(competition, output, SubmitSettings(longest_side=512))
run.predict(weights, scratch)
run.finish()
"""
SHARES = (0.1, 0.2, 0.5)  # of the time that an undisturbed run needs


class Submission:
    """A run of SUBMIT in a process of its own, in a new folder."""

    def __init__(self, competition: Path, weights: Path, folder: Path, limit_s: float | None = None) -> None:
        self.sample, self.output = competition / "sample_submission.csv", folder / "submission.csv"
        folder.mkdir(parents=True)
        SIIM_COVID19.write_baseline(self.sample, folder / "placeholders.csv")
        self.placeholders = (folder / "placeholders.csv").read_bytes()
        self.started = time.monotonic()
        limit = {"KIT_TIME_LIMIT_S": f"{limit_s}", "KIT_STARTED": f"{self.started}"} if limit_s else {}
        command = [sys.executable, "-c", SUBMIT, competition, self.output, weights, folder / "scratch"]
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=os.environ | limit, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def is_answered(self) -> bool:
        """Whether the submission has predictions of a model, and not only placeholder predictions."""
        return self.output.is_file() and self.output.read_bytes() != self.placeholders

    def wait_for_answer(self) -> float:
        """Wait until the submission has predictions of a model, or the process ends; return the seconds since its start."""
        while self.process.poll() is None and not self.is_answered:
            time.sleep(0.01)
        return time.monotonic() - self.started

    def faults(self) -> int:
        """Return the number of faults in the submission; a missing file counts as one fault."""
        return len(validate(self.sample, self.output))


def kill_at_random(
    competition: Path, weights: Path, folder: Path, count: int, rng: random.Random, table: Table
) -> tuple[float, int]:
    """Kill `count` runs, half of them after the first model has predicted.

    Returns the seconds of an undisturbed run, and the number of killed runs that left no valid file.
    """
    undisturbed = Submission(competition, weights, folder / "undisturbed")
    first_s = undisturbed.wait_for_answer()
    if undisturbed.process.wait() or not undisturbed.is_answered:
        raise RuntimeError(f"the undisturbed run failed:\n{(folder / 'undisturbed' / 'log.txt').read_text()[-2000:]}")
    needed_s = time.monotonic() - undisturbed.started
    invalid, answered, early = 0, 0, 0
    for number in range(count):
        run = Submission(competition, weights, folder / f"kill{number}")
        if number % 2:
            run.wait_for_answer()
            time.sleep(rng.uniform(0, needed_s - first_s))
        else:
            time.sleep(rng.uniform(0, needed_s))
        kill_family(run.process.pid)
        run.process.wait()
        if run.output.is_file():
            invalid += bool(run.faults())
            answered += run.is_answered
        else:
            early += 1  # before Python had started; there was no time to write anything
    table.add_row(
        f"{count} runs killed within {needed_s:.1f} s",
        f"{invalid} files invalid; {answered} with answers, {count - answered - early} with placeholders, {early} not begun",
    )
    return needed_s, invalid


def stop_early(competition: Path, weights: Path, folder: Path, needed_s: float, table: Table) -> int:
    """Run with time limits of SHARES of `needed_s`; return the number of runs that ended late or left an invalid file."""
    bad = 0
    for share in SHARES:
        limit_s = share * needed_s
        run = Submission(competition, weights, folder / f"limit{share}", limit_s)
        run.process.wait()
        seconds, faults = time.monotonic() - run.started, run.faults()
        bad += seconds > limit_s or faults > 0
        outcome = f"{seconds:.1f} s, {faults} faults, {'answers' if run.is_answered else 'placeholders'}"
        table.add_row(f"limit of {limit_s:.1f} s, {share:g} of the needed time", outcome)
    return bad


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return `content` cut short, with changed bytes, with a block of zeros or noise, or a block repeated or missing."""
    kind, at = rng.randrange(6), rng.randrange(len(content))
    end = min(len(content), at + rng.choice((1, 4, 64, 1024)))
    if kind == 0:
        return content[:at]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(min(len(content), rng.choice((1000, len(content)))))] = rng.randrange(256)
        return bytes(changed)
    block = {2: bytes(end - at), 3: rng.randbytes(end - at), 4: 2 * content[at:end], 5: b""}[kind]
    return content[:at] + block + content[end:]


def decode_damaged(folder: Path, count: int, rng: random.Random, table: Table) -> int:
    """Damage `count` copies of small images in every format and decode them; return the number without an outcome."""
    folder.mkdir()
    stored = np.random.default_rng(0).integers(0, 256, (96, 80)).astype(np.uint8)
    originals = []
    for syntax in WRITABLE:
        write_xray(folder / f"{syntax}.dcm", stored, transfer_syntax=syntax)
        originals.append((folder / f"{syntax}.dcm").read_bytes())
    originals += [cv2.imencode(suffix, stored)[1].tobytes() for suffix in (".png", ".jpg")]
    images = []
    for number in range(count):
        path = folder / f"{number}.dcm"
        path.write_bytes(damage(originals[number % len(originals)], rng))
        images.append({"image_id": str(number), "path": str(path)})
    began = time.monotonic()
    outcomes = list(XrayCache(folder / "cache", 64).decode(pd.DataFrame(images), timeout_s=20))
    seconds = time.monotonic() - began
    statuses = Counter(outcome.status for outcome in outcomes)
    warned = sum(bool(outcome.warnings) for outcome in outcomes)
    slow = sum("not decoded in" in outcome.reason for outcome in outcomes)
    died = sum("crashed its process" in outcome.reason for outcome in outcomes)
    table.add_row(
        f"{count} damaged files in {len(originals)} formats, {seconds:.0f} s",
        f"{statuses['decoded']} decoded, {warned} with a warning; {statuses['failed']} failed with a reason, {slow} of them "
        f"for lack of time, {died} with their process",
    )
    return count - len({outcome.image_id for outcome in outcomes})


def main(
    weights: Annotated[Path, typer.Option(exists=True, help="folder with weights.json")] = Path("runs/demo/kernel/weights"),
    competition: Annotated[Path, typer.Option(exists=True)] = Path("inputs/demo/siim-covid19-detection"),
    kills: Annotated[int, typer.Option(help="number of killed runs; 0: only damaged files")] = 10,
    files: Annotated[int, typer.Option(help="number of damaged files")] = 2000,
    seed: int = 0,
) -> None:
    rng, table, bad = random.Random(seed), Table("what", "outcome", title="Survival"), 0
    with tempfile.TemporaryDirectory() as folder:
        if kills:
            needed_s, bad = kill_at_random(competition.absolute(), weights.absolute(), Path(folder), kills, rng, table)
            bad += stop_early(competition.absolute(), weights.absolute(), Path(folder), needed_s, table)
        bad += decode_damaged(Path(folder) / "damaged", files, rng, table)
    Console().print(table)
    if bad:
        raise SystemExit(f"{bad} runs or files did not survive")


if __name__ == "__main__":
    typer.run(main)
