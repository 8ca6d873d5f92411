"""Request filter of the page's server: only this computer may ask, and the browser may contact no other server."""

import re
from ipaddress import ip_address
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


class Guarded:
    """ASGI middleware that passes on only requests from pages of this server, opened under a name of this computer.

    Another site's page can send requests from its own address (visible in the Origin header) or under a name of its own that
    points to 127.0.0.1 (visible in the Host header). Both get status 403 and a sentence. The headers of each response keep
    the browser from contacting other servers, and tags that name other servers are removed from HTML.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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
        else:
            await self.app(scope, receive, _FilteredSend(send))


def _is_this_computer(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(sentence: str) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=403, headers=HEADERS)


class _FilteredSend:
    """Sends one response chunk by chunk, but HTML in one piece, because a tag may be split between two chunks."""

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
