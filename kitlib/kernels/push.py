"""A built kernel and its datasets pushed through Kaggle's own client; what the client only prints or returns is an error."""

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from kitlib.errors import KernelError

logger = logging.getLogger(__name__)

TOKEN = (
    "Kaggle knows no valid token of yours. Make one at https://www.kaggle.com/settings (API, Create New Token) and put it "
    "into the environment variable KAGGLE_API_TOKEN or the file ~/.kaggle/access_token; an older kaggle.json goes into "
    "~/.kaggle, or its two values into KAGGLE_USERNAME and KAGGLE_KEY. Building and rehearsing need none"
)
ADVICE = {
    401: "the token is invalid or has expired: make a new one at https://www.kaggle.com/settings",
    403: "you may not: is the owner yours, and are the competition's rules accepted?",
    404: "there is no such thing, or none that you may see: are owner and slug right?",
}
METADATA = ("dataset-metadata.json", "kernel-metadata.json")
# Files a page when a dataset's are listed; no dataset of wheels has more.
PAGE = 200
# What the client says that is no complaint about what was pushed.
HARMLESS = ("Warning: Looks like you're using an outdated", "Warning: Your Kaggle API key is readable")
COMPLAINTS = {
    "invalid_dataset_sources": "datasets that it does not find or may not use",
    "invalid_competition_sources": "competitions that it does not find, or whose rules you have not accepted",
    "invalid_kernel_sources": "kernels that it does not find or that have never run",
    "invalid_model_sources": "models that it does not find or may not use",
    "invalid_tags": "tags that there are not",
}


@dataclass(frozen=True)
class Pushed:
    url: str  # of the kernel, where its progress is seen
    version: int
    datasets: dict[str, str]  # by OWNER/SLUG: "created", "new version" or "unchanged"


def push(out: str | Path, wait_s: float = 3600.0, poll_s: float = 5.0) -> Pushed:
    """Push `out`/wheels and `out`/weights, wait until Kaggle has unpacked them, then push `out`/kernel, which starts it.

    A dataset that exists gets a new version, except wheels that are there already, all with the same names and sizes. Each
    is waited for `wait_s` seconds at most and asked for every `poll_s`. Raises KernelError.
    """
    out = Path(out)
    described = out / "kernel" / "kernel-metadata.json"
    if not described.is_file():
        raise KernelError(f"there is no {described}; build the kernel first")
    metadata = json.loads(described.read_text(encoding="utf-8"))
    client = _client()
    owner, user = metadata["id"].split("/")[0], client.config_values[client.CONFIG_NAME_USER]
    if owner != user.lower():
        raise KernelError(f"the kernel is {metadata['id']}, but the token is {user}'s; build it with --owner {user.lower()}")
    datasets = {}
    for folder in (out / "wheels", out / "weights"):
        if folder.is_dir():
            name = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
            datasets[name] = _push_dataset(client, name, folder, wait_s, poll_s)
    url, version = _push_kernel(client, metadata, out / "kernel")
    return Pushed(url, version, datasets)


def _client() -> Any:
    """Kaggle's client, signed in, and made to fail where it would leave out a file."""
    heard = io.StringIO()
    with _asking("signing in", heard):
        # Importing it signs in, and ends the program where there is no token.
        from kaggle.api.kaggle_api_extended import KaggleApi

        class Client(KaggleApi):
            def upload_files(self, request: Any, resources: Any, folder: str, *arguments: Any, **options: Any) -> None:
                super().upload_files(request, resources, folder, *arguments, **options)
                wanted, sent = [name for name in os.listdir(folder) if name not in METADATA], request.files or []
                if len(sent) != len(wanted):
                    raise KernelError(
                        f"only {len(sent)} of {len(wanted)} files of {folder} could be uploaded, so none was published; "
                        f"push again{_quoted(heard)}"
                    )

        client = Client()
        client.authenticate()
        if not client.config_values.get(client.CONFIG_NAME_USER):
            raise KernelError(TOKEN)
    client.heard = heard
    return client


@contextlib.contextmanager
def _asking(what: str, heard: io.StringIO) -> Iterator[None]:
    """Inside, what the client prints goes to `heard`, emptied first, and whatever it raises becomes a KernelError."""
    heard.seek(0)
    heard.truncate()
    try:
        with contextlib.redirect_stdout(heard):
            yield
    except SystemExit as error:
        raise KernelError(f"{what}: {TOKEN}{_quoted(heard)}") from error
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = f"; {ADVICE[status]}" if status in ADVICE else ""
        raise KernelError(f"{what}: Kaggle answers {error}{advice}{_quoted(heard)}") from error
    except requests.RequestException as error:
        raise KernelError(f"{what}: Kaggle cannot be reached: {error}{_quoted(heard)}") from error
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise KernelError(f"{what}: Kaggle's client fails: {error!r}{_quoted(heard)}") from error


def _lines(heard: io.StringIO) -> list[str]:
    return [line.strip() for line in heard.getvalue().splitlines() if line.strip()]


def _quoted(heard: io.StringIO) -> str:
    return "".join(f"\n  its client says: {line}" for line in _lines(heard))


def _push_dataset(client: Any, name: str, folder: Path, wait_s: float, poll_s: float) -> str:
    what = f"pushing the dataset {name}"
    status = _status(client, name)
    before = _version(client, name) if status else 0
    if status == "ready" and folder.name == "wheels" and _same_files(client, name, folder):
        return "unchanged"
    logger.info("uploading %s", name)
    # "zip", because the client leaves out folders otherwise
    with _asking(what, client.heard):
        if status:
            answer = client.dataset_create_version(str(folder), "built by the kit", quiet=True, dir_mode="zip")
        else:
            answer = client.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="zip")
    if answer is None or answer.error or answer.invalid_tags or answer.status.lower() != "ok":
        said = answer and (answer.error or (answer.invalid_tags and f"invalid tags {answer.invalid_tags}") or answer.status)
        raise KernelError(f"{what}: Kaggle answers {said or 'nothing'}{_quoted(client.heard)}")
    _wait_for(client, name, before, wait_s, poll_s)
    return "new version" if status else "created"


def _status(client: Any, name: str) -> str | None:
    """Kaggle's word for the newest version of a dataset, such as "ready"; None where there is no such dataset."""
    with _asking(f"asking for the dataset {name}", client.heard):
        try:
            return client.dataset_status(name)
        except requests.HTTPError as error:
            # Kaggle answers 403 as well for what is not there. If it is another's, creating it will fail.
            if error.response is not None and error.response.status_code in (403, 404):
                return None
            raise


def _version(client: Any, name: str) -> int:
    """The number of the dataset's current version; 0 where Kaggle tells none."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = name.split("/")
    with _asking(f"asking for the dataset {name}", client.heard), client.build_kaggle_client() as kaggle:
        return kaggle.datasets.dataset_api_client.get_dataset(request).current_version_number or 0


def _same_files(client: Any, name: str, folder: Path) -> bool:
    """Enough for wheels alone: their names tell their versions."""
    with _asking(f"asking for the files of {name}", client.heard):
        listed = client.dataset_list_files(name, page_size=PAGE)
    here = {path.name: path.stat().st_size for path in folder.iterdir() if path.name not in METADATA}
    return {file.name: file.total_bytes for file in listed.files or []} == here


def _wait_for(client: Any, name: str, before: int, wait_s: float, poll_s: float) -> None:
    """Until a version later than `before` is ready: a kernel takes the version that there is when it is pushed."""
    started = time.monotonic()
    while True:
        # At first, for it is the older version that would still be ready.
        time.sleep(poll_s)
        status = _status(client, name)
        if status == "ready" and (not before or _version(client, name) > before):
            return
        if status in ("failed", "deleted"):
            raise KernelError(
                f"{name} was uploaded, but Kaggle says it {status}: see https://www.kaggle.com/datasets/{name}"
            )
        if time.monotonic() - started > wait_s:
            raise KernelError(
                f"{name} was uploaded, but is not ready after {wait_s:g} s ({status or 'unknown'}), and the kernel was not "
                f"pushed: see https://www.kaggle.com/datasets/{name} and push again"
            )
        logger.info("%s: %s", name, status or "not there yet")


def _push_kernel(client: Any, metadata: dict[str, Any], folder: Path) -> tuple[str, int]:
    """Its address and version. Kaggle starts a kernel also where a source is missing: that is an error all the same."""
    name = metadata["id"]
    logger.info("pushing the kernel %s", name)
    with _asking(f"pushing the kernel {name}", client.heard):
        answer = client.kernels_push(str(folder))
    if answer is None or answer.error:
        said = (answer and answer.error) or "nothing"
        raise KernelError(f"the kernel {name} was not pushed: Kaggle answers {said}{_quoted(client.heard)}")
    complaints = [
        f"{meaning}: {', '.join(getattr(answer, field))}" for field, meaning in COMPLAINTS.items() if getattr(answer, field)
    ]
    complaints += [line for line in _lines(client.heard) if not line.startswith(HARMLESS)]
    if f"/{name}" not in answer.url.lower():
        complaints.append(f"its address is {answer.url or 'not told'}, where {name} was expected")
    if not answer.version_number:
        complaints.append("no version number")
    if complaints:
        raise KernelError(
            f"Kaggle took the kernel {name} (version {answer.version_number or 'unknown'}) and started it, but not as it "
            "was built; mend this and push again:\n  " + "\n  ".join(complaints)
        )
    return answer.url, answer.version_number
