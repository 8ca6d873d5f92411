"""Writes submission.csv for a test folder of DICOM files: a complete file within seconds, improved after each model.

Two kinds of packages are imported inside functions, so that the first file is written before they are needed: those that
Kaggle's Docker image may lack until the wheels are installed, and those that take seconds to import, such as torch.
"""

import json
import logging
import math
import queue
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kitlib.competitions.contract import Competition
from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.datasets.siim import studies_from_headers
from kitlib.deadline import Deadline, OutOfTime, session_limit, session_start
from kitlib.errors import SubmissionError
from kitlib.inference.install_wheels import install_wheels
from kitlib.inference.ledger import Ledger, describe_failure
from kitlib.inference.model_queue import Model, ModelQueue, Turn
from kitlib.paths import find_input, is_saved_version, on_kaggle
from kitlib.scoring.validate import Fault

if TYPE_CHECKING:
    from kitlib.competitions.fusion_settings import FusionSettings
    from kitlib.fusion.ensemble_bundle import Ensemble
    from kitlib.inference.answer import Stacked
    from kitlib.inference.cached_lungs import CachedLungs, LungsReport
    from kitlib.inference.decoded_once import DecodedOnce
    from kitlib.inference.predict import AnyPredictor
    from kitlib.inference.prediction_process import PredictionProcess, RemotePredictor

logger = logging.getLogger(__name__)

# A model can be dropped as too slow only after this many images beyond the first batch, whose time includes start-up.
IMAGES_BEFORE_JUDGING = 32
# Share of the time limit at which fusion must end; it is larger than the share that is planned for prediction.
LAST_SHARE = 0.9
# Validating and ending the processes gets as many seconds as starting them has taken, because both depend on the machine in
# the same way, but at most this many. This matters only for very short time limits; with others, LAST_SHARE leaves enough.
ENDING_S = 60.0


@dataclass(frozen=True)
class SubmitSettings:
    """Time limits and decoding options of a submission."""

    time_limit_s: float = 9 * 3600.0  # the competition's limit for a notebook
    share: float = 0.65  # share of the time limit to plan for: the scored rerun may be slower than the rehearsal
    longest_side: int = 0  # longest side, in pixels, of the decoded images; 0: the largest of the models' own
    file_timeout_s: float = 20.0  # files that take longer to decode are skipped
    workers: int = 0  # number of decoding processes; 0: one per core
    batch_size: int = 16
    processes: int = 0  # number of processes that predict in parallel; 0: one per GPU
    only_projections: bool = False  # skip files of other modalities, such as CT, instead of predicting them with a warning
    quick_save: int = 0  # number of files to predict when a version is saved on Kaggle (a scored rerun predicts all); 0: all


class SubmissionRun:
    """Writes one submission file for one test set; call `install`, `predict` and `finish` in this order.

    The constructor already writes a valid file of placeholder predictions (the class frequencies). `ledger` is a table that
    says for each stage how many files were processed, how long this took, and what was skipped and why.
    """

    def __init__(
        self,
        folder: str | Path,
        output: str | Path,
        settings: SubmitSettings,
        competition: Competition = SIIM_COVID19,
    ) -> None:
        """Write the placeholder predictions to `output`.

        `folder` has the competition's test images and the sample submission, which lists the ids to predict. If SIIM's
        sample submission is missing or cannot be read, the ids are those of the studies and images in `test/`.
        """
        began = time.monotonic()
        self.settings, self.output, self.competition = settings, Path(output), competition
        limit, start = session_limit(settings.time_limit_s), session_start()
        starting = 0.0 if start is None else began - start
        ending = min(starting, ENDING_S)
        latest = max(limit - ending, 1e-3)
        planned = max(min(limit * settings.share, latest), 1e-3)
        self.deadline = Deadline(planned, start)
        self.last_deadline = Deadline(max(min(limit * LAST_SHARE, latest), 1e-3), start)
        self._ledger = Ledger()
        self._note = self._ledger.note
        self.faults: list[Fault] = []  # of the submission, found by `finish`
        self.models: list[Model] = []
        self.has_answers = False  # whether any row of the submission is not a placeholder prediction
        self.listed: list[str] = []  # folders of the bundles in weights.json

        self.lungs: CachedLungs | None = None  # None if other processes find the lungs
        self.lungs_reports: list[LungsReport] = []  # of these processes
        self.ensemble: Ensemble | None = None
        self.stacked: Stacked | None = None  # result of the ensemble in the latest fusion
        test = competition.read_test(Path(folder))
        self.images, self.ids = test.images, test.submission_ids
        self.study_ids = test.study_ids if competition.study_classes else ()
        competition.write(self.output, self.ids, None)
        self._note("priors", len(self.ids), began, f"time limit {limit:.0f} s, planned {planned:.0f} s")
        if 0 < settings.quick_save < len(self.images) and is_saved_version():
            note = f"QUICK SAVE: only {settings.quick_save} of {len(self.images)} files are predicted; the scored rerun"
            self._note("quick save", settings.quick_save, began, f"{note} predicts all")
            self.images = self.images.head(settings.quick_save)
        self.readable = len(self.images)  # number of files to predict that were not found unreadable
        if self.deadline.left() <= 0:
            smallest = math.ceil(max(starting / settings.share, starting + ending))
            note = f"no time for models: starting took {starting:.1f} s; the smallest limit that allows any is {smallest} s"
            self._note("priors", 0, began, note)
        for problem, faults in test.faults.groupby("problem", sort=False):
            first, others = faults.iloc[0], f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            self._note("listing", len(faults), began, f"{first.file} {first.row}{others}: {problem}")

    @property
    def ledger(self) -> pd.DataFrame:
        """Table of the stages so far, with the columns `stage`, `files`, `seconds` and `note`."""
        return self._ledger.table()

    def install(self, wheels: str) -> None:
        """Install the wheels in the attached dataset `wheels` ("": none). A failure becomes a row of the ledger."""
        if not wheels:
            return
        began = time.monotonic()
        try:
            with self.deadline.enforced():
                self._note("wheels", len(install_wheels(wheels)), began)
        except (Exception, OutOfTime) as error:  # models that need no wheel may still run, and a valid file exists
            self._note("wheels", 0, began, describe_failure(error))

    def predict(self, weights: str, scratch: str | Path) -> None:
        """Predict with the bundles in the attached dataset `weights`, in order, while time remains.

        The submission is updated after each bundle. If a bundle fails or is too slow, the ledger gets a row, no error is
        raised, and the previous submission remains. Decoded images are written to a new folder below `scratch`, which is
        removed at the end.
        """
        began = time.monotonic()
        try:
            Path(scratch).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
                self._predict_in(folder, weights)
        except (Exception, OutOfTime) as error:  # a valid file exists, whatever happens to the models
            self._note("predict", 0, began, describe_failure(error))
        lungs = [] if self.lungs is None else [self.lungs.report()]
        self._ledger.note_lungs([*lungs, *self.lungs_reports])
        if self.stacked:
            self._note("ensemble", self.stacked.studies, time.monotonic() - self.stacked.seconds, self.stacked.note)

    def _predict_in(self, folder: str, weights: str) -> None:
        """Predict with the bundles in the attached dataset `weights`; decoded images are written to `folder`."""
        with self.deadline.enforced():
            from kitlib.inference.decoded_once import DecodedOnce
            from kitlib.xrays.cache import XrayCache

            fusion = self._read_weights(find_input(weights))
            self._find_studies()
            longest_side = self.settings.longest_side or max(model.record.longest_side for model in self.models)
            cache = XrayCache(folder, longest_side, self.settings.only_projections)
            workers, longest_s = self.settings.workers, self.settings.file_timeout_s
            xrays = DecodedOnce(cache, self.images, workers, longest_s, self.deadline.left())
        try:
            self._predict_all(xrays, fusion)
        finally:
            with closing(xrays):
                self._ledger.note_decoding(xrays, len(self.images))
                self.readable -= sum(outcome.status == "failed" for outcome in list(xrays.outcomes))

    def usage(self) -> list[dict[str, Any]]:
        """Return one dictionary per bundle in weights.json, with the keys "bundle", "predicted" and "readable".

        "bundle" is the bundle's name. "predicted" is the number of test images that the bundle has predicted, or 0 if the
        submission still has only placeholder predictions. "readable" is the number of readable test files.
        """
        predicted = {model.folder.name: model.count_predicted() * self.has_answers for model in self.models}
        return [{"bundle": name, "predicted": predicted.get(name, 0), "readable": self.readable} for name in self.listed]

    def finish(self) -> pd.DataFrame:
        """Validate the submission and return the ledger, with a new row: "valid", or why Kaggle would reject the file."""
        began = time.monotonic()
        self.faults = self.competition.find_faults(list(self.ids), self.output, "the sample submission")
        note = "valid"
        if self.faults:
            note = f"Kaggle would reject the file: {len(self.faults)} faults; the first is: {self.faults[0]}"
            logger.error(note)
        self._note("validate", len(self.ids), began, note)
        return self.ledger

    def check(self, allow_placeholders: bool) -> None:
        """Raise SubmissionError if `finish` has found a fault, or if all rows are placeholder predictions.

        If `allow_placeholders` is True, all rows may be placeholder predictions. On Kaggle, nothing is raised, because a
        notebook that ends with an error gets no score.
        """
        if on_kaggle():
            return
        if self.faults:
            raise SubmissionError(
                f"Kaggle would reject {self.output}: {len(self.faults)} faults; the first is: {self.faults[0]}"
            )
        if not (allow_placeholders or self.has_answers):
            used = ", ".join(model.folder.name for model in self.models if model.count_predicted())
            reason = f"no row uses the predictions of {used}" if used else "no model has predicted any file"
            raise SubmissionError(
                f"{self.output} contains only placeholder predictions: {reason}. The ledger says why. If placeholder "
                "predictions are intended, set 'allow_placeholders' to true"
            )

    def _find_studies(self) -> None:
        """Find the studies of images whose path does not contain the study: read them from the DICOM headers."""
        began, count = time.monotonic(), int((self.images.study_id == self.images.image_id).sum())
        if not count or not self.competition.study_classes:
            return
        try:
            self.images = studies_from_headers(self.images, self.study_ids)
            unknown = int((self.images.study_id == self.images.image_id).sum())
            self._note("studies", count, began, f"read from the headers; {unknown} images are of no study in the submission")
        except Exception as error:  # only these images' studies need it
            self._note("studies", 0, began, describe_failure(error))

    def _read_weights(self, weights: Path) -> "FusionSettings":
        from kitlib.fusion.model_fusion import read_settings
        from kitlib.inference.answer import read_answering_model

        contents = json.loads((weights / "weights.json").read_text(encoding="utf-8"))
        for entry in contents["bundles"]:
            began, name = time.monotonic(), str(entry)[:80]
            try:
                name = entry["folder"]
                self.listed.append(str(name))
                digest = entry.get("record_sha256", "")
                self.models.append(Model(read_answering_model(weights / name, digest, self.competition)))
            except Exception as error:  # the other bundles may be valid
                self._note(str(name), 0, began, describe_failure(error))
        if not self.models:
            raise ValueError(f"{weights / 'weights.json'} lists no usable bundle; the ledger's rows give the reasons")
        if any(model.record.wants_masks for model in self.models):
            from kitlib.inference.cached_lungs import CachedLungs

            masked = any(model.record.masked for model in self.models)
            bundle = weights / str(contents["lungs"]) if "lungs" in contents else None
            self.lungs = CachedLungs(bundle, masked, self.settings.batch_size)
        began = time.monotonic()
        try:
            if "ensemble" in contents:
                from kitlib.fusion.ensemble_bundle import read_ensemble

                self.ensemble = read_ensemble(weights / contents["ensemble"])
        except Exception as error:  # its learners can still be fused
            self._note("ensemble", 0, began, f"{describe_failure(error)}; the study models are fused without it")
        try:
            tuned = weights / "fusion.json"
            return read_settings(tuned, self.competition) if tuned.is_file() else self.competition.settings()
        except Exception as error:  # untuned settings are better than no fusion
            self._note("fusion.json", 0, began, f"{describe_failure(error)}; the models are fused with the default settings")
            return self.competition.settings()

    def _predict_all(self, xrays: "DecodedOnce", fusion: "FusionSettings") -> None:
        processes = self._prediction_processes(xrays)
        turns = ModelQueue(self.models, self.deadline, max(1, len(processes)))
        if processes:
            self._predict_side_by_side(turns, processes, xrays, fusion)
            return
        in_time = True
        while in_time and (turn := turns.next()):
            in_time, has_predicted = self._run(turn, xrays)
            if has_predicted:
                self._fuse(xrays, fusion, turn.model)

    def _prediction_processes(self, xrays: "DecodedOnce") -> "list[PredictionProcess]":
        """Return processes for predicting in parallel, not started yet; [] if this process alone predicts."""
        import torch

        from kitlib.device import visible_gpus
        from kitlib.inference.prediction_process import PredictionProcess, ProcessSettings

        gpus = visible_gpus()
        count = min(self.settings.processes or len(gpus), len(self.models))
        if count < 2:
            return []
        threads = max(1, torch.get_num_threads() // count)
        lungs = None if self.lungs is None else (self.lungs.bundle, self.lungs.masked)
        self.lungs = None  # each process finds lungs itself
        settings = ProcessSettings(xrays.cache, self.settings.batch_size, threads, lungs)
        return [PredictionProcess(settings, gpus[number % len(gpus)], self.deadline) for number in range(count)]

    def _predict_side_by_side(
        self, turns: ModelQueue, processes: "list[PredictionProcess]", xrays: "DecodedOnce", fusion: "FusionSettings"
    ) -> None:
        """Predict in several processes, one model at a time in each. This process fuses whenever a model has predicted."""
        finished: queue.SimpleQueue[Model | None] = queue.SimpleQueue()

        def work(process: "PredictionProcess") -> None:
            try:
                in_time = True
                while in_time and (turn := turns.next()):
                    in_time, has_predicted = self._run(turn, xrays, process)
                    if has_predicted:
                        finished.put(turn.model)
            finally:
                finished.put(None)

        threads = [threading.Thread(target=work, args=[process], daemon=True) for process in processes]
        for thread in threads:
            thread.start()
        try:
            working = len(threads)
            while working:
                model = finished.get(timeout=max(self.last_deadline.left(), 1e-3))
                working -= model is None
                if model is not None:
                    self._fuse(xrays, fusion, model)
        except queue.Empty:  # a thread could not end its process
            logger.error("a prediction process has not ended in time")
        finally:
            for process in processes:
                process.kill()
            self.lungs_reports += [process.lungs for process in processes if process.lungs is not None]

    def _run(self, turn: Turn, xrays: "DecodedOnce", process: "PredictionProcess | None" = None) -> tuple[bool, bool]:
        """Predict with one model in `process`, or in this process if it is None.

        Return whether some of the planned time is left, and whether the model has predicted further images.
        """
        began, model, before, in_time = time.monotonic(), turn.model, turn.model.predicted, True
        try:
            with self.deadline.enforced():
                note = self._predict_with(turn, xrays, process)
        except OutOfTime:
            note, in_time = "time was up", False
        except Exception as error:  # a fault of one model must not affect the other models or the file
            note = describe_failure(error)
        if note and not turn.may_stop:
            model.drop()
        predicted = model.predicted
        self._note(model.folder.name, max(0, len(predicted.seen) - len(before.seen)), began, note)
        if predicted.lungs_missed:
            self._note(model.folder.name, predicted.lungs_missed, began, "no lungs found so far; used uncropped")
        if predicted.overflowed:
            self._note(model.folder.name, predicted.overflowed, began, "overflowed in half precision; predicted in float32")
        model.running = False
        return in_time, len(predicted.seen) > len(before.seen)

    def _predict_with(self, turn: Turn, xrays: "DecodedOnce", process: "PredictionProcess | None") -> str:
        """Predict the images that the model has not predicted yet; return why it did not finish, or "" if it finished."""
        from kitlib.inference.predict import load_predictor

        began, model, before = time.monotonic(), turn.model, turn.model.predicted
        model.stopped, seen_before = False, set(before.seen)
        predictor: RemotePredictor | AnyPredictor
        if process is not None:
            predictor = process.load(model.folder)
            stream = predictor.predict(xrays.ids_without(seen_before), xrays.restore)
        else:
            if model.record.wants_masks and self.lungs is not None:
                self.lungs.begin()
            predictor = load_predictor(model.folder, batch_size=self.settings.batch_size, lungs=self.lungs)
            stream = predictor.predict(xrays.without(seen_before))
        first_batch = None
        with closing(stream) as chunks:
            for chunk in chunks:
                model.add(chunk, predictor, before)
                now, seen = time.monotonic(), len(predictor.seen)
                first_batch = first_batch or (now, seen)
                remaining = len(self.images) - len(model.predicted.seen)
                if turn.may_stop and now - began > turn.budget and remaining:
                    model.stopped = True
                    return f"stopped after its share of {turn.budget:.0f} s; {remaining} images remain"
                if not turn.may_stop and seen - first_batch[1] >= IMAGES_BEFORE_JUDGING:
                    needed = now - began + remaining * (now - first_batch[0]) / (seen - first_batch[1])
                    if needed > turn.budget:
                        return f"dropped: it needs {needed:.0f} s, but only {turn.budget:.0f} s remained"
        return ""

    def _fuse(self, xrays: "DecodedOnce", fusion: "FusionSettings", newest: Model) -> None:
        """Fuse all predictions so far and replace the submission.

        If fusion fails, the model `newest` is dropped, and the previous submission remains.
        """
        from kitlib.inference.answer import fused_answer

        began = time.monotonic()
        try:
            with self.last_deadline.enforced():
                ready = [model for model in self.models if model.may_be_fused]
                detectors, segmenters = (
                    [model.predicted for model in ready if answer in model.answers] for answer in ("boxes", "masks")
                )
                classifiers = [model.predicted for model in ready if not {"boxes", "masks"} & model.answers]
                images = xrays.sized(self.images)  # after the predictions, which are of images that have been decoded
                fused, self.stacked = fused_answer(
                    [chunk for predicted in classifiers for chunk in predicted.chunks],
                    [chunk for predicted in detectors for chunk in predicted.chunks],
                    [model.coverage() for model in ready if "boxes" in model.answers],
                    images,
                    fusion,
                    self.ensemble,
                    self.competition,
                    [chunk for predicted in segmenters for chunk in predicted.chunks],
                )
                on_priors = self.competition.write(self.output, self.ids, fused)
                self.has_answers = len(on_priors) < len(self.ids)
                note = f"{len(on_priors)} rows keep placeholder predictions"
                self._note("fuse and write", len(self.ids) - len(on_priors), began, note)
        except (OutOfTime, OSError, MemoryError) as error:  # no model's fault; the previous file remains
            self._note("fuse and write", 0, began, describe_failure(error))
        except Exception as error:  # every later fusion would fail as well
            self._note("fuse and write", 0, began, f"{describe_failure(error)}; {newest.folder.name} is dropped")
            newest.drop()
