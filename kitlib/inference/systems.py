"""Systems of models that predict together, read from run folders, and combined as the runs say."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kitlib.bundle import RECORD as BUNDLE_RECORD
from kitlib.bundle import read_record
from kitlib.errors import BundleError, RunError
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.fusion.model_fusion import FusionSettings, read_settings
from kitlib.inference.answer import AnsweringModel, read_answering_model, read_any_model
from kitlib.lungs.finders import segmenter_digest
from kitlib.paths import find_run
from kitlib.runs.finished_run import read_metrics
from kitlib.runs.record import METRICS, RECORD
from kitlib.runs.run_kinds import find_kind, is_run, named_folder, walk_runs

logger = logging.getLogger(__name__)

NO_MODELS = (
    "no trained study model or detector {where}; run `make demo` to train some in runs/demo, or give another folder of runs"
)
# Kinds of runs that predict, in the order in which one is chosen among several: a combination before its parts.
PREDICTING = ("fusion", "ensemble", "study", "detector", "findings", "lungs", "applied lungs")


@dataclass(frozen=True)
class System:
    """Models that predict together. `name` is for people: the run and, for several, the runs that it combines.

    All models predict either rows of a submission (any of "study", "none" and "boxes"), or "classes", or "lungs".
    """

    name: str
    models: tuple[AnsweringModel, ...]
    fusion: FusionSettings = field(default_factory=FusionSettings)
    ensemble: Path | None = None  # bundle that stacks the study models or classifiers
    lungs: Path | None = None  # bundle of a segmenter, for models that use lung masks and for the page's layer "lungs"
    left_out: tuple[str, ...] = ()  # sentences about bundles that are not used

    @property
    def longest_side(self) -> int:
        """Longest side in pixels of the decoded copies that the models read, the same as in a submission of these models."""
        return max(model.longest_side for model in self.models)

    @property
    def answers(self) -> frozenset[str]:
        """What the models predict, see AnsweringModel."""
        return frozenset[str]().union(*(model.answers for model in self.models))

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the system's detectors."""
        return tuple(dict.fromkeys(model.model for model in self.models if "boxes" in model.answers))

    def with_detector(self, name: str) -> "System":
        """Return a system with `name` as its only detector, together with all models that are not detectors."""
        models = tuple(model for model in self.models if "boxes" not in model.answers or model.model == name)
        return replace(self, name=name, models=models)


def find_system(runs: str | Path) -> System:
    """Return the system of `runs`: a run that predicts, or a folder with one such run or one fusion or ensemble in it.

    `runs` is a path, or the name of a run (see `find_run`). Raises RunNotFound if it does not exist, and RunError if it is
    not finished, holds no model, or holds several of which none combines the others; also if the segmenter whose masks the
    models need is not found. The messages list the runs there are.
    """
    root = Path(runs) if Path(runs).is_dir() else find_run(runs)
    run = root if is_run(root) or find_kind(root) else _choose_run(root)
    read_metrics(run)
    kind = find_kind(run)
    if kind not in PREDICTING:
        raise RunError(
            f"{run} is a run of {f'the kind {kind!r}' if kind else 'an unknown kind'}, which predicts nothing; give a run "
            "of notebook 60 (a tuned fusion), 65, 40, 30, 25, 20, 14 or 12"
        )
    parameters = _read_parameters(run)
    system = read_system(run, kind, parameters, {})
    if any(model.wants_masks for model in system.models):
        folders = [*_folders_beside(run), *_lungs_runs(run, parameters)]
        system = read_system(run, kind, parameters, find_segmenters((find_kind(folder), folder) for folder in folders))
        if system.lungs is None:
            raise RunError(
                f"{system.name}: the models need the masks of the segmenter that found the lungs in their training, but no "
                f"run beside {run} has it; copy that run of notebook 14 there (lungs_run in the training's parameters)"
            )
    return system


def read_system(run: Path, kind: str, parameters: Mapping[str, Any], segmenters: Mapping[str, Path]) -> System:
    """Return the system of the finished run `run` of the kind `kind`, one of PREDICTING, with these `parameters`.

    `segmenters` maps digests to bundles (see `find_segmenters`). A fold that is not trained yet is missing in the system.
    Raises RunError if a run that it combines does not exist or has no model, BundleError or SettingsError if one is invalid.
    """
    if kind in ("lungs", "applied lungs"):
        bundles = _bundles(run)
        if not bundles:
            raise RunError(f"{run} has no trained model (fold*/bundle)")
        others = [f"{bundle.parent.name} is left out: one segmenter draws the masks." for bundle in bundles[1:]]
        return System(run.name, (read_any_model(bundles[0]),), left_out=tuple(others))
    if kind == "fusion":
        folders, fusion = _named_runs(run, parameters), read_settings(run / "fusion.json")
        ensemble = _named_run(parameters["study_ensemble"], run) if parameters.get("study_ensemble") else None
        name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
        return build_system(name, folders, fusion, ensemble / "ensemble" if ensemble else None, segmenters)
    if kind == "ensemble":
        folders = _named_runs(run, parameters)
        build = build_system if read_ensemble(run / "ensemble").key == "study_id" else _build_classifiers
        name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
        return build(name, folders, FusionSettings(), run / "ensemble", segmenters)
    build = _build_classifiers if kind == "findings" else build_system
    return build(run.name, [run], FusionSettings(), None, segmenters)


def build_system(
    name: str, folders: Sequence[Path], fusion: FusionSettings, ensemble: Path | None, segmenters: Mapping[str, Path]
) -> System:
    """Return the system of all study models and detectors in the runs `folders`, combined by `fusion` and `ensemble`.

    Bundles that cannot be used are named in `left_out`. Raises RunError if none can be used, or if the models need the masks
    of several segmenters.
    """
    models: dict[tuple[str, int], AnsweringModel] = {}
    left_out = []
    for folder in folders:
        for bundle in _bundles(folder):
            try:
                model = read_answering_model(bundle)
            except ValueError as error:
                left_out.append(f"{folder.name}/{bundle.parent.name} is left out: {error}.")
                continue
            if (other := models.setdefault((model.model, model.fold), model)) is not model:
                reason = f"{other.folder.parents[1].name} also has fold {model.fold} of {model.model}"
                left_out.append(f"{folder.name}/{bundle.parent.name} is left out: {reason}.")
    if not models:
        reasons = f" ({len(left_out)} bundles cannot be used; {left_out[0]})" if left_out else ""
        raise RunError(NO_MODELS.format(where=f"in {', '.join(map(str, folders))}{reasons}" if folders else "found"))
    # Sorted by fold, so that the first folds of all models come before their second folds, as in a submission.
    in_order = tuple(sorted(models.values(), key=lambda model: model.fold))
    return System(name, in_order, fusion, ensemble, _segmenter_of(name, in_order, segmenters), tuple(left_out))


def find_segmenters(runs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return a dict that maps each segmenter's digest to its bundle, with the bundles of runs that applied one first.

    `runs` are pairs of a kind (see `find_kind`) and a folder.
    """
    runs = list(runs)
    wanted = ("applied lungs", "lungs")
    bundles = [bundle for kind in wanted for of_run, folder in runs if of_run == kind for bundle in _bundles(folder)]
    by_digest: dict[str, Path] = {}
    for bundle in bundles:
        try:
            by_digest.setdefault(segmenter_digest(read_record(bundle)), bundle)
        except BundleError as error:
            logger.warning("the segmenter %s is left out: %s", bundle, error)
    return by_digest


def _build_classifiers(
    name: str, folders: Sequence[Path], fusion: FusionSettings, ensemble: Path | None, segmenters: Mapping[str, Path]
) -> System:
    """Return the system of all classifiers of own classes in the runs `folders`, each with all of its (nested) folds.

    A learner's folds may be in several runs. Raises RunError if there is none, or if their classes differ; any other bundle
    is an error too, because without it the probabilities would be others.
    """
    models = tuple(read_any_model(bundle) for folder in folders for bundle in _bundles(folder))
    if not models or {model.answers for model in models} != {frozenset({"classes"})}:
        raise RunError(f"{name}: not every run has trained classifiers (fold*/bundle): {', '.join(map(str, folders))}")
    if len({model.classes for model in models}) > 1:
        raise RunError(f"{name}: the classes of {models[0].folder} and of another model differ")
    return System(name, models, fusion, ensemble, _segmenter_of(name, models, segmenters))


def _segmenter_of(name: str, models: Sequence[AnsweringModel], segmenters: Mapping[str, Path]) -> Path | None:
    digests = {model.segmenter for model in models if model.wants_masks}
    if len(digests) > 1:
        raise RunError(f"{name}: the models need masks from {len(digests)} segmenters, but a submission can use only one")
    return segmenters.get(next(iter(digests))) if digests else next(iter(segmenters.values()), None)


def _bundles(run: Path) -> list[Path]:
    """Return a run's own bundle, or those of its folds, nested ones included, in the order of their paths."""
    if (run / "bundle" / BUNDLE_RECORD).is_file():
        return [run / "bundle"]
    return sorted(path.parent for pattern in ("", "outer*/") for path in run.glob(f"{pattern}fold*/bundle/{BUNDLE_RECORD}"))


def _choose_run(root: Path) -> Path:
    """Return the run below `root` that predicts: the only fusion, else the only ensemble, else the only other run."""
    kinds = {run: find_kind(run) for run in walk_runs(root)}
    finished = [run for run, kind in kinds.items() if kind in PREDICTING and (run / METRICS).is_file()]
    for wanted in (PREDICTING[:1], PREDICTING[1:2], PREDICTING[2:5], PREDICTING[5:]):
        chosen = [run for run in finished if kinds[run] in wanted]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            listing = "\n  ".join(f"{run} ({kinds[run]})" for run in chosen)
            raise RunError(f"{len(chosen)} runs in {root} can predict; give one, or fuse them (notebook 60):\n  {listing}")
    there = ", ".join(f"{run.relative_to(root)} ({kind or 'other'})" for run, kind in kinds.items()) or "no run"
    raise RunError(f"{root} has no finished run that can predict, only: {there}; `make demo` trains some in runs/demo")


def _read_parameters(run: Path) -> dict[str, Any]:
    """Return the parameters in a run's record, or {} if it has no record."""
    path = run / RECORD
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("parameters") or {}) if path.is_file() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}); copy the run again, or repeat its notebook") from error


def _named_runs(run: Path, parameters: Mapping[str, Any]) -> list[Path]:
    if not (names := parameters.get("runs")):
        raise RunError(f"{run / RECORD} names no runs that it combines (the parameter runs); repeat its notebook")
    return [_named_run(name, run) for name in names]


def _named_run(name: object, run: Path) -> Path:
    """Return the folder of the run that the parameters of `run` call `name`. Raises RunError if there is no such folder.

    If `name` is an absolute path, a folder next to `run` with the same last part is preferred, because the runs may have
    been moved together.
    """
    sibling = run.parent / Path(name).name if isinstance(name, str) and Path(name).is_absolute() else None
    folder = sibling if sibling is not None and sibling.is_dir() else named_folder(name, run)
    if folder is None:
        raise RunError(f"{run} combines the run {name}, which was not found; copy it to {run.parent}")
    return folder


def _folders_beside(run: Path) -> list[Path]:
    return sorted(folder for folder in run.parent.iterdir() if folder.is_dir())


def _lungs_runs(run: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Return the runs of notebook 14 that `run`, or the runs that it combines, name as their lungs_run."""
    trained = [run, *(_named_run(name, run) for name in parameters.get("runs") or [])]
    named = [named_folder(_read_parameters(folder).get("lungs_run"), folder) for folder in trained]
    return [folder for folder in named if folder is not None]
