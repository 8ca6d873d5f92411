"""Finds the systems of models that the page offers: each fusion of runs, and variants of it with a single detector."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from kitlib.fusion.model_fusion import FusionSettings
from kitlib.inference.systems import System, build_system, find_segmenters, read_system
from kitlib.leaderboard.listing import ListedRun

logger = logging.getLogger(__name__)

TRAINED = ("study", "detector")  # kinds of runs whose models predict rows of a submission


def find_systems(listed: Sequence[ListedRun]) -> list[System]:
    """Return a system for each finished fusion in `listed`, followed by its variants with a single detector.

    If there is no usable fusion, all trained models form one system with equal weights. Raises RunError if there are no
    models.
    """
    segmenters = find_segmenters((run.kind, run.folder) for run in listed)
    base_systems = []
    for run in listed:
        if run.kind == "fusion" and run.state == "finished":
            try:
                system = read_system(run.folder, run.kind, run.parameters, segmenters)
                base_systems.append(replace(system, name=run.name + system.name.removeprefix(run.folder.name)))
            except (OSError, ValueError) as error:
                logger.warning("the fusion %s is left out: %s", run.name, error)
    if not base_systems:
        trained = [run.folder for run in listed if run.kind in TRAINED and run.state == "finished"]
        base_systems = [build_system("all models, equal weights", trained, FusionSettings(), None, segmenters)]
    systems = []
    for system in base_systems:
        systems.append(system)
        if len(system.detectors) > 1:
            alone = [system.with_detector(name) for name in system.detectors]
            suffix = f", with {system.name}'s other models" if len(base_systems) > 1 else ""
            systems += [replace(variant, name=f"{variant.name}{suffix}") for variant in alone]
    return systems
