"""Push a built kernel and its datasets with Kaggle's client; problems that the client only prints raise an error here."""

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
    "no valid Kaggle token was found. Create one at https://www.kaggle.com/settings (API, Create New Token) and put it "
    "into the environment variable KAGGLE_API_TOKEN or the file ~/.kaggle/access_token; an older kaggle.json goes into "
    "~/.kaggle, or its two values into KAGGLE_USERNAME and KAGGLE_KEY. Building and rehearsing need no token"
)
ADVICE = {
    401: "the token is invalid or has expired; create a new one at https://www.kaggle.com/settings",
    403: "access is denied; check that the owner is you, and that you have accepted the competition's rules",
    404: "it does not exist, or you have no access to it; check the owner and the slug",
}
METADATA = ("dataset-metadata.json", "kernel-metadata.json")
# Number of files on one page of a dataset's listing; a wheels dataset has fewer files.
PAGE = 200
# Beginnings of lines that the client prints but that are no problem of the pushed kernel or dataset.
HARMLESS_OUTPUT = ("Warning: Looks like you're using an outdated", "Warning: Your Kaggle API key is readable")
COMPLAINTS = {
    "invalid_dataset_sources": "datasets that do not exist or that the kernel may not use",
    "invalid_competition_sources": "competitions that do not exist, or whose rules you have not accepted",
    "invalid_kernel_sources": "kernels that do not exist or that have never run",
    "invalid_model_sources": "models that do not exist or that the kernel may not use",
    "invalid_tags": "tags that do not exist",
}


@dataclass(frozen=True)
class Pushed:
    """A pushed kernel and the datasets that were uploaded with it."""

    url: str  # of the kernel's page, which shows its progress
    version: int
    datasets: dict[str, str]  # OWNER/SLUG -> "created", "new version" or "unchanged"


def push(out: str | Path, wait_s: float = 3600.0, poll_s: float = 5.0) -> Pushed:
    """Push `out`/wheels and `out`/weights, wait until both are ready, then push `out`/kernel, which starts the kernel.

    An existing dataset gets a new version; a wheels dataset is left as it is if its files have the same names and sizes.
    Each dataset's status is checked every `poll_s` seconds, for at most `wait_s` seconds. Raises KernelError if the kernel
    is not built, if signing in fails, if Kaggle refuses a dataset or the kernel, or if a dataset is not ready in time.
    """
    out = Path(out)
    metadata_path = out / "kernel" / "kernel-metadata.json"
    if not metadata_path.is_file():
        raise KernelError(f"{metadata_path} does not exist; build the kernel first")
    metadata = json.loads(metadata_path.read_text(encoding="utf-8"))
    client = _sign_in()
    owner, user = metadata["id"].split("/")[0], client.config_values[client.CONFIG_NAME_USER]
    if owner != user.lower():
        raise KernelError(
            f"the kernel is {metadata['id']}, but the token belongs to {user}; build it with --owner {user.lower()}"
        )
    datasets = {}
    for folder in (out / "wheels", out / "weights"):
        if folder.is_dir():
            name = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
            datasets[name] = _push_dataset(client, name, folder, wait_s, poll_s)
    url, version = _push_kernel(client, metadata, out / "kernel")
    return Pushed(url, version, datasets)


def push_dataset(name: str, folder: Path, wait_s: float = 3600.0, poll_s: float = 5.0) -> str:
    """Upload `folder` as the dataset `name` (OWNER/SLUG), and wait until Kaggle has processed the dataset.

    Returns "created" or "new version". The status is checked every `poll_s` seconds, for at most `wait_s` seconds. Raises
    KernelError if signing in fails, if the owner is somebody else, or if Kaggle refuses the dataset or is not ready in time.
    """
    client = _sign_in()
    user = client.config_values[client.CONFIG_NAME_USER]
    if name.split("/")[0] != user.lower():
        raise KernelError(f"the dataset is {name}, but the token belongs to {user}; give the owner {user.lower()}")
    return _push_dataset(client, name, folder, wait_s, poll_s)


def _sign_in() -> Any:
    """Return Kaggle's client, signed in, and changed to raise KernelError if a file of a dataset cannot be uploaded."""
    output = io.StringIO()
    with _calling_client("signing in", output):
        # Importing this module signs in, and exits the program if there is no token.
        from kaggle.api.kaggle_api_extended import KaggleApi

        class Client(KaggleApi):
            def upload_files(self, request: Any, resources: Any, folder: str, *arguments: Any, **options: Any) -> None:
                super().upload_files(request, resources, folder, *arguments, **options)
                expected, uploaded = [name for name in os.listdir(folder) if name not in METADATA], request.files or []
                if len(uploaded) != len(expected):
                    raise KernelError(
                        f"only {len(uploaded)} of {len(expected)} files in {folder} could be uploaded, so none was "
                        f"published; push again{_quote_output(output)}"
                    )

        client = Client()
        client.authenticate()
        if not client.config_values.get(client.CONFIG_NAME_USER):
            raise KernelError(TOKEN)
    client.captured_output = output
    return client


@contextlib.contextmanager
def _calling_client(action: str, output: io.StringIO) -> Iterator[None]:
    """Collect what the client prints inside the `with` block in `output`, emptied first; turn its errors into KernelError.

    `action` is a short description of what the client is doing, for error messages.
    """
    output.seek(0)
    output.truncate()
    try:
        with contextlib.redirect_stdout(output):
            yield
    except SystemExit as error:
        raise KernelError(f"{action}: {TOKEN}{_quote_output(output)}") from error
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = f"; {ADVICE[status]}" if status in ADVICE else ""
        raise KernelError(f"{action}: Kaggle answered {error}{advice}{_quote_output(output)}") from error
    except requests.RequestException as error:
        raise KernelError(f"{action}: Kaggle cannot be reached: {error}{_quote_output(output)}") from error
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise KernelError(f"{action}: Kaggle's client failed: {error!r}{_quote_output(output)}") from error


def _output_lines(output: io.StringIO) -> list[str]:
    return [line.strip() for line in output.getvalue().splitlines() if line.strip()]


def _quote_output(output: io.StringIO) -> str:
    return "".join(f"\n  Kaggle's client printed: {line}" for line in _output_lines(output))


def _push_dataset(client: Any, name: str, folder: Path, wait_s: float, poll_s: float) -> str:
    """Upload `folder` as the dataset `name` and wait until it is ready; return "created", "new version" or "unchanged"."""
    action = f"pushing the dataset {name}"
    status = _dataset_status(client, name)
    previous_version = _dataset_version(client, name) if status else 0
    if status == "ready" and folder.name == "wheels" and _has_same_files(client, name, folder):
        return "unchanged"
    logger.info("uploading %s", name)
    # dir_mode is "zip", because otherwise the client skips subfolders.
    with _calling_client(action, client.captured_output):
        if status:
            answer = client.dataset_create_version(str(folder), "built by the kit", quiet=True, dir_mode="zip")
        else:
            answer = client.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="zip")
    if answer is None or answer.error or answer.invalid_tags or answer.status.lower() != "ok":
        reason = answer and (
            answer.error or (answer.invalid_tags and f"invalid tags {answer.invalid_tags}") or answer.status
        )
        raise KernelError(f"{action}: Kaggle answered {reason or 'nothing'}{_quote_output(client.captured_output)}")
    _wait_until_ready(client, name, previous_version, wait_s, poll_s)
    return "new version" if status else "created"


def _dataset_status(client: Any, name: str) -> str | None:
    """Return the status of a dataset's newest version, such as "ready"; None if the dataset does not exist."""
    with _calling_client(f"asking for the dataset {name}", client.captured_output):
        try:
            return client.dataset_status(name)
        except requests.HTTPError as error:
            # Kaggle returns 403 for missing datasets too. If the dataset belongs to another user, creating it will fail.
            if error.response is not None and error.response.status_code in (403, 404):
                return None
            raise


def _dataset_version(client: Any, name: str) -> int:
    """Return the number of the dataset's current version, 0 if Kaggle reports no version."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = name.split("/")
    with _calling_client(f"asking for the dataset {name}", client.captured_output), client.build_kaggle_client() as kaggle:
        return kaggle.datasets.dataset_api_client.get_dataset(request).current_version_number or 0


def _has_same_files(client: Any, name: str, folder: Path) -> bool:
    """Return whether the dataset's files have the same names and sizes as those in `folder`.

    This comparison suffices only for wheels, whose names contain their versions.
    """
    with _calling_client(f"asking for the files of {name}", client.captured_output):
        listed = client.dataset_list_files(name, page_size=PAGE)
    local_sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name not in METADATA}
    return {file.name: file.total_bytes for file in listed.files or []} == local_sizes


def _wait_until_ready(client: Any, name: str, previous_version: int, wait_s: float, poll_s: float) -> None:
    """Wait until a version of the dataset `name` later than `previous_version` is ready.

    Otherwise the pushed kernel would get the previous version. The status is checked every `poll_s` seconds. Raises
    KernelError if Kaggle reports a failure, or after `wait_s` seconds.
    """
    started = time.monotonic()
    while True:
        # Wait before the first check, because until the upload is registered, Kaggle reports the older version's status.
        time.sleep(poll_s)
        status = _dataset_status(client, name)
        if status == "ready" and (not previous_version or _dataset_version(client, name) > previous_version):
            return
        if status in ("failed", "deleted"):
            raise KernelError(
                f"{name} was uploaded, but its status is {status!r}; see https://www.kaggle.com/datasets/{name}"
            )
        if time.monotonic() - started > wait_s:
            raise KernelError(
                f"{name} was uploaded, but is not ready after {wait_s:g} s (its status: {status or 'unknown'}), and the "
                f"kernel was not pushed; see https://www.kaggle.com/datasets/{name} and push again"
            )
        logger.info("%s: %s", name, status or "not listed yet")


def _push_kernel(client: Any, metadata: dict[str, Any], folder: Path) -> tuple[str, int]:
    """Push the kernel and return its URL and version number.

    Raises KernelError if Kaggle refuses the kernel, or if Kaggle's answer reports a problem, such as an input that does not
    exist.
    """
    name = metadata["id"]
    logger.info("pushing the kernel %s", name)
    with _calling_client(f"pushing the kernel {name}", client.captured_output):
        answer = client.kernels_push(str(folder))
    if answer is None or answer.error:
        reason = (answer and answer.error) or "nothing"
        raise KernelError(
            f"the kernel {name} was not pushed: Kaggle answered {reason}{_quote_output(client.captured_output)}"
        )
    complaints = [
        f"{meaning}: {', '.join(getattr(answer, field))}" for field, meaning in COMPLAINTS.items() if getattr(answer, field)
    ]
    complaints += [line for line in _output_lines(client.captured_output) if not line.startswith(HARMLESS_OUTPUT)]
    if f"/{name}" not in answer.url.lower():
        complaints.append(f"its URL is {answer.url or 'missing'}, expected one that contains {name}")
    if not answer.version_number:
        complaints.append("no version number")
    if complaints:
        raise KernelError(
            f"Kaggle started the kernel {name} (version {answer.version_number or 'unknown'}), but not as it was built; "
            "correct this and push again:\n  " + "\n  ".join(complaints)
        )
    return answer.url, answer.version_number
