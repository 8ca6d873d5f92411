"""A kernel's YAML file, read strictly: which notebook, parameters and inputs become which Kaggle kernel."""

import ast
import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import papermill
import yaml

from kitlib.errors import KernelError, SettingsError
from kitlib.notebook import check_parameters
from kitlib.paths import project_root
from kitlib.settings import Settings, from_dict

ACCELERATORS = ("NvidiaTeslaT4", "none")
# Kaggle's limits on characters; its client wants more of a slug that it makes a dataset of, or finds a kernel by.
TITLE, SLUG = (6, 50), (3, 50)
NEW_DATASET, KERNEL_SOURCE = (6, 50), (5, 50)
# Key -> the folder of its run's bundle, and which runs have one.
NAMED = {
    "lungs": ("bundle", "a run of notebook 14, or a fold of notebook 12"),
    "ensemble": ("ensemble", "a run of notebook 65 on study models"),
}
SLUG_LETTERS = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class KernelSpec(Settings):
    """One kernel. Paths are relative to the project's root; a source without a `/` is one of the owner's."""

    title: str = ""  # its slug must equal `slug`: Kaggle makes one from the other
    slug: str = ""
    owner: str = ""  # Kaggle user name
    competition: str = "siim-covid19-detection"  # whose data are attached; empty: none's
    dataset_sources: tuple[str, ...] = ()  # datasets that are attached
    kernel_sources: tuple[str, ...] = ()  # kernels whose output is attached: the runs that they made
    wheels: str = ""  # slug of the dataset of wheels, which several kernels may share; empty: this one's slug with -wheels
    accelerator: str = "NvidiaTeslaT4"  # two T4, or "none" for a CPU kernel
    internet: bool = False
    time_limit_hours: float = 9.0
    notebook: str = "notebooks/70_submit.ipynb"
    parameters: dict[str, Any] = field(default_factory=dict)  # for the notebook's `parameters` cell
    rehearsal: dict[str, Any] = field(default_factory=dict)  # parameters that replace others where it is only rehearsed
    runs: tuple[str, ...] = ()  # run folders or globs of them, most valuable first; each holds `bundle/`
    fusion: str | None = None  # fusion.json, tuned out of fold
    ensemble: str | None = None  # run of notebook 65 that stacks the study models of `runs`
    lungs: str | None = None  # run of notebook 14 (or fold of 12) whose `bundle/` finds the lungs of test images

    @property
    def weights_slug(self) -> str:
        return f"{self.slug}-weights"

    @property
    def wheels_slug(self) -> str:
        return self.wheels or f"{self.slug}-wheels"

    @property
    def time_limit_s(self) -> float:
        return self.time_limit_hours * 3600

    @property
    def notebook_path(self) -> Path:
        return project_root() / self.notebook

    @property
    def submits(self) -> bool:
        """Whether the notebook runs trained models (it has a parameter `weights`), which go into a dataset of their own."""
        return "weights" in self.notebook_parameters()

    def notebook_parameters(self) -> dict[str, Any]:
        """Names of the notebook's parameters with what papermill knows of them. Raises KernelError without a notebook."""
        if not self.notebook_path.is_file():
            raise KernelError(f"notebook: there is no {self.notebook_path}")
        return papermill.inspect_notebook(str(self.notebook_path))

    def injected(self, rehearsed: bool = False) -> dict[str, Any]:
        """All parameters that the notebook is given; those of a rehearsal if it is `rehearsed`.

        Where it has parameters `competition`, `weights`, `wheels` and `time_limit_s`, they come from the kernel's own keys.
        Raises KernelError for a parameter that the notebook has not, or that is one of these.
        """
        own = {"weights": self.weights_slug, "wheels": self.wheels_slug, "time_limit_s": self.time_limit_s}
        # Without a competition the parameter may name an attached dataset.
        own = ({"competition": self.competition} if self.competition else {}) | own
        known = self.notebook_parameters()
        own = {name: value for name, value in own.items() if name in known}
        for key, given in (("parameters", self.parameters), ("rehearsal", self.rehearsal)):
            twice = sorted(set(own) & set(given))
            if twice:
                raise KernelError(
                    f"{key}: {', '.join(twice)} come from the kernel's own keys (competition, slug, wheels, "
                    "time_limit_hours)"
                )
            try:
                check_parameters(self.notebook_path, given)
            except ValueError as error:
                raise KernelError(f"{key}: {error}") from error
        return own | self.parameters | (self.rehearsal if rehearsed else {})

    def run_folder(self, rehearsed: bool = False) -> str | None:
        """The run that the notebook makes, below Kaggle's working folder; None where its parameters name none.

        Raises KernelError for an absolute path: Kaggle keeps nothing outside of that folder.
        """
        known = self.notebook_parameters()
        if "run_folder" not in known or self.submits:
            return None
        folder = self.injected(rehearsed).get("run_folder", ast.literal_eval(known["run_folder"]["default"]))
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise KernelError(f"run_folder is {folder!r}; Kaggle keeps what is below /kaggle/working: name a folder in it")
        return folder

    def sources(self, entries: tuple[str, ...]) -> list[str]:
        """`entries` as OWNER/SLUG."""
        return [entry if "/" in entry else f"{self.owner}/{entry}" for entry in entries]

    def named_bundle(self, key: str) -> Path | None:
        """The bundle folder of the run that `key` names, of NAMED; None without one. Raises KernelError for no bundle."""
        if not getattr(self, key):
            return None
        inside, wanted = NAMED[key]
        bundle = project_root() / getattr(self, key) / inside
        if not bundle.is_dir():
            raise KernelError(f"{key}: there is no {bundle}; name {wanted}")
        return bundle

    def bundles(self) -> list[Path]:
        """Bundle folders in order of value, each once. Raises KernelError for an entry without a bundle."""
        found: dict[Path, None] = {}
        for entry in self.runs:
            root = Path(entry).anchor or project_root()
            matches = sorted(Path(root).glob(str(Path(entry).relative_to(Path(entry).anchor)).rstrip("/") + "/bundle"))
            if not matches:
                raise KernelError(f"runs: {entry!r} names no folder with a `bundle` below {root}; train the model first")
            found |= dict.fromkeys(match.resolve() for match in matches)
        return list(found)


def read_spec(path: str | Path, owner: str | None = None) -> KernelSpec:
    """The kernel at `path`. The owner is `owner`, else the environment's KAGGLE_USERNAME, else the file's.

    Raises KernelError: unknown keys (the valid ones are listed), ill-typed or missing values, Kaggle's limits on names.
    """
    path = Path(path)
    if not path.is_file():
        raise KernelError(f"no file {path}; there are: {', '.join(map(str, sorted(path.parent.glob('*.yaml')))) or 'none'}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = from_dict(KernelSpec, values)
        spec = dataclasses.replace(spec, owner=owner or os.environ.get("KAGGLE_USERNAME") or spec.owner)
        faults = _faults(spec)
    except (yaml.YAMLError, SettingsError, KernelError) as error:
        raise KernelError(f"{path}: {error}") from error
    if faults:
        raise KernelError(f"{path}: " + "; ".join(faults))
    return spec


def slug_of(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _faults(spec: KernelSpec) -> list[str]:
    submits = spec.submits
    needed = ("title", "slug", "owner", *(("competition", "runs") if submits else ()))
    faults = [f"{key} is missing" for key in needed if not getattr(spec, key)]
    if not submits and (spec.runs or spec.fusion or spec.lungs or spec.ensemble):
        faults.append(
            f"runs, fusion, ensemble and lungs make a dataset of weights, and {spec.notebook_path.name} has no parameter "
            "`weights`; a run that a kernel made is attached by kernel_sources"
        )
    if spec.title and slug_of(spec.title) != spec.slug:
        faults.append(f"slug is {spec.slug!r}, but Kaggle makes {slug_of(spec.title)!r} of the title {spec.title!r}")
    made = (["weights"] if submits else []) + ([] if spec.wheels else ["wheels"])
    for title in (spec.title, *(f"{spec.title} {word}" for word in made)):
        if spec.title and not TITLE[0] <= len(title) <= TITLE[1]:
            faults.append(f"the title {title!r} has {len(title)} characters, Kaggle wants {TITLE[0]} to {TITLE[1]}")
    if spec.slug:
        faults += _slug_faults(spec.slug, SLUG)
        faults += _slug_faults(spec.wheels_slug, NEW_DATASET)
        faults += _slug_faults(spec.weights_slug, NEW_DATASET) if submits else []
    if spec.owner and not re.fullmatch(r"[a-z0-9-]+", spec.owner):
        faults.append(f"owner {spec.owner!r} is no Kaggle user name: lower-case letters, digits and hyphens")
    if spec.accelerator not in ACCELERATORS:
        faults.append(f"accelerator {spec.accelerator!r} is none of {', '.join(ACCELERATORS)}")
    if not 0 < spec.time_limit_hours <= 12:
        faults.append(f"time_limit_hours is {spec.time_limit_hours}, a Kaggle session lasts up to 12")
    return faults + _source_faults(spec, submits)


def _slug_faults(slug: str, characters: tuple[int, int]) -> list[str]:
    if not SLUG_LETTERS.fullmatch(slug):
        return [f"the slug {slug!r} has more than letters, digits, - and _"]
    if not characters[0] <= len(slug) <= characters[1]:
        return [f"the slug {slug!r} has {len(slug)} characters, Kaggle wants {characters[0]} to {characters[1]}"]
    return []


def _source_faults(spec: KernelSpec, submits: bool) -> list[str]:
    """Two inputs with one slug would be mounted at one place, or found one for the other."""
    faults, slugs = [], [spec.competition, spec.wheels_slug, *([spec.weights_slug] if submits else [])]
    for key, characters in (("dataset_sources", SLUG), ("kernel_sources", KERNEL_SOURCE)):
        for entry in getattr(spec, key):
            if entry.count("/") > 1 or not all(entry.split("/")):
                faults.append(f"{key} wants slugs, of the owner's or as OWNER/SLUG, got {entry!r}")
                continue
            faults += [f"{key}: {fault}" for fault in _slug_faults(entry.split("/")[-1], characters)]
            slugs.append(entry.split("/")[-1])
    twice = sorted({slug for slug in slugs if slug and slugs.count(slug) > 1})
    return faults + [f"two inputs have the slug {slug}" for slug in twice]
