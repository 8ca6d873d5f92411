"""Read and check a kernel's YAML file: its notebook, parameters and inputs, and the names that it gets on Kaggle."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slugify import slugify

from kitlib.competitions.contract import Competition
from kitlib.competitions.registry import choose_competition, find_competition
from kitlib.errors import KernelError, NotebookError, SettingsError
from kitlib.kernels.accelerators import NONE, find_fault
from kitlib.parameters import check_parameters, read_parameters
from kitlib.paths import RUN_RECORD, project_root
from kitlib.recipes.named import check_recipe
from kitlib.settings import Settings, from_dict
from kitlib.yaml_reader import read_yaml

# Kaggle's minimum and maximum lengths; Kaggle's client requires longer slugs for new datasets and for attached kernels.
TITLE, SLUG = (6, 50), (3, 50)
NEW_DATASET, KERNEL_SOURCE, COMPETITION = (6, 50), (5, 50), (1, 100)
# Key of the YAML file that names a run -> the subfolder of the run with the bundle, and which runs have this subfolder.
BUNDLE_KEYS = {
    "lungs": ("bundle", "a run of notebook 14, or a fold of notebook 12"),
    "ensemble": ("ensemble", "a run of notebook 65 on study models"),
}
# Beginnings of a Kaggle page's address or of an input's mount path, before the input's own name.
ADDRESS = re.compile(r"((https?:)?/*(www\.)?kaggle\.com/|/kaggle/input/|/)*((c|competitions|datasets|code)/)?(?=.)")
# A tag would not pin an image, because it can be moved to another one.
DOCKER_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}")
SLUG_LETTERS = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class KernelSpec(Settings):
    """One Kaggle kernel, as its YAML file describes it.

    Paths are relative to the project's root. An entry of `dataset_sources` or `kernel_sources` without a `/` belongs to
    `owner`.
    """

    title: str = ""  # Kaggle derives the slug from the title; the result must be `slug`
    slug: str = ""
    owner: str = ""  # Kaggle user name
    competition: str = "siim-covid19-detection"  # slug of the competition whose data are attached; empty: no competition
    dataset_sources: tuple[str, ...] = ()  # datasets to attach
    model_sources: tuple[str, ...] = ()  # Kaggle Models to attach, as OWNER/MODEL/FRAMEWORK/VARIATION/VERSION
    kernel_sources: tuple[str, ...] = ()  # kernels whose output (their runs) to attach
    wheels: str = ""  # slug of the wheels dataset, which several kernels may share; empty: SLUG-wheels
    accelerator: str = "NvidiaTeslaT4"  # two T4 GPUs; kitlib.kernels.accelerators lists the others; "none" is the CPU
    docker_image: str = ""  # image in which Kaggle runs the kernel, as NAME@sha256:DIGEST; empty: Kaggle's latest
    internet: bool = False
    time_limit_hours: float = 9.0
    notebook: str = "notebooks/70_submit.ipynb"
    parameters: dict[str, Any] = field(default_factory=dict)  # for the notebook's `parameters` cell
    rehearsal: dict[str, Any] = field(default_factory=dict)  # parameters that replace `parameters` in a rehearsal
    runs: tuple[str, ...] = ()  # run folders or glob patterns, most valuable first; each folder contains `bundle/`
    fusion: str | None = None  # path of a fusion.json, tuned on out-of-fold predictions
    ensemble: str | None = None  # run of notebook 65 that combines the study models of `runs`
    lungs: str | None = None  # run of notebook 14 (or fold of 12) whose `bundle/` segments the lungs in test images

    @property
    def weights_slug(self) -> str:
        """Slug of the Kaggle dataset with the kernel's trained models."""
        return f"{self.slug}-weights"

    @property
    def wheels_slug(self) -> str:
        """Slug of the Kaggle dataset with the Python wheels that the kernel installs."""
        return self.wheels or f"{self.slug}-wheels"

    @property
    def rules(self) -> Competition:
        """The competition whose submission format the kernel writes.

        The notebook's parameter `rules` names the competition. If `rules` is empty, the key `competition` does. Raises
        SettingsError if the kit does not know the competition, or if `rules` and `competition` contradict each other.
        """
        rules = self.parameters.get("rules", "")
        return choose_competition(self.competition, rules)[0] if rules else find_competition(self.competition)

    @property
    def time_limit_s(self) -> float:
        """Time limit of the kernel's session, in seconds."""
        return self.time_limit_hours * 3600

    @property
    def uses_gpu(self) -> bool:
        """Whether the session has a GPU."""
        return self.accelerator != NONE

    @property
    def notebook_path(self) -> Path:
        """Absolute path of the notebook."""
        return project_root() / self.notebook

    @property
    def is_submission(self) -> bool:
        """Whether the notebook has a parameter `weights`; it then runs trained models, which are uploaded as a dataset."""
        return "weights" in self.notebook_parameters()

    def notebook_parameters(self) -> dict[str, Any]:
        """Return the default values of the notebook's parameters, keyed by parameter name.

        Raises KernelError if the notebook does not exist or is not a notebook.
        """
        try:
            return read_parameters(self.notebook_path)
        except NotebookError as error:
            raise KernelError(f"notebook: {error}") from error

    def injected_parameters(self, rehearsed: bool = False) -> dict[str, Any]:
        """Return all parameters to pass to the notebook. If `rehearsed`, those in `rehearsal` replace those in `parameters`.

        The parameters `competition`, `weights`, `wheels` and `time_limit_s` are set from the kernel's own keys if the
        notebook has them. Raises KernelError if `parameters` or `rehearsal` contains one of these four, a parameter that the
        notebook does not have, a value of a wrong type, or an invalid recipe.
        """
        kernel_values = {"weights": self.weights_slug, "wheels": self.wheels_slug, "time_limit_s": self.time_limit_s}
        # If the kernel has no competition, the file may set the parameter `competition` to an attached dataset.
        kernel_values = ({"competition": self.competition} if self.competition else {}) | kernel_values
        valid = self.notebook_parameters()
        kernel_values = {name: value for name, value in kernel_values.items() if name in valid}
        for key, parameters in (("parameters", self.parameters), ("rehearsal", self.rehearsal)):
            repeated = sorted(set(kernel_values) & set(parameters))
            if repeated:
                raise KernelError(
                    f"{key}: {', '.join(repeated)} cannot be set as a parameter; change the kernel's own keys instead "
                    "(competition, slug, wheels, time_limit_hours)"
                )
            try:
                check_parameters(self.notebook_path, parameters)
                check_recipe(valid, self.parameters | parameters)
            except SettingsError as error:
                raise KernelError(f"{key}: {error}") from error
        return kernel_values | self.parameters | (self.rehearsal if rehearsed else {})

    def run_folder(self, rehearsed: bool = False) -> str | None:
        """Return the run folder that the notebook writes, relative to /kaggle/working; None if it writes none.

        If `rehearsed`, the parameters for rehearsals apply. Raises KernelError for a run folder outside of /kaggle/working,
        because Kaggle keeps only the files in /kaggle/working.
        """
        valid = self.notebook_parameters()
        if "run_folder" not in valid or self.is_submission:
            return None
        folder = self.injected_parameters(rehearsed).get("run_folder", valid["run_folder"])
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise KernelError(
                f"run_folder is {folder!r}, but Kaggle keeps only files below /kaggle/working; use a relative path"
            )
        return folder

    def sources(self, entries: tuple[str, ...]) -> list[str]:
        """Return `entries` with `owner`/ put before each entry that has no owner yet."""
        return [entry if "/" in entry else f"{self.owner}/{entry}" for entry in entries]

    def fused_run(self) -> Path | None:
        """Return the run folder that contains the kernel's `fusion` settings; None if no run folder contains them."""
        run = (project_root() / self.fusion).parent if self.fusion else None
        return run if run and (run / RUN_RECORD).is_file() else None

    def named_bundle(self, key: str) -> Path | None:
        """Return the bundle folder of the run given under `key` in the kernel's YAML file, or None if the entry is empty.

        `key` is one of BUNDLE_KEYS, such as "lungs". Raises KernelError if that run has no bundle.
        """
        if not getattr(self, key):
            return None
        subfolder, advice = BUNDLE_KEYS[key]
        bundle = project_root() / getattr(self, key) / subfolder
        if not bundle.is_dir():
            raise KernelError(f"{key}: {bundle} does not exist; give {advice}")
        return bundle

    def bundles(self) -> list[Path]:
        """Return the bundle folders (trained models) of the kernel's `runs`, in order and without duplicates.

        Raises KernelError if an entry of `runs` has no bundle.
        """
        folders: dict[Path, None] = {}
        for entry in self.runs:
            root = Path(entry).anchor or project_root()
            matches = sorted(Path(root).glob(f"{Path(entry).relative_to(Path(entry).anchor)}/bundle"))
            if not matches:
                raise KernelError(f"runs: no folder {entry!r} below {root} contains `bundle`; train the model first")
            folders |= dict.fromkeys(match.resolve() for match in matches)
        return list(folders)


def read_spec(path: str | Path, owner: str | None = None) -> KernelSpec:
    """Return the kernel that the YAML file at `path` describes.

    The kernel's owner is the argument `owner`, or else the environment variable KAGGLE_USERNAME, or else the owner in the
    file. Raises KernelError for a missing file, unknown keys, missing values, values of the wrong type, and names that
    Kaggle does not accept.
    """
    path = Path(path)
    if not path.is_file():
        available = ", ".join(map(str, sorted(path.parent.glob("*.yaml")))) or "none"
        raise KernelError(f"{path} does not exist; available kernels: {available}")
    try:
        values = read_yaml(path)
    except SettingsError as error:
        raise KernelError(str(error)) from error
    try:
        spec = from_dict(KernelSpec, values)
        spec = dataclasses.replace(spec, owner=owner or os.environ.get("KAGGLE_USERNAME") or spec.owner)
        # The YAML file may come from a stranger, and a push uploads the files that it names. Runs and fusion settings are
        # parsed before they are copied, so other files cannot be passed off as these.
        notebook = os.path.abspath(spec.notebook_path)
        if not any(Path(notebook).is_relative_to(os.path.abspath(root)) for root in (project_root(), path.parent)):
            raise KernelError(f"notebook: {notebook} is outside the project and this YAML file's folder; choose one inside")
        faults = _find_faults(spec)
    except (SettingsError, KernelError) as error:
        raise KernelError(f"{path}: {error}") from error
    if faults:
        raise KernelError(f"{path}: " + "; ".join(faults))
    return spec


def _find_faults(spec: KernelSpec) -> list[str]:
    is_submission = spec.is_submission
    required = ("title", "slug", "owner", *(("competition", "runs") if is_submission else ()))
    faults = [f"{key} is missing" for key in required if not getattr(spec, key)]
    if not is_submission and (spec.runs or spec.fusion or spec.lungs or spec.ensemble):
        faults.append(
            f"runs, fusion, ensemble and lungs need a notebook with a parameter `weights`, which {spec.notebook_path.name} "
            "does not have; to use a run that another kernel made, add that kernel to kernel_sources"
        )
    # Kaggle's client makes slugs of titles with this function too.
    if spec.title and slugify(spec.title) != spec.slug:
        faults.append(f"slug is {spec.slug!r}, but Kaggle derives {slugify(spec.title)!r} from the title {spec.title!r}")
    built_datasets = (["weights"] if is_submission else []) + ([] if spec.wheels else ["wheels"])
    for title in (spec.title, *(f"{spec.title} {word}" for word in built_datasets)):
        if spec.title and not TITLE[0] <= len(title) <= TITLE[1]:
            faults.append(f"the title {title!r} has {len(title)} characters, but Kaggle allows {TITLE[0]} to {TITLE[1]}")
    if spec.slug:
        faults += _find_slug_faults(spec.slug, SLUG)
        faults += _find_slug_faults(spec.wheels_slug, NEW_DATASET)
        faults += _find_slug_faults(spec.weights_slug, NEW_DATASET) if is_submission else []
    if "/" in spec.competition:
        name = next(iter(_without_address(spec.competition)), "siim-covid19-detection")
        faults.append(f"competition is {spec.competition!r}; write only its name, such as {name}")
    elif spec.competition:
        faults += [f"competition: {fault}" for fault in _find_slug_faults(spec.competition, COMPETITION)]
        if is_submission and not faults:
            try:
                _ = spec.rules
            except SettingsError as error:
                faults.append(f"competition: {error}; or set the parameter `rules` to the competition whose format is used")
    if spec.owner and not re.fullmatch(r"[a-z0-9-]+", spec.owner):
        faults.append(f"owner {spec.owner!r} is not a Kaggle user name; use lower-case letters, digits and hyphens")
    if fault := find_fault(spec.accelerator):
        faults.append(fault)
    if spec.docker_image and not DOCKER_IMAGE.fullmatch(spec.docker_image):
        faults.append(
            f"docker_image {spec.docker_image!r} is not NAME@sha256:DIGEST; copy it from the kernel-metadata.json of a "
            "kernel that ran in the image: kaggle kernels pull -m OWNER/SLUG"
        )
    if not 0 < spec.time_limit_hours <= 12:
        faults.append(f"time_limit_hours is {spec.time_limit_hours}; it must be above 0 and at most 12, Kaggle's limit")
    return faults + _find_source_faults(spec, is_submission)


def _without_address(entry: str) -> list[str]:
    """Return an input's name, split at slashes. `entry` is the name, the address of its Kaggle page, or its mount path."""
    name = entry.partition("?")[0].partition("#")[0]
    prefix = ADDRESS.match(name)
    return [part for part in name[prefix.end() if prefix else 0 :].split("/") if part]


def _find_slug_faults(slug: str, characters: tuple[int, int]) -> list[str]:
    if not SLUG_LETTERS.fullmatch(slug):
        return [f"the slug {slug!r} may only contain letters, digits, - and _"]
    if not characters[0] <= len(slug) <= characters[1]:
        return [f"the slug {slug!r} has {len(slug)} characters, but Kaggle allows {characters[0]} to {characters[1]}"]
    return []


def _find_source_faults(spec: KernelSpec, is_submission: bool) -> list[str]:
    """Return messages about faults in the keys that list the inputs to attach, or [] if there are none.

    Two inputs with equal slugs are a fault, because Kaggle would mount them at the same path.
    """
    faults, slugs = [], [spec.competition, spec.wheels_slug, *([spec.weights_slug] if is_submission else [])]
    for key, characters in (("dataset_sources", SLUG), ("kernel_sources", KERNEL_SOURCE)):
        for entry in getattr(spec, key):
            name = _without_address(entry)
            if entry != "/".join(name) or len(name) > 2:
                faults.append(
                    f"{key}: {entry!r} is neither SLUG (an input of the kernel's owner) nor OWNER/SLUG; write "
                    f"{'/'.join(name[:2]) or 'OWNER/SLUG'}"
                )
                continue
            faults += [f"{key}: {fault}" for fault in _find_slug_faults(entry.split("/")[-1], characters)]
            slugs.append(entry.split("/")[-1])
    for entry in spec.model_sources:
        parts = entry.split("/")
        if len(parts) != 5 or not all(parts) or not parts[-1].isdecimal():
            faults.append(
                f"model_sources: {entry!r} is not OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, such as "
                "timm/resnext/pytorch/resnext101-32x8d/1"
            )
        else:
            slugs.append("/".join(parts[1:]))  # Kaggle mounts each variation of a Model in its own folder
    repeated = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    return faults + [f"two inputs have the slug {slug}, but Kaggle mounts both at one path; remove one" for slug in repeated]
