"""Filters the page's traffic: refuses requests from other sites, and keeps the browser from contacting other servers."""

import json
import os
import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Gradio puts scripts and styles into its page and compiles event handlers in the browser.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # "no-referrer" would change the Origin of the page's own forms to "null".
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
EXTERNAL_TAGS = re.compile(
    rb"""<script\b[^>]*\ssrc=["'](?:https?:)?//[^>]*>\s*</script>|<(?:link|meta)\b[^>]*["'](?:https?:)?//[^>]*>""", re.I
)


UPLOAD_ROUTES = ("/gradio_api/upload", "/upload")
# Paths with an address of another server, from which Gradio would fetch the file.
REMOTE_FILE = re.compile(r"/(?:file|proxy)[=/]\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# An event of the page sends the values of its controls: a few kilobytes.
MAX_EVENT_BYTES = 1_000_000


class Guarded:
    """ASGI middleware that rejects requests unless Host is localhost or a loopback address and Origin, if sent, is Host.

    A request of another site's page has that site's address in its Origin header or, if the site's name points to 127.0.0.1,
    the site's name in its Host header. In both cases, the response has status 403 and a sentence that says why. The headers
    of each response keep the browser from contacting other servers, and tags with addresses of other servers are removed
    from HTML.

    Gradio opens any file whose path an event contains, and fetches URLs, because its own check is off in a mounted app.
    Therefore an event with the path of a file outside `upload_folder` gets status 403, and so does a request for a file on
    another server. An upload gets status 413 if it would make the parent folder of `upload_folder` larger than
    `max_total_bytes`.
    """

    def __init__(self, app: ASGIApp, upload_folder: Path, max_total_bytes: int) -> None:
        self.app, self.upload_folder, self.max_total_bytes = app, upload_folder.resolve(), max_total_bytes
        self.arriving_bytes = 0  # stated lengths of the uploads in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if scope["type"] != "http":  # the page needs no WebSocket
            await send({"type": "websocket.close", "code": 1008})
        elif not _is_this_computer(host):
            sentence = "This page works only on the computer that runs it. Open it there as http://127.0.0.1 with its port."
            await _refusal(sentence)(scope, receive, send)
        elif origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            await _refusal("Requests from other web pages are not allowed.")(scope, receive, send)
        elif REMOTE_FILE.search(scope["path"]):
            await _refusal("Files of other servers cannot be opened.")(scope, receive, send)
        elif scope["path"] in UPLOAD_ROUTES:
            length = headers.get("content-length", "")
            if refusal := self._check_upload(length):
                return await refusal(scope, receive, send)
            self.arriving_bytes += int(length)
            try:
                await self.app(scope, receive, _FilteredSend(send))
            finally:
                self.arriving_bytes -= int(length)
        else:
            body = await _read_body(receive)
            refusal = self._check_event(body)
            replay = _Replay(body or b"", receive)
            await (refusal(scope, replay, send) if refusal else self.app(scope, replay, _FilteredSend(send)))

    def _check_upload(self, content_length: str) -> PlainTextResponse | None:
        if not content_length.isdecimal():
            return _refusal("An upload must state its length.", 411)
        # Files that are still arriving, or whose upload was aborted, are in the parent folder of `upload_folder`.
        present = sum(path.stat().st_size for path in self.upload_folder.parent.rglob("*") if path.is_file())
        if present + self.arriving_bytes + int(content_length) > self.max_total_bytes:
            sentence = (
                f"The files uploaded to this page may take {self.max_total_bytes / 1e6:,.0f} MB in all. Restart the page, "
                "which deletes them, or choose smaller files."
            )
            return _refusal(sentence, 413)
        return None

    def _check_event(self, body: bytes | None) -> PlainTextResponse | None:
        if body is None:
            return _refusal(f"A request may have at most {MAX_EVENT_BYTES:,} bytes, except for uploads.", 413)
        try:
            event = json.loads(body) if body else None
            paths = list(_paths(event))
        except (ValueError, RecursionError):
            return _refusal("The request is not valid JSON.", 400)
        if not all(self._is_upload(path) for path in paths):
            return _refusal("Only files that were uploaded to this page can be opened.")
        return None

    def _is_upload(self, path: Any) -> bool:
        try:
            return Path(os.path.realpath(path)).is_relative_to(self.upload_folder)
        except (TypeError, ValueError):  # not a string, or with a zero byte
            return False


def _paths(value: Any) -> Iterator[Any]:
    """Yield every value under a key `path` in parsed JSON, because Gradio treats an object with this key as a file."""
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key == "path" and item is not None)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)


async def _read_body(receive: Receive) -> bytes | None:
    """Return the whole body of a request, or None if it is longer than 1 MB (MAX_EVENT_BYTES)."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_EVENT_BYTES:
            return None
    return body


class _Replay:
    """ASGI receive function that returns the request's body, which was already read, and then the messages after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _is_this_computer(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(sentence: str, status: int = 403) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=status, headers=HEADERS)


class _FilteredSend:
    """ASGI send function that adds security headers (HEADERS) and removes tags with addresses of other servers from HTML.

    HTML is sent in one piece, because a tag may be split between two chunks; other content is sent chunk by chunk.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None  # sent when the length of the HTML is known
        self.html = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                self.start = message
                return
        elif message["type"] == "http.response.body" and self.start is not None:
            self.html += message.get("body", b"")
            if message.get("more_body"):
                return
            html = EXTERNAL_TAGS.sub(b"", self.html)
            if (
                "content-length" in (headers := MutableHeaders(scope=self.start)) and self.html
            ):  # the response to HEAD has no body
                headers["content-length"] = str(len(html))
            await self.send(self.start)
            message = {**message, "body": html}
        await self.send(message)
