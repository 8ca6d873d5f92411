"""submissions/NAME.yaml: which trained models become which Kaggle kernel, read strictly."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kitlib.paths import project_root
from kitlib.recipes import RecipeError, from_dict

ACCELERATORS = ("NvidiaTeslaT4", "none")
# Kaggle's limits on a dataset's characters; the kernel's two datasets append a word to the title and the slug.
TITLE, SLUG = (6, 50), (3, 50)


class SpecError(ValueError):
    """A submission's YAML file that cannot become a kernel: names the file, the key and what to do."""


@dataclass(frozen=True)
class KernelSpec:
    """One submission. Paths are relative to the project's root."""

    title: str = ""  # its slug must equal `slug`: Kaggle makes one from the other
    slug: str = ""
    owner: str = ""  # Kaggle user name
    competition: str = "siim-covid19-detection"
    accelerator: str = "NvidiaTeslaT4"  # two T4, or "none" for a CPU kernel
    time_limit_hours: float = 9.0
    notebook: str = "notebooks/70_submit.ipynb"
    parameters: dict[str, Any] = field(default_factory=dict)  # for the notebook's `parameters` cell
    runs: tuple[str, ...] = ()  # run folders or globs of them, most valuable first; each holds `bundle/`
    fusion: str | None = None  # fusion.json, tuned out of fold

    @property
    def weights_slug(self) -> str:
        return f"{self.slug}-weights"

    @property
    def wheels_slug(self) -> str:
        return f"{self.slug}-wheels"

    @property
    def time_limit_s(self) -> float:
        return self.time_limit_hours * 3600

    def bundles(self) -> list[Path]:
        """Bundle folders in order of value; a run named twice counts once. Raises SpecError for an entry that names none."""
        found: dict[Path, None] = {}
        for entry in self.runs:
            root = Path(entry).anchor or project_root()
            matches = sorted(Path(root).glob(str(Path(entry).relative_to(Path(entry).anchor)).rstrip("/") + "/bundle"))
            if not matches:
                raise SpecError(f"runs: {entry!r} names no folder with a `bundle` below {root}; train the model first")
            found |= dict.fromkeys(match.resolve() for match in matches)
        return list(found)


def read_spec(path: str | Path, owner: str | None = None) -> KernelSpec:
    """The submission at `path`. The owner is `owner`, else the environment's KAGGLE_USERNAME, else the file's.

    Raises SpecError: unknown keys (the valid ones are listed), ill-typed or missing values, Kaggle's limits on names.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(
            f"no submission {path}; there are: {', '.join(map(str, sorted(path.parent.glob('*.yaml')))) or 'none'}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = from_dict(KernelSpec, values)
    except (yaml.YAMLError, RecipeError) as error:
        raise SpecError(f"{path}: {error}") from error
    spec = dataclasses.replace(spec, owner=owner or os.environ.get("KAGGLE_USERNAME") or spec.owner)
    faults = _faults(spec)
    if faults:
        raise SpecError(f"{path}: " + "; ".join(faults))
    return spec


def slug_of(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _faults(spec: KernelSpec) -> list[str]:
    faults = [f"{key} is missing" for key in ("title", "slug", "owner", "runs") if not getattr(spec, key)]
    if spec.title and slug_of(spec.title) != spec.slug:
        faults.append(f"slug is {spec.slug!r}, but Kaggle makes {slug_of(spec.title)!r} of the title {spec.title!r}")
    for title in (spec.title, f"{spec.title} weights", f"{spec.title} wheels"):
        if spec.title and not TITLE[0] <= len(title) <= TITLE[1]:
            faults.append(f"the title {title!r} has {len(title)} characters, Kaggle wants {TITLE[0]} to {TITLE[1]}")
    for slug in (spec.slug, spec.weights_slug, spec.wheels_slug):
        if spec.slug and not SLUG[0] <= len(slug) <= SLUG[1]:
            faults.append(f"the slug {slug!r} has {len(slug)} characters, Kaggle wants {SLUG[0]} to {SLUG[1]}")
    if spec.owner and not re.fullmatch(r"[a-z0-9-]+", spec.owner):
        faults.append(f"owner {spec.owner!r} is no Kaggle user name: lower-case letters, digits and hyphens")
    if spec.accelerator not in ACCELERATORS:
        faults.append(f"accelerator {spec.accelerator!r} is none of {', '.join(ACCELERATORS)}")
    if not 0 < spec.time_limit_hours <= 12:
        faults.append(f"time_limit_hours is {spec.time_limit_hours}, a Kaggle session lasts up to 12")
    if not all(isinstance(entry, str) for entry in spec.runs):
        faults.append(f"runs wants paths, got {list(spec.runs)!r}")
    return faults
