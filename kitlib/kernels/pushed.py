"""pushed.json, next to a built kernel: the record of its last pushed version, of the version's run and of its score."""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from kitlib.atomic import write_json
from kitlib.competitions.contract import Competition
from kitlib.competitions.registry import find_competition
from kitlib.errors import KernelError, SettingsError
from kitlib.settings import Settings, from_dict

PUSHED = "pushed.json"
OUTPUT = "output"  # folder of the files that were downloaded from the kernel's run
COMPLETE = "complete"


@dataclass(frozen=True)
class Pushed(Settings):
    """One pushed version of a kernel. Fields of steps that are not done yet are empty. Times are in UTC, in ISO format."""

    kernel: str  # OWNER/SLUG
    url: str  # of the kernel's page, which shows its progress
    version: int
    bundles: tuple[str, ...]  # folders of the bundles in the weights dataset; () for a kernel without weights
    fused_run: str  # absolute path of the run whose fusion the kernel uses, or ""
    datasets: dict[str, str] = field(default_factory=dict)  # OWNER/SLUG -> "created", "new version" or "unchanged"
    competition: str = ""  # slug of the competition whose data are attached
    rules: str = ""  # name of the competition whose submission format is written; "": that of `competition`
    digest: str = ""  # SHA-256 digest of the pushed files
    pushed: str = ""  # time of the push
    status: str = ""  # how the run ended: "complete" or another status of Kaggle's
    description: str = ""  # of the submission; written before the submission is made
    submission: int = 0  # Kaggle's number of the submission
    submitted: str = ""  # time of the submission
    public_score: float | None = None
    private_score: float | None = None
    scored: str = ""  # time at which the score was read

    @property
    def name(self) -> str:
        """OWNER/SLUG/VERSION, by which Kaggle's client knows this version."""
        return f"{self.kernel}/{self.version}"

    @property
    def challenge(self) -> Competition:
        """The competition whose submission format the kernel writes. Raises SettingsError if the kit does not know it."""
        return find_competition(self.rules or self.competition)


def read_pushed(out: str | Path) -> Pushed:
    """Return the record of the last pushed version of the kernel that was built in `out`.

    Raises KernelError if no version was pushed, or if `out`/pushed.json is damaged.
    """
    path = Path(out) / PUSHED
    if not path.is_file():
        raise KernelError(f"{path} does not exist; push the kernel first, with --push")
    try:
        return from_dict(Pushed, json.loads(path.read_text(encoding="utf-8")))
    except (SettingsError, ValueError, TypeError) as error:
        raise KernelError(f"{path} is damaged ({error}); remove it and push again") from error


def write_pushed(out: str | Path, pushed: Pushed) -> None:
    """Write the record `pushed` to `out`/pushed.json, replacing the file."""
    write_json(Path(out) / PUSHED, dataclasses.asdict(pushed))


def write_new_version(out: Path, pushed: Pushed, previous: Pushed | None) -> None:
    """Write the record `pushed` of a new version to `out`/pushed.json; delete the downloaded output of the earlier version.

    The earlier version is `previous`, or None. Its pushed.json is renamed to pushed-VERSION.json.
    """
    shutil.rmtree(out / OUTPUT, ignore_errors=True)
    if previous is not None:
        (out / PUSHED).replace(out / f"pushed-{previous.version}.json")
    write_pushed(out, pushed)


def is_pushed(out: str | Path) -> bool:
    """Return True if the kernel was pushed exactly as it is now built in `out`, and its run has not failed."""
    if not (Path(out) / PUSHED).is_file():
        return False
    pushed = read_pushed(out)
    return pushed.status in ("", COMPLETE) and pushed.digest == digest_build(Path(out))


def digest_build(out: Path) -> str:
    """Return the SHA-256 digest of the names and contents of all files of the built kernel and its datasets."""
    digest = hashlib.sha256()
    paths = (path for part in ("kernel", "wheels", "weights") for path in (out / part).rglob("*") if path.is_file())
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(out)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
