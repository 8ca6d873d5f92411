"""From a test folder of DICOM files to submission.csv: complete from the first seconds on, then only ever better.

What Kaggle's image may lack until the wheels are installed, and what takes seconds to import (torch), is imported inside the
functions: the first file is written before any of it.
"""

import json
import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kitlib.datasets.siim import read_test
from kitlib.deadline import Deadline, OutOfTime, session_limit, session_start
from kitlib.inference.install_wheels import install_wheels
from kitlib.paths import find_input
from kitlib.scoring.submission_csv import submission_ids, write_submission
from kitlib.scoring.validate import validate

if TYPE_CHECKING:
    from kitlib.fusion.ensemble_bundle import Ensemble
    from kitlib.fusion.model_fusion import FusionSettings
    from kitlib.inference.answer import AnsweringModel, Stacked
    from kitlib.inference.cached_lungs import CachedLungs
    from kitlib.xrays.cache import CachedXray, XrayCache
    from kitlib.xrays.worker import Outcome

logger = logging.getLogger(__name__)

# A model is judged too slow only after this many images beyond its first batch, which carries its start-up.
IMAGES_BEFORE_JUDGING = 32
# Fusing may go on until this share of the limit, beyond what is planned for predicting.
LAST_SHARE = 0.9


@dataclass(frozen=True)
class SubmitSettings:
    """How a submission spends its time."""

    time_limit_s: float = 9 * 3600.0  # the competition's limit for a notebook
    share: float = 0.65  # of the limit that is planned for: a scored rerun may be slower than the rehearsal
    longest_side: int = 0  # pixels of the decoded copy that every model reads; 0: as in training
    file_timeout_s: float = 20.0  # a file that takes longer to decode is given up
    workers: int = 0  # processes that decode; 0: one a core
    batch_size: int = 16


@dataclass
class Model:
    """One bundle of a submission and what it has predicted so far."""

    told: "AnsweringModel"
    chunks: list[pd.DataFrame] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # image_ids, with a box or without
    rows_as: tuple[str, int] = ("", 0)  # model and fold of its rows
    stopped: bool = False  # at its share of the time; it may go on later
    lungs_missed: int = 0  # of those seen, in whole instead of their lungs

    @property
    def folder(self) -> Path:
        return self.told.folder

    @property
    def answers(self) -> frozenset[str]:
        return self.told.answers

    def drop(self) -> None:
        self.chunks, self.seen, self.lungs_missed = [], [], 0

    def coverage(self) -> pd.DataFrame:
        """Which images this model has seen, as a table of image_id, model, fold."""
        return pd.DataFrame({"image_id": self.seen, "model": self.rows_as[0], "fold": self.rows_as[1]})


class SubmissionRun:
    """One test set on its way to one file: making it writes the priors, then `install`, `predict`, `finish`.

    `ledger` has a row a stage: the files it covered, its seconds, and what was dropped and why.
    """

    def __init__(self, competition: str | Path, output: str | Path, settings: SubmitSettings) -> None:
        """`competition` holds `test/` and `sample_submission.csv`, which names the rows; without it the files do."""
        began = time.monotonic()
        self.settings, self.output, self.sample = settings, Path(output), Path(competition) / "sample_submission.csv"
        limit, start = session_limit(settings.time_limit_s), session_start()
        self.deadline, self.last_deadline = Deadline(limit * settings.share, start), Deadline(limit * LAST_SHARE, start)
        self.rows: list[dict[str, Any]] = []
        self.models: list[Model] = []
        self.lungs: CachedLungs | None = None
        self.ensemble: Ensemble | None = None
        self.stacked: Stacked | None = None  # of the last fusing
        test = read_test(competition, headers=False)
        # Kaggle asks for the sample's rows, no more and no fewer; the files name them only where there is no sample.
        self.ids = test.sample_ids or submission_ids(test.study_ids, test.image_ids)
        self.images = test.images
        write_submission(self.output, self.ids)
        self._note("priors", len(self.ids), began, f"{limit:.0f} s allowed, {limit * settings.share:.0f} s planned for")
        for fault in test.faults.itertuples():
            self._note("listing", 1, began, f"{fault.file} {fault.row}: {fault.problem}")

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
            self._note("wheels", 0, began, _failure(error))

    def predict(self, weights: str, scratch: str | Path) -> None:
        """Run the bundles of the input `weights` in their order as far as time allows; replace the file after each.

        A bundle that fails or does not fit is a row of the ledger, never an error: what was fused before stays. Decoded
        images go into a new folder below `scratch` that is removed at the end.
        """
        began = time.monotonic()
        Path(scratch).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
            xrays = None
            try:
                with self.deadline.enforced():
                    from kitlib.xrays.cache import XrayCache

                    fusion = self._read_weights(find_input(weights))
                    longest_side = self.settings.longest_side or max(model.told.longest_side for model in self.models)
                    xrays = DecodedOnce(XrayCache(folder, longest_side), self.images, self.settings)
                self._predict_all(xrays, fusion)
            except (Exception, OutOfTime) as error:  # the file is there, whatever happens to the models
                self._note("predict", 0, began, _failure(error))
            finally:
                if xrays:
                    xrays.close()
                    self._note_decoding(xrays)
                self._note_lungs()
                if self.stacked:
                    self._note("ensemble", self.stacked.studies, time.monotonic() - self.stacked.seconds, self.stacked.note)

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

    def _read_weights(self, weights: Path) -> "FusionSettings":
        from kitlib.fusion.model_fusion import FusionSettings, read_settings
        from kitlib.inference.answer import read_answering_model

        told = json.loads((weights / "weights.json").read_text(encoding="utf-8"))
        for entry in told["bundles"]:
            began, folder = time.monotonic(), weights / entry["folder"]
            try:
                self.models.append(Model(read_answering_model(folder)))
            except (OSError, ValueError, KeyError) as error:  # the other bundles may be whole
                self._note(folder.name, 0, began, _failure(error))
        if not self.models:
            raise ValueError(f"{weights / 'weights.json'} names no bundle that can be used; see the rows above")
        if any(model.told.wants_masks for model in self.models):
            from kitlib.inference.cached_lungs import CachedLungs

            bundle = weights / told["lungs"] if "lungs" in told else None
            masked = any(each.told.masked for each in self.models)
            self.lungs = CachedLungs(bundle, masked, self.settings.batch_size)
        if "ensemble" in told:
            self._read_ensemble(weights / told["ensemble"])
        tuned = weights / "fusion.json"
        return read_settings(tuned) if tuned.is_file() else FusionSettings()

    def _read_ensemble(self, folder: Path) -> None:
        began = time.monotonic()
        try:
            from kitlib.fusion.ensemble_bundle import read_ensemble

            self.ensemble = read_ensemble(folder)
        except Exception as error:  # its learners are there all the same
            self._note("ensemble", 0, began, f"{_failure(error)}; the study models are fused as they are")

    def _predict_all(self, xrays: "DecodedOnce", fusion: "FusionSettings") -> None:
        for place, model in enumerate(self.models):
            # The first model to give an answer may end with a part of the images: a part predicted is worth more than none.
            # It leaves the first ones of other answers their share of the time. Any further model must fit whole.
            given = frozenset[str]().union(*(other.answers for other in self.models if other.seen))
            first, firsts = not model.answers <= given, 0
            for other in self.models[place:]:
                firsts += not other.answers <= given
                given |= other.answers
            budget = self.deadline.left() / (firsts if first else 1)
            if not self._run(model, xrays, fusion, budget, may_stop=first):
                return
        for model in self.models:
            if model.stopped and not self._run(model, xrays, fusion, self.deadline.left(), may_stop=True):
                return

    def _run(self, model: Model, xrays: "DecodedOnce", fusion: "FusionSettings", budget: float, may_stop: bool) -> bool:
        """Predict with one model and fuse; False once the planned time is up."""
        began, already, in_time = time.monotonic(), len(model.seen), True
        try:
            with self.deadline.enforced():
                note = self._predict_with(model, xrays, budget, may_stop)
        except OutOfTime:
            note, in_time = "time was up", False
        except Exception as error:  # one model's fault must cost neither the others nor the file
            note = _failure(error)
        if note and not may_stop:
            model.drop()
        self._note(model.folder.name, max(0, len(model.seen) - already), began, note)
        if model.lungs_missed:
            self._note(model.folder.name, model.lungs_missed, began, "no lungs found so far; seen whole in their place")
        if len(model.seen) > already:
            self._fuse(xrays, fusion)
        return in_time

    def _predict_with(self, model: Model, xrays: "DecodedOnce", budget: float, may_stop: bool) -> str:
        """Let the model predict what it has not seen yet; why it ended before the last image, "" if it did not."""
        from kitlib.inference.predict import load_predictor

        began, total, model.stopped = time.monotonic(), len(self.images), False
        if model.told.wants_masks and self.lungs is not None:
            self.lungs.begin()
        predictor = load_predictor(model.folder, batch_size=self.settings.batch_size, lungs=self.lungs)
        model.rows_as = predictor.model, predictor.fold
        already, missed, first = list(model.seen), model.lungs_missed, None
        with closing(predictor.predict(xrays.without(set(already)))) as chunks:
            for chunk in chunks:
                model.chunks.append(chunk)
                model.seen = [*already, *predictor.seen]
                model.lungs_missed = missed + predictor.lungs_missed
                now, seen = time.monotonic(), len(predictor.seen)
                first = first or (now, seen)
                left = total - len(model.seen)
                if may_stop and now - began > budget and left:
                    model.stopped = True
                    return f"stopped after its share of {budget:.0f} s; other images wait"
                if not may_stop and seen - first[1] >= IMAGES_BEFORE_JUDGING:
                    needed = now - began + left * (now - first[0]) / (seen - first[1])
                    if needed > budget:
                        return f"dropped: it needs {needed:.0f} s and {budget:.0f} s were left"
        return ""

    def _fuse(self, xrays: "DecodedOnce", fusion: "FusionSettings") -> None:
        """Fuse all that has been predicted, and replace the file."""
        from kitlib.inference.answer import fused_answer

        began = time.monotonic()
        try:
            with self.last_deadline.enforced():
                images = xrays.sized(self.images)
                detectors = [model for model in self.models if "boxes" in model.answers]
                classifiers = [model for model in self.models if "boxes" not in model.answers]
                fused, self.stacked = fused_answer(
                    [chunk for model in classifiers for chunk in model.chunks],
                    [chunk for model in detectors for chunk in model.chunks],
                    [model.coverage() for model in detectors],
                    images,
                    fusion,
                    self.ensemble,
                )
                studies, nones = fused.studies[~fused.studies.prior], fused.nones[~fused.nones.prior]
                on_priors = write_submission(self.output, self.ids, studies, nones, fused.detections)
                self._note("fuse and write", len(self.ids) - len(on_priors), began, f"{len(on_priors)} rows keep priors")
        except (Exception, OutOfTime) as error:  # the file of the step before stays, and later models may fuse again
            self._note("fuse and write", 0, began, _failure(error))

    def _note(self, stage: str, files: int, began: float, note: str = "") -> None:
        seconds = time.monotonic() - began
        self.rows.append({"stage": stage, "files": files, "seconds": round(seconds, 1), "note": note})
        logger.info("%s: %d files in %.1f s. %s", stage, files, seconds, note)

    def _note_lungs(self) -> None:
        if self.lungs is None:
            return
        now, found = time.monotonic(), self.lungs
        if found.fault:
            self._note("lungs", 0, now, found.fault)
        if found.segmented:
            note = f"{found.missed} without plausible lungs: seen whole" if found.missed else ""
            self._note("lungs", found.segmented, now - found.seconds, note)

    def _note_decoding(self, xrays: "DecodedOnce") -> None:
        now, outcomes = time.monotonic(), list(xrays.outcomes)
        for failed in (outcome for outcome in outcomes if outcome.status == "failed"):
            self._note("decode", 1, now, f"{failed.image_id} keeps its prior: {failed.reason}")
        for warning, count in Counter(warning for outcome in outcomes for warning in outcome.warnings).most_common():
            self._note("decode", count, now, f"read all the same: {warning}")
        if len(outcomes) < len(self.images):
            self._note(
                "decode", len(self.images) - len(outcomes), now, f"never decoded; {xrays.error or 'no model asked for them'}"
            )


class DecodedOnce:
    """All readable images of a test set, as often as asked: the first pass decodes, side by side with the model that reads.

    `outcomes` holds what became of each file so far; an error of the decoding itself ends every pass and stays in `error`.
    Passes may overlap: a model that was stopped may still be reading ahead in its thread when the next one begins.
    """

    def __init__(self, cache: "XrayCache", images: pd.DataFrame, settings: SubmitSettings) -> None:
        self.cache, self.error = cache, ""
        self.outcomes: list[Outcome] = []
        self._coming = cache.decode(images, workers=settings.workers or None, timeout_s=settings.file_timeout_s)
        self._one_at_a_time = threading.Lock()

    def without(self, image_ids: set[str]) -> Iterator["CachedXray"]:
        """One pass over all images but these."""
        place = 0
        while self._reaches(place):
            outcome = self.outcomes[place]
            place += 1
            if outcome.status != "failed" and outcome.image_id not in image_ids:
                yield self.cache.read(outcome.image_id)

    def sized(self, images: pd.DataFrame) -> pd.DataFrame:
        """Those of `images` that are decoded so far, with their original rows and columns."""
        sizes = {each.image_id: (each.rows, each.columns) for each in list(self.outcomes) if each.status != "failed"}
        images = images[images.image_id.isin(sizes)].copy()
        images[["rows", "columns"]] = [sizes[name] for name in images.image_id]
        return images

    def close(self) -> None:
        """Stop decoding, unless a thread that nobody listens to any more is still waiting for a file."""
        if self._one_at_a_time.acquire(timeout=2):
            self._coming.close()
            self._one_at_a_time.release()

    def _reaches(self, place: int) -> bool:
        with self._one_at_a_time:
            if place == len(self.outcomes):
                try:
                    self.outcomes.append(next(self._coming))
                except StopIteration:
                    return False
                except Exception as error:
                    self.error = _failure(error)
                    return False
            return True


def _failure(error: BaseException) -> str:
    """The error in the ledger's words; its traceback goes to the log."""
    if isinstance(error, OutOfTime):
        return "time was up"
    logger.error("a stage failed", exc_info=error)
    return f"failed: {type(error).__name__}: {error}"
