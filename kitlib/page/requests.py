"""Which requests the page's server hears, and what its answers forbid the browser: nothing leaves for another computer."""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Gradio writes scripts and styles into its page, and compiles handlers in the browser.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: it would turn the Origin of the page's own forms into "null".
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OUTSIDE = re.compile(
    rb"""<script\b[^>]*\ssrc=["'](?:https?:)?//[^>]*>\s*</script>|<(?:link|meta)\b[^>]*["'](?:https?:)?//[^>]*>""", re.I
)


class Guarded:
    """Let only pages of this server, opened by a name of this computer, ask `app`; keep the browser from asking elsewhere.

    Another site's page can ask under its own name that it has pointed at 127.0.0.1 (the Host says so) or from its own
    place (the Origin says so); both are answered with 403 and a sentence. HTML loses the tags that name other servers.
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
            sentence = "This page is for the computer it runs on: open it there as http://127.0.0.1 with its port."
            await _refusal(sentence)(scope, receive, send)
        elif origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            await _refusal("Other web pages may not ask this one.")(scope, receive, send)
        else:
            await self.app(scope, receive, _Outgoing(send))


def _is_this_computer(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(sentence: str) -> PlainTextResponse:
    return PlainTextResponse(sentence, status_code=403, headers=HEADERS)


class _Outgoing:
    """Sends one answer on as it comes, but HTML whole, because a tag may lie across two pieces."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None  # held back until the length of the HTML is known
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
            html = OUTSIDE.sub(b"", self.html)
            if "content-length" in (headers := MutableHeaders(scope=self.start)) and self.html:  # HEAD has none to cut
                headers["content-length"] = str(len(html))
            await self.send(self.start)
            message = {**message, "body": html}
        await self.send(message)
