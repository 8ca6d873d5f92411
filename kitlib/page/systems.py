"""Systems of models that predict together, found among runs, and combined as the fusion runs combine them."""

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

TRAINED = ("study", "detector")  # kinds of runs whose models predict rows of a submission
NO_MODELS = (
    "no trained study model or detector {where}; run `make demo` to train some in runs/demo, or give another folder of runs"
)


@dataclass(frozen=True)
class System:
    """Models that predict together, as in a submission. `name` is the text of the radio button that selects them."""

    name: str
    models: tuple[AnsweringModel, ...]
    fusion: FusionSettings
    ensemble: Path | None = None  # bundle that stacks the study models
    lungs: Path | None = None  # bundle of a segmenter, for models that use lung masks and for the layer "lungs"
    left_out: tuple[str, ...] = ()  # sentences about bundles that are not used

    @property
    def longest_side(self) -> int:
        """Longest side in pixels of the decoded copies that the models read, the same as in a submission of these models."""
        return max(model.longest_side for model in self.models)

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names of the system's detectors."""
        return tuple(dict.fromkeys(model.model for model in self.models if "boxes" in model.answers))

    def with_detector(self, name: str) -> "System":
        """Return a system with `name` as its only detector, together with all models that are not detectors."""
        models = tuple(model for model in self.models if "boxes" not in model.answers or model.model == name)
        return replace(self, name=name, models=models)


def find_systems(listed: Sequence[ListedRun]) -> list[System]:
    """Return a system for each finished fusion in `listed`, followed by its variants with a single detector.

    If there is no usable fusion, all trained models form one system with equal weights. Raises PageError if there are no
    models.
    """
    segmenters = _find_segmenters(listed)
    base_systems = []
    for run in listed:
        if run.kind == "fusion" and run.state == "finished":
            try:
                base_systems.append(_read_fusion(run, segmenters))
            except (OSError, ValueError) as error:
                logger.warning("the fusion %s is left out: %s", run.name, error)
    if not base_systems:
        trained = [run.folder for run in listed if run.kind in TRAINED and run.state == "finished"]
        base_systems = [_build_system("all models, equal weights", trained, FusionSettings(), None, segmenters)]
    systems = []
    for system in base_systems:
        systems.append(system)
        if len(system.detectors) > 1:
            alone = [system.with_detector(name) for name in system.detectors]
            suffix = f", with {system.name}'s other models" if len(base_systems) > 1 else ""
            systems += [replace(variant, name=f"{variant.name}{suffix}") for variant in alone]
    return systems


def _read_fusion(run: ListedRun, segmenters: dict[str, Path]) -> System:
    folders = []
    for name in run.parameters.get("runs") or []:
        folder = _find_named_run(name, run)
        if folder is None:
            raise PageError(f"its run {name} was not found")
        folders.append(folder)
    ensemble_name = run.parameters.get("study_ensemble")
    ensemble_run = _find_named_run(ensemble_name, run)
    if ensemble_name and ensemble_run is None:
        raise PageError(f"its ensemble {ensemble_name} was not found")
    ensemble = ensemble_run / "ensemble" if ensemble_run else None
    name = f"{run.name}: {' + '.join(folder.name for folder in folders)}"
    return _build_system(name, folders, read_settings(run.folder / "fusion.json"), ensemble, segmenters)


def _find_named_run(name: object, run: ListedRun) -> Path | None:
    """Return the folder of the run that the parameters of `run` call `name`, or None if there is no such folder.

    If `name` is an absolute path, a folder next to `run` with the same last part is preferred, because the runs may have
    been moved together.
    """
    sibling = run.folder.parent / Path(name).name if isinstance(name, str) and Path(name).is_absolute() else None
    return sibling if sibling is not None and sibling.is_dir() else named_folder(name, run)


def _build_system(
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
                reason = f"{other.folder.parents[1].name} also has fold {model.fold} of {model.model}"
                left_out.append(f"{folder.name}/{bundle.parent.name} is left out: {reason}.")
    if not models:
        raise PageError(NO_MODELS.format(where=f"in {', '.join(map(str, folders))}" if folders else "found"))
    # Sorted by fold, so that the first folds of all models come before their second folds, as in a submission.
    in_order = tuple(sorted(models.values(), key=lambda model: model.fold))
    segmenter_digests = {model.segmenter for model in in_order if model.wants_masks}
    if len(segmenter_digests) > 1:
        raise PageError(
            f"{name}: the models need masks from {len(segmenter_digests)} segmenters, but a submission can use only one"
        )
    lungs = segmenters.get(next(iter(segmenter_digests))) if segmenter_digests else next(iter(segmenters.values()), None)
    return System(name, in_order, fusion, ensemble, lungs, tuple(left_out))


def _find_segmenters(listed: Sequence[ListedRun]) -> dict[str, Path]:
    """Return a dict that maps each segmenter's digest to its bundle, with the bundles of runs that applied one first."""
    bundles = [run.folder / "bundle" for run in listed if run.kind == "applied lungs"]
    bundles += [bundle for run in listed if run.kind == "lungs" for bundle in sorted(run.folder.glob("fold*/bundle"))]
    by_digest: dict[str, Path] = {}
    for bundle in bundles:
        try:
            by_digest.setdefault(segmenter_digest(read_record(bundle)), bundle)
        except BundleError as error:
            logger.warning("the segmenter %s is left out: %s", bundle, error)
    return by_digest
