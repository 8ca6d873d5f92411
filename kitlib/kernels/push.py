"""Push a built kernel and its datasets with Kaggle's client; problems that the client only prints raise an error here."""

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from kitlib.errors import KernelError
from kitlib.kernels.client import KaggleClient, poll
from kitlib.kernels.pushed import PUSHED, Pushed, digest_build, read_pushed, write_new_version
from kitlib.kernels.result import list_bundles

logger = logging.getLogger(__name__)

METADATA = ("dataset-metadata.json", "kernel-metadata.json")
# Number of files on one page of a dataset's listing; a wheels dataset has fewer files.
PAGE = 200
COMPLAINTS = {
    "invalid_dataset_sources": "datasets that do not exist or that the kernel may not use",
    "invalid_competition_sources": "competitions that do not exist, or whose rules you have not accepted",
    "invalid_kernel_sources": "kernels that do not exist or that have never run",
    "invalid_model_sources": "models that do not exist or that the kernel may not use",
    "invalid_tags": "tags that do not exist",
}


def push(
    out: str | Path, fused_run: Path | None = None, wait_s: float = 3600.0, poll_s: float = 5.0, rules: str = ""
) -> Pushed:
    """Push `out`/wheels and `out`/weights, wait until both are ready, then push `out`/kernel, which starts the kernel.

    An existing dataset gets a new version; a wheels dataset is left as it is if its files have the same names and sizes.
    Each dataset's status is checked every `poll_s` seconds, for at most `wait_s` seconds. The result is also written to
    `out`/pushed.json, which the later steps read. After a successful push, the pushed.json of the previous push is renamed
    to pushed-VERSION.json. `fused_run` is the folder of the run whose fusion settings the kernel uses; Kaggle's score is
    later written there. `rules` is the name of the competition whose submission format the kernel writes; "" means the
    attached competition. Raises KernelError if the kernel is not built, if signing in fails, if Kaggle refuses a dataset or
    the kernel, if a dataset is not ready in time, or if pushed.json is damaged.
    """
    out = Path(out)
    metadata_path = out / "kernel" / "kernel-metadata.json"
    if not metadata_path.is_file():
        raise KernelError(f"{metadata_path} does not exist; build the kernel first")
    metadata = json.loads(metadata_path.read_text(encoding="utf-8"))
    previous = read_pushed(out) if (out / PUSHED).is_file() else None
    client = KaggleClient()
    client.check_owner("kernel", metadata["id"])
    datasets, digest, bundles = {}, digest_build(out), list_bundles(out / "weights")
    for folder in (out / "wheels", out / "weights"):
        if folder.is_dir():
            name = json.loads((folder / "dataset-metadata.json").read_text(encoding="utf-8"))["id"]
            datasets[name] = _push_dataset(client, name, folder, wait_s, poll_s)
    url, version = _push_kernel(client, metadata, out / "kernel")
    pushed = Pushed(
        kernel=metadata["id"],
        url=url,
        version=version,
        bundles=bundles,
        fused_run=str(fused_run.absolute()) if fused_run else "",
        datasets=datasets,
        competition=next(iter(metadata["competition_sources"]), ""),
        rules=rules,
        digest=digest,
        pushed=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_new_version(out, pushed, previous)
    return pushed


def push_dataset(name: str, folder: Path, wait_s: float = 3600.0, poll_s: float = 5.0) -> str:
    """Upload `folder` as the dataset `name` (OWNER/SLUG), and wait until Kaggle has processed the dataset.

    Returns "created" or "new version". The status is checked every `poll_s` seconds, for at most `wait_s` seconds. Raises
    KernelError if signing in fails, if OWNER is not the signed-in user, if Kaggle refuses the dataset, or if the dataset is
    not ready in time.
    """
    client = KaggleClient()
    client.check_owner("dataset", name)
    return _push_dataset(client, name, folder, wait_s, poll_s)


def _push_dataset(client: KaggleClient, name: str, folder: Path, wait_s: float, poll_s: float) -> str:
    """Upload `folder` as the dataset `name` and wait until it is ready; return "created", "new version" or "unchanged"."""
    action = f"pushing the dataset {name}"
    status, previous_version = _dataset_status(client, name)
    if status == "ready" and folder.name == "wheels" and _has_same_files(client, name, folder):
        return "unchanged"
    logger.info("uploading %s", name)
    # dir_mode is "zip", because otherwise the client skips subfolders.
    with client.calling(action):
        if status:
            answer = client.api.dataset_create_version(str(folder), "built by the kit", quiet=True, dir_mode="zip")
        else:
            answer = client.api.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="zip")
    if answer is None or answer.error or answer.invalid_tags or answer.status.lower() != "ok":
        reason = answer and (
            answer.error or (answer.invalid_tags and f"invalid tags {answer.invalid_tags}") or answer.status
        )
        raise KernelError(f"{action}: Kaggle answered {reason or 'nothing'}{client.quote_output()}")
    _wait_until_ready(client, name, previous_version, wait_s, poll_s)
    return "new version" if status else "created"


def _dataset_status(client: KaggleClient, name: str) -> tuple[str, int]:
    """Return the status of a dataset's newest version, such as "ready", and the number of its current version.

    While an upload is being processed, the newest version is not yet the current one. Returns ("", 0) if the dataset does
    not exist.
    """
    with client.calling(f"asking for the dataset {name}"):
        try:
            answer = json.loads(client.api.dataset_status(name, format="json"))
        except requests.HTTPError as error:
            # Kaggle returns 403 for missing datasets too. If the dataset belongs to another user, creating it will fail.
            if error.response is not None and error.response.status_code in (403, 404):
                return "", 0
            raise
    return answer["status"], answer["current_version_number"] or 0


def _has_same_files(client: KaggleClient, name: str, folder: Path) -> bool:
    """Return whether the dataset's files have the same names and sizes as those in `folder`.

    This comparison suffices only for wheels, whose names contain their versions.
    """
    with client.calling(f"asking for the files of {name}"):
        listed = client.api.dataset_list_files(name, page_size=PAGE)
    local_sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name not in METADATA}
    return {file.name: file.total_bytes for file in listed.files or []} == local_sizes


def _wait_until_ready(client: KaggleClient, name: str, previous_version: int, wait_s: float, poll_s: float) -> None:
    """Wait until a version of the dataset `name` later than `previous_version` is ready.

    A kernel that is pushed earlier would get the previous version. The status is checked every `poll_s` seconds. Raises
    KernelError if Kaggle reports a failure, or after `wait_s` seconds.
    """
    status = ""

    def ask() -> bool | None:
        nonlocal status
        status, version = _dataset_status(client, name)
        if status in ("failed", "deleted"):
            raise KernelError(
                f"{name} was uploaded, but its status is {status!r}; see https://www.kaggle.com/datasets/{name}"
            )
        if status == "ready" and (not previous_version or version > previous_version):
            return True
        logger.info("%s: %s", name, status or "not listed yet")
        return None

    # Wait before the first check, because until the upload is registered, Kaggle reports the older version's status.
    time.sleep(poll_s)
    if not poll(ask, wait_s, poll_s):
        raise KernelError(
            f"{name} was uploaded, but is not ready after {wait_s:g} s (its status: {status or 'unknown'}); "
            f"see https://www.kaggle.com/datasets/{name} and push again"
        )


def _push_kernel(client: KaggleClient, metadata: dict[str, Any], folder: Path) -> tuple[str, int]:
    """Push the kernel and return its URL and version number.

    Raises KernelError if Kaggle refuses the kernel, or if Kaggle's answer reports a problem, such as an input that does not
    exist.
    """
    name = metadata["id"]
    logger.info("pushing the kernel %s", name)
    with client.calling(f"pushing the kernel {name}"):
        answer = client.api.kernels_push(str(folder))
    if answer is None or answer.error:
        reason = (answer and answer.error) or "nothing"
        raise KernelError(f"the kernel {name} was not pushed: Kaggle answered {reason}{client.quote_output()}")
    complaints = [
        f"{meaning}: {', '.join(getattr(answer, field))}" for field, meaning in COMPLAINTS.items() if getattr(answer, field)
    ]
    complaints += client.complaints()
    if f"/{name}" not in answer.url.lower():
        complaints.append(f"its URL is {answer.url or 'missing'}, expected one that contains {name}")
    if not answer.version_number:
        complaints.append("no version number")
    if complaints:
        raise KernelError(
            f"Kaggle started the kernel {name} (version {answer.version_number or 'unknown'}), but reported problems; "
            "correct these and push again:\n  " + "\n  ".join(complaints)
        )
    return answer.url, answer.version_number
