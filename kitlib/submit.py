"""From a test folder of DICOM files to submission.csv: complete from the first seconds on, then only ever better.

What Kaggle's image may lack until the wheels are installed, and what takes seconds to import (torch), is imported inside the
functions: the first file is written before any of it.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kitlib.deadline import Deadline, OutOfTime, session_limit
from kitlib.install_wheels import install_wheels
from kitlib.siim import read_test
from kitlib.submission import read_ids, submission_ids, write_submission
from kitlib.tables import concatenate
from kitlib.validate import validate

if TYPE_CHECKING:
    from kitlib.cache import CachedXray, Outcome, XrayCache
    from kitlib.fusion import FusionSettings

logger = logging.getLogger(__name__)

# A model is judged too slow only after this many images: the first batches carry its start-up.
IMAGES_BEFORE_JUDGING = 32
# Kept back at the end for fusing and writing, at least this share of what is planned for.
SHARE_FOR_FUSION = 0.05


@dataclass(frozen=True)
class SubmitSettings:
    """How a submission spends its time."""

    time_limit_s: float = 9 * 3600.0  # the competition's limit for a notebook
    share: float = 0.65  # of the limit that is planned for: a scored rerun may be slower than the rehearsal
    longest_side: int = 1024  # pixels of the decoded copy that every model reads
    file_timeout_s: float = 20.0  # a file that takes longer to decode is given up
    workers: int = 0  # processes that decode; 0: one a core
    batch_size: int = 16


class SubmissionRun:
    """One test set on its way to one file: making it writes the priors, then `predict`, then `finish`.

    `ledger` has a row a stage: the files it covered, its seconds, and what was dropped and why.
    """

    def __init__(self, competition: str | Path, output: str | Path, settings: SubmitSettings) -> None:
        """`competition` holds `test/` and `sample_submission.csv`, which names the rows; without it the files do."""
        began = time.monotonic()
        self.settings, self.output, self.sample = settings, Path(output), Path(competition) / "sample_submission.csv"
        limit = session_limit(settings.time_limit_s)
        self.deadline = Deadline(limit * settings.share, _session_start())
        self.rows: list[dict[str, Any]] = []
        test = read_test(competition, headers=False)
        # Kaggle asks for the sample's rows, no more and no fewer; the files name them only where there is no sample.
        listed = read_ids(self.sample) if self.sample.is_file() else []
        self.ids = listed or submission_ids(test.study_ids, test.image_ids)
        self.images = test.images
        self.predicted: dict[str, list[pd.DataFrame]] = {"study": [], "detector": []}
        self.coverage: list[pd.DataFrame] = []  # which detector has seen which image
        write_submission(self.output, self.ids)
        self._note("priors", len(self.ids), began, f"{limit:.0f} s allowed, {limit * settings.share:.0f} s planned for")
        for fault in test.faults.itertuples():
            self._note("listing", 1, began, f"{fault.file}: {fault.problem}")

    @property
    def ledger(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["stage", "files", "seconds", "note"])

    def install(self, wheels: str) -> None:
        """Install the attached dataset `wheels`; "" where nothing is missing. A failure is a row of the ledger."""
        if not wheels:
            return
        began = time.monotonic()
        try:
            with self.deadline.enforced():
                self._note("wheels", len(install_wheels(wheels)), began)
        except (Exception, OutOfTime) as error:  # models that need no wheel may still run, and the file is there
            self._note("wheels", 0, began, f"failed: {type(error).__name__}: {error}")

    def predict(self, weights: str | Path, scratch: str | Path) -> None:
        """Run the bundles of `weights`/weights.json in their order as far as time allows; replace the file after each.

        A bundle that fails or does not fit is a row of the ledger, never an error: what was fused before stays. `scratch`
        takes the decoded images and is removed at the end.
        """
        began, weights = time.monotonic(), Path(weights)
        try:
            with self.deadline.enforced():
                from kitlib.cache import XrayCache
                from kitlib.fusion import read_settings

                settings = read_settings(weights / "fusion.json")
                bundles = json.loads((weights / "weights.json").read_text(encoding="utf-8"))["bundles"]
                xrays = DecodedOnce(XrayCache(scratch, self.settings.longest_side), self.images, self.settings)
                for place, bundle in enumerate(bundles):
                    kinds_ahead = {later["kind"] for later in bundles[place:]}
                    self._run(weights / bundle["folder"], bundle["kind"], kinds_ahead, xrays, settings)
                for failed in (outcome for outcome in xrays.outcomes if outcome.status == "failed"):
                    self._note("decode", 1, time.monotonic(), f"{failed.image_id} keeps its prior: {failed.reason}")
        except Exception as error:
            logger.exception("predicting failed")
            self._note("predict", 0, began, f"failed: {type(error).__name__}: {error}")
        except OutOfTime:
            self._note("deadline", 0, began, "time was up; the file holds all that was fused by then")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def finish(self) -> pd.DataFrame:
        """Validate the file against the sample and return the ledger. Raises ValueError if Kaggle would refuse it."""
        began = time.monotonic()
        if not self.sample.is_file():
            self._note("validate", len(self.ids), began, "no sample_submission.csv to validate against")
            return self.ledger
        faults = validate(self.sample, self.output)
        self._note("validate", len(self.ids), began, "valid" if not faults else f"{len(faults)} faults, first: {faults[0]}")
        if faults:
            raise ValueError(f"{self.output} would be refused: {len(faults)} faults, first: {faults[0]}")
        return self.ledger

    def _run(self, folder: Path, kind: str, kinds_ahead: set[str], xrays: "DecodedOnce", settings: "FusionSettings") -> None:
        began, total = time.monotonic(), len(self.images)
        # The first model of a kind may end with a part of the images: a part predicted is worth more than none. It leaves
        # the other kinds their share of the time. Any further model must fit whole.
        uncovered = {other for other in kinds_ahead if not self.predicted[other]}
        first_of_kind = kind in uncovered
        budget = self.deadline.left() * (1 - SHARE_FOR_FUSION) / (len(uncovered) if first_of_kind else 1)
        chunks: list[pd.DataFrame] = []
        seen, note, struck = [], "", False
        try:
            from kitlib.predict import load_predictor

            predictor = load_predictor(folder, batch_size=self.settings.batch_size)
            seen = predictor.seen
            for chunk in predictor.predict(xrays):
                chunks.append(chunk)
                used = time.monotonic() - began
                needed = used * total / len(seen)
                if first_of_kind and used > budget and len(seen) < total:
                    note = f"stopped after its share of {budget:.0f} s; the other images keep their priors"
                    break
                if not first_of_kind and len(seen) >= min(total, IMAGES_BEFORE_JUDGING) and needed > budget:
                    note = f"dropped: it needs {needed:.0f} s and {budget:.0f} s were left"
                    break
        except OutOfTime:  # fusing takes a moment, and the planned share leaves one
            struck, note = True, "time was up"
        except Exception as error:  # one model's fault must cost neither the others nor the file
            logger.exception("%s failed", folder.name)
            note = f"failed: {type(error).__name__}: {error}"
        if note and not first_of_kind:
            chunks = []
        self._note(folder.name, len(seen) if chunks else 0, began, note)
        if chunks:
            self.predicted[kind] += chunks
            if kind == "detector":
                names = pd.concat(chunks)[["model", "fold"]].drop_duplicates()
                self.coverage.append(pd.DataFrame({"image_id": seen}).merge(names, how="cross"))
            self._fuse(xrays.outcomes, settings)
        if struck:
            raise OutOfTime

    def _fuse(self, outcomes: list["Outcome"], settings: "FusionSettings") -> None:
        """Fuse all that has been predicted, and replace the file."""
        from kitlib.fusion import fuse
        from kitlib.predict import study_and_image_scores

        began = time.monotonic()
        try:
            sizes = {each.image_id: (each.rows, each.columns) for each in list(outcomes) if each.status != "failed"}
            images = self.images[self.images.image_id.isin(sizes)].copy()
            images[["rows", "columns"]] = [sizes[name] for name in images.image_id]
            study_scores, image_scores = study_and_image_scores(self.predicted["study"], images)
            detections = concatenate(self.predicted["detector"], "detections")
            coverage = pd.concat(self.coverage) if self.coverage else None
            fused = fuse(study_scores, image_scores, detections, images, settings, coverage)
            studies, nones = fused.studies[~fused.studies.prior], fused.nones[~fused.nones.prior]
            on_priors = write_submission(self.output, self.ids, studies, nones, fused.detections)
            self._note("fuse and write", len(self.ids) - len(on_priors), began, f"{len(on_priors)} rows keep priors")
        except Exception as error:  # the file of the step before stays, and later models may fuse again
            logger.exception("fusing failed")
            self._note("fuse and write", 0, began, f"failed: {type(error).__name__}: {error}")

    def _note(self, stage: str, files: int, began: float, note: str = "") -> None:
        seconds = time.monotonic() - began
        self.rows.append({"stage": stage, "files": files, "seconds": round(seconds, 1), "note": note})
        logger.info("%s: %d files in %.1f s. %s", stage, files, seconds, note)


class DecodedOnce:
    """All readable images of a test set, as often as asked: the first pass decodes, side by side with the model that reads.

    `outcomes` holds what became of each file so far. Passes may overlap: a model that was stopped may still be reading ahead
    in its thread when the next one begins.
    """

    def __init__(self, cache: "XrayCache", images: pd.DataFrame, settings: SubmitSettings) -> None:
        self.cache, self.outcomes = cache, []
        self._coming = cache.decode(images, workers=settings.workers or None, timeout_s=settings.file_timeout_s)
        self._one_at_a_time = threading.Lock()

    def __iter__(self) -> Iterator["CachedXray"]:
        place = 0
        while True:
            with self._one_at_a_time:
                if place == len(self.outcomes):
                    outcome = next(self._coming, None)
                    if outcome is None:
                        return
                    self.outcomes.append(outcome)
            outcome = self.outcomes[place]
            place += 1
            if outcome.status != "failed":
                yield self.cache.read(outcome.image_id)


def _session_start() -> float | None:
    """When a kernel's first cell ran, in seconds of time.monotonic(); None outside a kernel."""
    return float(os.environ["KIT_STARTED"]) if "KIT_STARTED" in os.environ else None
