"""The web server of the page: it serves this computer's browsers, contacts no other computer and leaves no files behind."""

import contextlib
import errno
import io
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from kitlib.errors import PageError
from kitlib.page.requests import Guarded
from kitlib.page.uploads import MAX_UPLOAD_BYTES
from kitlib.processes import exiting_on_signals

if TYPE_CHECKING:  # gradio must not be imported before `quiet_gradio` has set the environment
    import gradio

OFFLINE_SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
# The upload of a larger file is aborted. A smaller file above MAX_UPLOAD_BYTES gets the message of kitlib.page.uploads.
ABORTED_UPLOAD_BYTES = 4 * MAX_UPLOAD_BYTES
MAX_TOTAL_UPLOAD_BYTES = 40 * MAX_UPLOAD_BYTES  # of all files until the page is stopped
# The last two are for a container whose port is published only on the computer's own address.
HOSTS = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
GRACE_S = 1.0  # time for the server to stop


@contextlib.contextmanager
def quiet_gradio() -> Iterator[Path]:
    """Keep Gradio from contacting other servers. Yield the only folder Gradio writes to, and delete this folder at the end.

    Enter this before gradio is imported. In the main thread, SIGTERM and a closed terminal raise SystemExit, which also
    ends the block.
    """
    folder = Path(tempfile.mkdtemp(prefix="kit-page-"))
    paths = {"GRADIO_TEMP_DIR": folder / "files", "GRADIO_EXAMPLES_CACHE": folder / "examples"}
    previous = {name: os.environ.get(name) for name in [*OFFLINE_SETTINGS, *paths]}, tempfile.tempdir
    os.environ.update(OFFLINE_SETTINGS, **{name: str(path) for name, path in paths.items()})
    # Uploads start as temporary files and remain if the browser disconnects.
    tempfile.tempdir = str(folder)
    try:
        with exiting_on_signals():
            yield folder
    finally:
        for name, value in previous[0].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = previous[1]
        shutil.rmtree(folder, ignore_errors=True)


def page_app(
    blocks: "gradio.Blocks",
    max_upload_bytes: int = ABORTED_UPLOAD_BYTES,
    max_total_bytes: int = MAX_TOTAL_UPLOAD_BYTES,
    theme: "gradio.Theme | None" = None,
    css: str | None = None,
) -> Guarded:
    """Return a web app (ASGI) that serves `blocks` at / and the text "ok" at /healthz.

    An uploaded file gets status 413 if it is larger than `max_upload_bytes`, or if all uploads together would exceed
    `max_total_bytes`. Call this within `quiet_gradio`, which sets the folder of uploads.
    """
    import gradio
    from gradio.utils import get_upload_folder

    app = FastAPI(openapi_url=None)  # and so no pages of documentation
    app.get("/healthz")(lambda: PlainTextResponse("ok"))
    # Unlike launch(), this creates no sharing link, checks for no newer version and loads no fonts.
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        max_file_size=max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=css,
    )
    blocks.config["stylesheets"] = []  # Google's fonts
    return Guarded(app, Path(get_upload_folder()), max_total_bytes)


def serve(
    blocks: "gradio.Blocks",
    port: int = 7860,
    host: str = "127.0.0.1",
    ready: Callable[[str], None] | None = None,
    theme: "gradio.Theme | None" = None,
    css: str | None = None,
) -> None:
    """Serve `blocks` until SIGINT or SIGTERM; call `ready` with the address. Port 0 chooses a free port.

    Call this within `quiet_gradio`. After Ctrl-C (SIGINT), the function returns normally; for SIGTERM see `quiet_gradio`.
    Raises PageError if the port is not available, and ValueError if `host` is not one of this computer's own (HOSTS).
    """
    if host not in HOSTS:
        raise ValueError(f"--host must be one of {', '.join(HOSTS)}, not {host!r}: the page serves only this computer")
    config = uvicorn.Config(
        page_app(blocks, theme=theme, css=css),
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=0,
    )
    server = _Server(config)
    # An event, because a join interrupted by a signal marks the thread as ended (CPython 3.11).
    ended = threading.Event()

    def run(listening_socket: socket.socket) -> None:
        try:
            with listening_socket:
                server.run(sockets=[listening_socket])
        finally:
            ended.set()

    listening_socket = _open_socket(host, port)
    try:
        # Threads started by a daemon thread are daemons: a running prediction does not delay the end.
        threading.Thread(target=run, args=[listening_socket], daemon=True).start()
        if ready:  # the socket queues browsers until the server has started
            ready(f"http://{address_to_open(host)}:{listening_socket.getsockname()[1]}")
        ended.wait()
    except KeyboardInterrupt:
        return
    finally:
        # Open connections are closed, for which Gradio would print tracebacks.
        with contextlib.redirect_stderr(io.StringIO()):
            server.should_exit = True
            ended.wait(GRACE_S)
    raise RuntimeError("the page's server stopped unexpectedly; the log above shows why")


def address_to_open(host: str) -> str:
    """Return `host` as it must be written in a URL that a browser on this computer can open."""
    if host in ("0.0.0.0", "::"):  # all addresses of this computer, not an address that can be opened
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    """A web server that closes open streams at shutdown without logging errors."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Each open page has a stream that must be cut off, which uvicorn would log as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def _open_socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "is already in use, perhaps by another page"
        else:
            reason = f"cannot be opened ({error.strerror or error})"
        raise PageError(
            f"Port {port} of {host} {reason}. Choose another one with --port, for example --port {port + 1}."
        ) from None
