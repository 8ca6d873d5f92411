"""Which models answer together: found in a folder of runs, as its fusions have put them together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kitlib.bundle import read_record
from kitlib.errors import BundleError, PageError
from kitlib.fusion.model_fusion import FusionSettings, read_settings
from kitlib.inference.answer import AnsweringModel, read_answering_model
from kitlib.leaderboard.listing import ListedRun
from kitlib.leaderboard.prepared import named_folder
from kitlib.lungs.finders import segmenter_digest

logger = logging.getLogger(__name__)

TRAINED = ("study", "detector")  # kinds of runs whose models answer rows of a submission
NO_MODELS = (
    "no trained study model or detector {where}; `make demo` trains some in runs/demo, or name another folder of runs"
)


@dataclass(frozen=True)
class System:
    """Models that answer together, as a submission of them would. `name` is what a person chooses it by."""

    name: str
    models: tuple[AnsweringModel, ...]
    fusion: FusionSettings
    ensemble: Path | None = None  # a bundle that stacks the study models
    lungs: Path | None = None  # a segmenter's bundle, for models that look at lungs and for people who want to see them
    left_out: tuple[str, ...] = ()  # sentences: bundles that cannot be used

    @property
    def longest_side(self) -> int:
        """Of the decoded copies that its models read, pixels: as a submission of these models decodes."""
        return max(model.longest_side for model in self.models)

    @property
    def detectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(model.model for model in self.models if "boxes" in model.answers))

    def with_detector(self, name: str) -> "System":
        """The same system with no other detector than this one."""
        models = tuple(model for model in self.models if "boxes" not in model.answers or model.model == name)
        return replace(self, name=name, models=models)


def find_systems(listed: Sequence[ListedRun]) -> list[System]:
    """Each finished fusion among `listed` with the models it fused, then the same with each of its detectors alone.

    Without a fusion all trained models answer with equal weights. Raises PageError where there is no model at all.
    """
    segmenters = _segmenters(listed)
    found = []
    for run in listed:
        if run.kind == "fusion" and run.state == "finished":
            try:
                found.append(_fused(run, segmenters))
            except (OSError, ValueError) as error:
                logger.warning("the fusion %s is left out: %s", run.name, error)
    if not found:
        trained = [run.folder for run in listed if run.kind in TRAINED and run.state == "finished"]
        found = [_system("all models, equal weights", trained, FusionSettings(), None, segmenters)]
    systems = []
    for system in found:
        systems.append(system)
        if len(system.detectors) > 1:
            alone = [system.with_detector(name) for name in system.detectors]
            among = f", with {system.name}'s other models" if len(found) > 1 else ""
            systems += [replace(each, name=f"{each.name}{among}") for each in alone]
    return systems


def _fused(run: ListedRun, segmenters: dict[str, Path]) -> System:
    folders = []
    for name in run.parameters.get("runs") or []:
        folder = _beside(name, run)
        if folder is None:
            raise PageError(f"its run {name} is not here")
        folders.append(folder)
    named = run.parameters.get("study_ensemble")
    stacking = _beside(named, run)
    if named and stacking is None:
        raise PageError(f"its ensemble {named} is not here")
    ensemble = stacking / "ensemble" if stacking else None
    name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
    return _system(name, folders, read_settings(run.folder / "fusion.json"), ensemble, segmenters)


def _beside(name: object, run: ListedRun) -> Path | None:
    """The run that `run` names by a whole path: beside it, where both were copied, before where it was."""
    beside = run.folder.parent / Path(name).name if isinstance(name, str) and Path(name).is_absolute() else None
    return beside if beside is not None and beside.is_dir() else named_folder(name, run)


def _system(
    name: str, folders: Sequence[Path], fusion: FusionSettings, ensemble: Path | None, segmenters: dict[str, Path]
) -> System:
    models: dict[tuple[str, int], AnsweringModel] = {}
    left_out = []
    for folder in folders:
        for bundle in sorted(folder.glob("fold*/bundle")):
            try:
                model = read_answering_model(bundle)
            except ValueError as error:
                left_out.append(f"{folder.name}/{bundle.parent.name} is left out: {error}.")
                continue
            if (other := models.setdefault((model.model, model.fold), model)) is not model:
                said = f"{other.folder.parents[1].name} has fold {model.fold} of {model.model}, too"
                left_out.append(f"{folder.name}/{bundle.parent.name} is left out: {said}.")
    if not models:
        raise PageError(NO_MODELS.format(where=f"in {', '.join(map(str, folders))}" if folders else "here"))
    # A fold of each model before the second ones, as a submission's file names them.
    in_order = tuple(sorted(models.values(), key=lambda model: model.fold))
    wanted = {model.segmenter for model in in_order if model.wants_masks}
    if len(wanted) > 1:
        raise PageError(f"{name}: its models want the lungs of {len(wanted)} segmenters, and a submission has one")
    lungs = segmenters.get(next(iter(wanted))) if wanted else next(iter(segmenters.values()), None)
    return System(name, in_order, fusion, ensemble, lungs, tuple(left_out))


def _segmenters(listed: Sequence[ListedRun]) -> dict[str, Path]:
    """Bundles of segmenters by their digest: of masks that were applied before those of single folds."""
    bundles = [run.folder / "bundle" for run in listed if run.kind == "applied lungs"]
    bundles += [bundle for run in listed if run.kind == "lungs" for bundle in sorted(run.folder.glob("fold*/bundle"))]
    found: dict[str, Path] = {}
    for bundle in bundles:
        try:
            found.setdefault(segmenter_digest(read_record(bundle)), bundle)
        except BundleError as error:
            logger.warning("the segmenter %s is left out: %s", bundle, error)
    return found
