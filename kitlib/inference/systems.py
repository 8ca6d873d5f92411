"""Reads systems of models from run folders; a system is a set of models whose predictions are combined."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kitlib.bundle import RECORD as BUNDLE_RECORD
from kitlib.bundle import read_record
from kitlib.classes import ONE_FINDING
from kitlib.competitions.contract import Competition
from kitlib.competitions.fusion_settings import FusionSettings
from kitlib.competitions.registry import find_competition
from kitlib.competitions.siim_covid19 import SIIM_COVID19, SiimFusion
from kitlib.errors import BundleError, RunError
from kitlib.fusion.ensemble_bundle import read_ensemble
from kitlib.fusion.model_fusion import read_settings
from kitlib.inference.answer import AnsweringModel, read_answering_model, read_any_model
from kitlib.lungs.finders import segmenter_digest
from kitlib.models.families import LUNGS, recorded_family
from kitlib.paths import find_run
from kitlib.runs.finished_run import read_metrics
from kitlib.runs.record import METRICS, RECORD
from kitlib.runs.run_kinds import find_kind, is_run, named_folder, walk_runs

logger = logging.getLogger(__name__)

NO_MODELS = (
    "no trained study model or detector {where}; run `make demo` to train some in runs/demo, or give another folder of runs"
)
FUSED = {"study", "none", "boxes"}  # kinds of predictions that `build_system` combines if there is no competition
# Kinds of runs that can predict, the preferred kind first: a combination is preferred to the runs that it combines.
PREDICTING = ("fusion", "ensemble", "study", "detector", "findings", "masks", "lungs", "applied lungs")


@dataclass(frozen=True)
class System:
    """A set of models whose predictions are combined, by `fusion` and optionally by an `ensemble`.

    The set is either a single model that predicts "lungs", or models that predict any of "study", "none", "boxes", "classes"
    and "masks". `fusion` has the settings with which predictions are merged. In a system of a fusion that was tuned for a
    competition, `competition` is this competition, and `settings` are the tuned settings: the settings for masks apply to
    all predictions, the settings for boxes and classes only to the competition's submission. `name` is shown to users: the
    name of the run, followed by the names of the runs that the run combines.
    """

    name: str
    models: tuple[AnsweringModel, ...]
    fusion: SiimFusion = field(default_factory=SiimFusion)
    ensemble: Path | None = None  # bundle that stacks the study models or classifiers
    lungs: Path | None = None  # bundle of a segmenter, for models that use lung masks and for the page's layer "lungs"
    notes: tuple[str, ...] = ()  # sentences to show with the predictions, such as which bundles are not used, and why
    competition: Competition | None = None
    settings: Any = None  # of the class competition.settings

    @property
    def longest_side(self) -> int:
        """Longest side of the decoded images, in pixels: the largest that any of the models was trained on."""
        return max(model.longest_side for model in self.models)

    @property
    def answers(self) -> frozenset[str]:
        """What the models predict, such as {"study", "none"}; see AnsweringModel."""
        return frozenset[str]().union(*(model.answers for model in self.models))

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the system's detectors."""
        return tuple(dict.fromkeys(model.model for model in self.models if "boxes" in model.answers))

    @property
    def findings(self) -> tuple[str, ...]:
        """Findings of the boxes that the system's detectors predict, in alphabetical order."""
        return tuple(sorted(self.classes("boxes")))

    def classes(self, answer: str = "classes") -> list[str]:
        """Return the classes of the models that predict `answer`, such as "boxes", in the order of the models."""
        return list(dict.fromkeys(name for model in self.models if answer in model.answers for name in model.classes))

    @property
    def fills_siim(self) -> bool:
        """Whether the predictions, such as those of a fusion for SIIM or of SIIM's study models, fill SIIM's submission."""
        if self.competition is not None:
            return self.competition is SIIM_COVID19
        return bool({"study", "none"} & self.answers) and set(self.findings) <= {ONE_FINDING} and self.answers <= FUSED

    def with_detector(self, name: str) -> "System":
        """Return a system with `name` as its only detector, together with all models that are not detectors."""
        models = tuple(model for model in self.models if "boxes" not in model.answers or model.model == name)
        return replace(self, name=name, models=models)


def find_system(runs: str | Path) -> System:
    """Return the system of models of a run, or of the preferred run in a folder of runs.

    `runs` is the path or the name of a run (see `find_run`), or a folder that contains runs. In a folder, the order of
    preference is: fusion, ensemble, other models, lung segmenter. Raises RunNotFound if `runs` does not exist. Raises
    RunError if no finished run can predict, if several rank first, or if the models' lung segmenter is not found.
    """
    root = Path(runs) if Path(runs).is_dir() else find_run(runs)
    run = root if is_run(root) or find_kind(root) else _choose_run(root)
    read_metrics(run)
    kind = find_kind(run)
    if kind not in PREDICTING:
        raise RunError(
            f"{run} is a run of {f'the kind {kind!r}' if kind else 'an unknown kind'}, which predicts nothing; give a run "
            "of one of the notebooks 12, 14, 20, 25, 30, 40, 60 (a tuned fusion) and 65"
        )
    parameters = _read_parameters(run)
    system = read_system(run, kind, parameters, {})
    if any(model.wants_masks for model in system.models):
        folders = [*_folders_beside(run), *_lungs_runs(run, parameters)]
        system = read_system(run, kind, parameters, find_segmenters((find_kind(folder), folder) for folder in folders))
        if system.lungs is None:
            raise RunError(
                f"{system.name}: the models need the masks of the segmenter that was used to train them, but no run next to "
                f"{run} contains this segmenter; copy the run of notebook 14 that the training's parameter `lungs_run` "
                f"names to {run.parent}"
            )
    return system


def read_system(run: Path, kind: str, parameters: Mapping[str, Any], segmenters: Mapping[str, Path]) -> System:
    """Return the system of models in the folder of a finished run.

    `kind` is the run's kind, one of PREDICTING, and `parameters` are the notebook's parameters in the run's record.
    `segmenters` maps digests of lung segmenters to bundles (see `find_segmenters`). Folds that are not trained yet are left
    out. Raises RunError if there is no model, or if a run that `run` combines does not exist. Raises BundleError or
    SettingsError if a file is invalid.
    """
    if kind in ("masks", "lungs", "applied lungs"):
        bundles = _bundles(run)
        if not bundles:
            raise RunError(f"{run} has no trained model (fold*/bundle)")
        models = tuple(map(read_any_model, bundles))
        if "masks" in models[0].answers:
            return System(run.name, models)
        others = [f"{bundle.parent.name} is left out: one segmenter draws the masks." for bundle in bundles[1:]]
        return System(run.name, models[:1], lungs=bundles[0], notes=tuple(others))
    if kind == "fusion":
        competition = find_competition(parameters.get("competition") or SIIM_COVID19.name)
        folders, settings = _named_runs(run, parameters), read_settings(run / "fusion.json", competition)
        merging = {each.name: getattr(settings, each.name) for each in fields(FusionSettings)}
        fusion = settings if isinstance(settings, SiimFusion) else SiimFusion(**merging)
        ensemble = _named_run(parameters["study_ensemble"], run) if parameters.get("study_ensemble") else None
        name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
        bundle = ensemble / "ensemble" if ensemble else None
        system = build_system(name, folders, fusion, bundle, segmenters, competition)
        return replace(system, competition=competition, settings=settings)
    if kind == "ensemble":
        folders = _named_runs(run, parameters)
        build = build_system if read_ensemble(run / "ensemble").key == "study_id" else _build_classifiers
        name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
        return build(name, folders, SiimFusion(), run / "ensemble", segmenters)
    build = _build_classifiers if kind == "findings" else build_system
    return build(run.name, [run], SiimFusion(), None, segmenters)


def build_system(
    name: str,
    folders: Sequence[Path],
    fusion: SiimFusion,
    ensemble: Path | None,
    segmenters: Mapping[str, Path],
    competition: Competition | None = None,
) -> System:
    """Return a system called `name` of the models in the run folders `folders`.

    If a `competition` is given, the system has every model that predicts what this competition's submission can use.
    Otherwise, it has every study model and detector. The settings `fusion` and the bundle `ensemble` (a folder or None)
    combine predictions. `segmenters` maps digests of lung segmenters to bundles. `notes` say which bundles are unusable,
    and why. Raises RunError if no bundle can be used, or if the models need masks from several segmenters.
    """
    models: dict[tuple[str, int], AnsweringModel] = {}
    notes = []
    for folder in folders:
        for bundle in _bundles(folder):
            try:
                model = read_answering_model(bundle, competition=competition) if competition else read_any_model(bundle)
                if not competition and not model.answers <= FUSED:
                    answers = ", ".join(model.answers)
                    raise ValueError(f"{model.model} predicts {answers}, which cannot be fused with study scores and boxes")
            except ValueError as error:
                notes.append(f"{folder.name}/{bundle.parent.name} is left out: {error}.")
                continue
            if (other := models.setdefault((model.model, model.fold), model)) is not model:
                reason = f"{other.folder.parents[1].name} also has fold {model.fold} of {model.model}"
                notes.append(f"{folder.name}/{bundle.parent.name} is left out: {reason}.")
    if not models:
        reasons = f" ({len(notes)} bundles cannot be used; {notes[0]})" if notes else ""
        raise RunError(NO_MODELS.format(where=f"in {', '.join(map(str, folders))}{reasons}" if folders else "found"))
    # Sorted by fold, so that the first folds of all models come before their second folds, as in a submission.
    in_order = tuple(sorted(models.values(), key=lambda model: model.fold))
    return System(name, in_order, fusion, ensemble, _segmenter_of(name, in_order, segmenters), tuple(notes))


def find_segmenters(runs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return a dict that maps the digest of each lung segmenter in `runs` to the folder of its bundle.

    `runs` are pairs of a run's kind (see `find_kind`) and its folder. If several runs have the same segmenter, the bundle of
    a run of the kind "applied lungs" is preferred.
    """
    runs = list(runs)
    wanted = ("applied lungs", "lungs")
    bundles = [bundle for kind in wanted for of_run, folder in runs if of_run == kind for bundle in _bundles(folder)]
    by_digest: dict[str, Path] = {}
    for bundle in bundles:
        try:
            record = read_record(bundle)
            if recorded_family(record, bundle).answers == LUNGS:
                by_digest.setdefault(segmenter_digest(record), bundle)
        except BundleError as error:
            logger.warning("the lung segmenter %s cannot be read and is not used: %s", bundle, error)
    return by_digest


def _build_classifiers(
    name: str, folders: Sequence[Path], fusion: SiimFusion, ensemble: Path | None, segmenters: Mapping[str, Path]
) -> System:
    """Return a system of the classifiers of all folds and nested folds in the run folders `folders`.

    The arguments are those of `build_system`. The folds of a learner may be in several runs. Raises RunError if a folder has
    no model, if a model is not a classifier, or if the classes differ. A bundle that cannot be used raises an error, because
    leaving out the bundle would change the probabilities.
    """
    by_run = [[read_any_model(bundle) for bundle in _bundles(folder)] for folder in folders]
    models = tuple(model for of_run in by_run for model in of_run)
    trained = [bool(of_run) and all(model.answers == {"classes"} for model in of_run) for of_run in by_run]
    if not models or not all(trained):
        others = ", ".join(str(folder) for folder, is_trained in zip(folders, trained, strict=True) if not is_trained)
        raise RunError(f"{name}: no trained classifiers (fold*/bundle) in: {others}")
    if other := next((model for model in models if model.classes != models[0].classes), None):
        both = f"{models[0].folder} and {other.folder}"
        raise RunError(f"{name}: {both} have different classes; give runs with equal classes")
    return System(name, models, fusion, ensemble, _segmenter_of(name, models, segmenters))


def _segmenter_of(name: str, models: Sequence[AnsweringModel], segmenters: Mapping[str, Path]) -> Path | None:
    digests = {model.segmenter for model in models if model.wants_masks}
    if len(digests) > 1:
        raise RunError(f"{name}: the models need {len(digests)} lung segmenters, but only one can be used; leave out models")
    return segmenters.get(next(iter(digests))) if digests else next(iter(segmenters.values()), None)


def _bundles(run: Path) -> list[Path]:
    """Return the bundle folders of a run: its own bundle or, if it has none, those of its folds and nested folds, sorted."""
    if (run / "bundle" / BUNDLE_RECORD).is_file():
        return [run / "bundle"]
    return sorted(path.parent for pattern in ("", "outer*/") for path in run.glob(f"{pattern}fold*/bundle/{BUNDLE_RECORD}"))


def _choose_run(root: Path) -> Path:
    """Return the folder of the preferred run below `root`; for the order of preference see `find_system`.

    Raises RunError with a list of the runs if no finished run can predict, or if several runs rank first.
    """
    kinds = {run: find_kind(run) for run in walk_runs(root)}
    finished = [run for run, kind in kinds.items() if kind in PREDICTING and (run / METRICS).is_file()]
    for wanted in (PREDICTING[:1], PREDICTING[1:2], PREDICTING[2:6], PREDICTING[6:]):
        chosen = [run for run in finished if kinds[run] in wanted]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            listing = "\n  ".join(f"{run} ({kinds[run]})" for run in chosen)
            raise RunError(f"{len(chosen)} runs in {root} can predict; give one, or fuse them (notebook 60):\n  {listing}")
    there = ", ".join(f"{run.relative_to(root)} ({kind or 'other'})" for run, kind in kinds.items()) or "no run"
    raise RunError(f"{root} has no finished run that can predict; found: {there}. `make demo` trains some in runs/demo")


def _read_parameters(run: Path) -> dict[str, Any]:
    """Return the notebook parameters in a run's record, or {} if the run has no record."""
    path = run / RECORD
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("parameters") or {}) if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}); copy the run again, or repeat its notebook") from error


def _named_runs(run: Path, parameters: Mapping[str, Any]) -> list[Path]:
    if not (names := parameters.get("runs")):
        raise RunError(
            f"the parameter `runs` in {run / RECORD} must list the runs that {run} combines, but is empty; run the notebook "
            f"that wrote {run} again"
        )
    return [_named_run(name, run) for name in names]


def _named_run(name: object, run: Path) -> Path:
    """Return the folder of a run to which the parameters of the run in `run` refer as `name`, a name or a path.

    If `name` is an absolute path, a folder with its last part next to `run` is preferred, because the runs may have been
    moved together. Raises RunError if the folder is not found.
    """
    sibling = run.parent / Path(name).name if isinstance(name, str) and Path(name).is_absolute() else None
    folder = sibling if sibling is not None and sibling.is_dir() else named_folder(name, run)
    if folder is None:
        raise RunError(f"{run} combines the run {name}, which was not found; copy it to {run.parent}")
    return folder


def _folders_beside(run: Path) -> list[Path]:
    return sorted(folder for folder in run.parent.iterdir() if folder.is_dir())


def _lungs_runs(run: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Return the folders that the parameter `lungs_run` states, in `run` and in each run that `run` combines."""
    trained = [run, *(_named_run(name, run) for name in parameters.get("runs") or [])]
    named = [named_folder(_read_parameters(folder).get("lungs_run"), folder) for folder in trained]
    return [folder for folder in named if folder is not None]
