"""Sign in to Kaggle's own Python client, and turn its errors, and problems that it only prints, into the kit's errors."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import requests

from kitlib.errors import KaggleUnreachable, KernelError

logger = logging.getLogger(__name__)
T = TypeVar("T")

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
TOO_MANY_REQUESTS = 429
# Beginnings of printed lines that report no problem; the client repeats a failed request by itself.
HARMLESS_OUTPUT = (
    "Warning: Looks like you're using an outdated",
    "Warning: Your Kaggle API key is readable",
    "Request failed:",
)
# While the kit waits for Kaggle, it ignores connection failures for this long.
PATIENCE_S = 900.0


class KaggleClient:
    """Kaggle's Python client, signed in. The methods of its attribute `api` may only be called inside `with calling(...)`.

    Raises KernelError if there is no valid token.
    """

    def __init__(self) -> None:
        self._printed = io.StringIO()
        with self.calling("signing in"):
            # Importing this module signs in too.
            from kaggle.api.kaggle_api_extended import KaggleApi

            self.api: Any = KaggleApi()
            self.api.authenticate()
            self.user = self.api.config_values.get(self.api.CONFIG_NAME_USER) or ""
            if not self.user:
                raise KernelError(TOKEN)

    def check_owner(self, kind: str, name: str) -> None:
        """Raise KernelError if the owner in `name` (OWNER/SLUG) is not the signed-in user.

        `kind`, such as "dataset", is only used in the error message.
        """
        if name.split("/")[0] != self.user.lower():
            raise KernelError(
                f"the {kind} is {name!r}, but the token belongs to {self.user!r}; build with --owner {self.user.lower()}"
            )

    @contextlib.contextmanager
    def calling(self, action: str) -> Iterator[None]:
        """Collect what the client prints inside the block, and turn its errors into KernelError.

        `action` says in a few words what the client is doing, for error messages. Raises KaggleUnreachable, a KernelError,
        if the error may be temporary.
        """
        self._printed.seek(0)
        self._printed.truncate()
        try:
            with contextlib.redirect_stdout(self._printed), contextlib.redirect_stderr(self._printed):
                yield
        except SystemExit as error:
            raise KernelError(f"{action}: {TOKEN}{self.quote_output()}") from error
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            advice = f"; {ADVICE[status]}" if status in ADVICE else ""
            kind = KaggleUnreachable if status >= 500 or status == TOO_MANY_REQUESTS else KernelError
            raise kind(f"{action}: Kaggle answered {error}{advice}{self.quote_output()}") from error
        except requests.RequestException as error:
            raise KaggleUnreachable(f"{action}: Kaggle cannot be reached: {error}{self.quote_output()}") from error
        except (ValueError, LookupError, TypeError, OSError) as error:
            if isinstance(error, KernelError):
                raise
            raise KernelError(f"{action}: Kaggle's client failed: {error!r}{self.quote_output()}") from error

    def complaints(self) -> list[str]:
        """Return the lines that the client printed in its last call, except harmless ones."""
        lines = (line.strip() for line in self._printed.getvalue().splitlines())
        return [line for line in lines if line and not line.startswith(HARMLESS_OUTPUT)]

    def quote_output(self) -> str:
        """Return what the client printed in its last call, as lines to add to an error message."""
        return "".join(f"\n  Kaggle's client printed: {line}" for line in self.complaints())


def poll(ask: Callable[[], T | None], wait_s: float, poll_s: float) -> T | None:
    """Call `ask` every `poll_s` seconds until it returns a value other than None; return this value.

    Returns None after `wait_s` seconds. If Kaggle cannot be reached, this is logged and `ask` is called again. The error
    KaggleUnreachable is raised only if Kaggle stays unreachable for more than 15 minutes (PATIENCE_S).
    """
    started = reached = time.monotonic()
    while True:
        try:
            answer, reached = ask(), time.monotonic()
            if answer is not None:
                return answer
        except KaggleUnreachable as error:
            if time.monotonic() - reached > PATIENCE_S:
                raise
            logger.warning("%s; trying again", error)
        if time.monotonic() - started > wait_s:
            return None
        time.sleep(poll_s)
