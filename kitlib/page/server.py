"""The web server of the page: for this computer's own browsers, asking nothing of any other, leaving no file behind."""

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

if TYPE_CHECKING:  # gradio must not be imported before `quiet_gradio` has spoken
    import gradio

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
# A larger file is stopped on its way; what is smaller and still too large gets the sentence of kitlib.page.uploads.
STOPPED_BYTES = 4 * MAX_UPLOAD_BYTES
# The last two only in a container, whose port is published on the computer's own address.
HOSTS = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
GRACE_S = 1.0  # for the server's own end


@contextlib.contextmanager
def quiet_gradio() -> Iterator[Path]:
    """Let Gradio ask nothing of the outside and write only into the folder yielded, which is gone at the end.

    To be entered before gradio is imported and its blocks are built. The end may also be SIGTERM or a closed terminal, which
    leave the block as SystemExit where it is the main thread's.
    """
    folder = Path(tempfile.mkdtemp(prefix="kit-page-"))
    places = {"GRADIO_TEMP_DIR": folder / "files", "GRADIO_EXAMPLES_CACHE": folder / "examples"}
    former = {name: os.environ.get(name) for name in [*QUIET, *places]}, tempfile.tempdir
    os.environ.update(QUIET, **{name: str(place) for name, place in places.items()})
    # Uploads begin as temporary files, and stay that where a browser goes away halfway.
    tempfile.tempdir = str(folder)
    try:
        with exiting_on_signals():
            yield folder
    finally:
        for name, value in former[0].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = former[1]
        shutil.rmtree(folder, ignore_errors=True)


def page_app(
    blocks: "gradio.Blocks",
    max_upload_bytes: int = STOPPED_BYTES,
    theme: "gradio.Theme | None" = None,
    css: str | None = None,
) -> Guarded:
    """`blocks` at /, and /healthz, which answers "ok". A larger file of an upload is answered with 413."""
    import gradio

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/healthz")(lambda: PlainTextResponse("ok"))
    # What launch() has besides, this has not: a sharing link, a look for a newer version, a browser told to ask for fonts.
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
    return Guarded(app)


def serve(
    blocks: "gradio.Blocks",
    port: int = 7860,
    host: str = "127.0.0.1",
    ready: Callable[[str], None] | None = None,
    theme: "gradio.Theme | None" = None,
    css: str | None = None,
) -> None:
    """Serve `blocks` until SIGINT or SIGTERM; `ready` is told the address. Port 0 stands for any free one.

    To be called within `quiet_gradio`. Ctrl-C is an ordinary end; SIGTERM leaves as `quiet_gradio` says. Raises PageError,
    ValueError for a host that is not this computer alone or, of a container, all of its addresses.
    """
    if host not in HOSTS:
        raise ValueError(f"--host is one of {', '.join(HOSTS)}, not {host!r}: the page answers no other computer")
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
    # An event, because a join that a signal interrupts takes the thread for ended (CPython 3.11).
    ended = threading.Event()

    def run(opened: socket.socket) -> None:
        try:
            with opened:
                server.run(sockets=[opened])
        finally:
            ended.set()

    opened = _listening(host, port)
    try:
        # Threads of a daemon are daemons: a model that is at work does not hold up the end.
        threading.Thread(target=run, args=[opened], daemon=True).start()
        if ready:  # a browser that comes before the server has started waits in the socket's queue
            ready(f"http://{address_to_open(host)}:{opened.getsockname()[1]}")
        ended.wait()
    except KeyboardInterrupt:
        return
    finally:
        # Whoever is being answered is cut off, which Gradio would print at length.
        with contextlib.redirect_stderr(io.StringIO()):
            server.should_exit = True
            ended.wait(GRACE_S)
    raise RuntimeError("the page's server ended by itself")


def address_to_open(host: str) -> str:
    """The host as a URL names it: what a browser of this computer opens."""
    if host in ("0.0.0.0", "::"):  # every address of this computer, and the name of none
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Every open page holds a stream that ends only by being cut, at once, which uvicorn would call an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "is taken, perhaps by another page"
        else:
            reason = f"cannot be opened ({error.strerror or error})"
        raise PageError(
            f"Port {port} of {host} {reason}: name another with --port, for example --port {port + 1}."
        ) from None
