"""Updates kaggle_image.txt, the list of packages in Kaggle's Docker image, from pip's output in a Kaggle session."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from kitlib.atomic import write_text
from kitlib.errors import KernelError
from kitlib.kernels.wheels import UNTIED, image_pins, read_pins
from kitlib.paths import project_root

IMAGE_LIST = Path(__file__).with_name("kaggle_image.txt")
PINNED = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;#]+)")
# A line of a package that was installed from a file or an address.
INSTALLED_FROM = re.compile(r"([A-Za-z0-9][\w.-]*) @ \S*?([^\s/#]+)(#\S*)?")


@dataclass(frozen=True)
class Difference:
    """A package whose version differs between two lists of packages; the version is "" if a list lacks the package."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        if not self.before or not self.after:
            return f"{'removed' if self.before else 'added'} {self.name} {self.before or self.after}"
        return f"changed {self.name} {self.before} -> {self.after}"


def refresh_image(frozen: str | Path, image_list: str | Path = IMAGE_LIST) -> list[Difference]:
    """Rewrite the file `image_list` with the packages in `frozen`, a saved output of pip; return what has changed.

    Local version suffixes, such as +cu128, are left out. Raises KernelError for a line without a version, and if `frozen`
    lacks more than half of the packages in `image_list`, because it is then not from a Kaggle session.
    """
    versions = _read_frozen(Path(frozen))
    before = read_pins(image_list)
    after: dict[str, str] = {canonicalize_name(name): version for name, version in versions.items()}
    known = len(before.keys() & after.keys())
    if known * 2 < len(before):
        raise KernelError(
            f"{frozen} is not from a Kaggle session: it has {len(after)} packages, but only {known} of the {len(before)} "
            f"packages in {image_list}. Run `!pip list --format=freeze > /kaggle/working/freeze.txt` in a notebook on "
            "Kaggle, and give the file freeze.txt"
        )
    heading = f"# Packages of Kaggle's image: pip's list of a session, read on {datetime.date.today()}.\n"
    pins = (f"{name}{'>=' if canonicalize_name(name) in UNTIED else '=='}{pin}\n" for name, pin in versions.items())
    write_text(image_list, heading + "".join(sorted(pins, key=str.upper)))
    names = sorted(before.keys() | after.keys())
    pairs = [Difference(name, before.get(name, ""), after.get(name, "")) for name in names]
    return [pair for pair in pairs if pair.before != pair.after]


def list_changes(requirements: str | Path | None = None, image: Mapping[str, str] | None = None) -> list[str]:
    """Return one message for each package whose line in a requirements file disagrees with Kaggle's Docker image.

    `requirements` is the path of the file (default: requirements.txt). `image` maps canonical package names to versions
    (default: those in kaggle_image.txt).
    """
    path, image = Path(requirements or project_root() / "requirements.txt"), image_pins() if image is None else image
    starred = {
        canonicalize_name(line.split("==")[0].strip())
        for line in path.read_text(encoding="utf-8").splitlines()
        if "# *" in line and "==" in line.split("#")[0]
    }
    changes = []
    for name, version in read_pins(path).items():
        if name in starred and name in image:
            changes.append(
                f"{name}: Kaggle's Docker image now has this package; write {name}=={image[name]} without `# *`, and remove "
                f"{name} from INFERENCE in kitlib/kernels/wheels.py"
            )
        elif name not in starred and name not in image:
            changes.append(
                f"{name}: Kaggle's Docker image no longer has this package; add `# *` to its line, and add {name} to "
                "INFERENCE in kitlib/kernels/wheels.py"
            )
        elif name not in starred and version != image[name]:
            changes.append(f"{name}: write {name}=={image[name]} instead of {version}")
    return changes


def _read_frozen(path: Path) -> dict[str, str]:
    """Return the versions, without local suffixes such as +cu128, in pip's list `path`, keyed by the names as written."""
    versions, unknown = {}, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pinned, installed = PINNED.fullmatch(line.split("#")[0].strip()), INSTALLED_FROM.fullmatch(line.strip())
        try:
            if pinned:
                Version(pinned[2])  # raises InvalidVersion
                versions[pinned[1]] = pinned[2].partition("+")[0]
            elif installed:
                versions[installed[1]] = parse_wheel_filename(unquote(installed[2]))[1].public
            else:
                unknown.append(line.strip())
        except (InvalidVersion, InvalidWheelFilename):
            unknown.append(line.strip())
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise KernelError(
            f"{path} has lines without a version: {'; '.join(unknown[:5])}{more}. Save the list with "
            "`pip list --format=freeze`, or write these lines as NAME==VERSION"
        )
    return versions
