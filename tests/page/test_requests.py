"""The filter of the page's requests around a small app: what single messages of ASGI become."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starlette.responses import PlainTextResponse

from kitlib.page.requests import Guarded

LENGTH = (b"content-length", b"1234")


def ask(app, method="GET", path="/", **headers):
    """Send a request without a body to an ASGI app; return the messages of the answer."""
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"localhost")]}
    scope["headers"] += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}  # ASGI: both `body` and `more_body` may be left out

    asyncio.run(app(scope, receive, send))
    return sent


def test_uploads_that_are_still_arriving_count(tmp_path):
    (tmp_path / "files" / "old").mkdir(parents=True)
    (tmp_path / "files" / "old" / "x").write_bytes(bytes(10))
    codes = []

    def upload(size):
        codes.append(ask(guarded, "POST", "/upload", content_length=str(size))[0]["status"])

    async def app(scope, receive, send):
        if len(codes) < 1:  # while the first upload of 60 bytes arrives: 30 more would be too many, 29 not
            codes.append("first")
            with ThreadPoolExecutor(1) as other:
                other.submit(upload, 30).result()
                other.submit(upload, 29).result()
        await PlainTextResponse("ok")(scope, receive, send)

    guarded = Guarded(app, tmp_path / "files", 99)
    upload(60)
    upload(89)
    assert codes == ["first", 413, 200, 200, 200]


def test_an_answer_to_head_keeps_the_length_of_the_page():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html"), LENGTH]})
        await send({"type": "http.response.body"})

    start, body = ask(Guarded(app, Path("files"), 1), "HEAD")
    assert LENGTH in start["headers"] and body["body"] == b""


def test_tags_of_other_servers_are_removed_also_between_two_parts_of_the_page():
    async def app(scope, receive, send):
        head = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/html; charset=utf-8"), LENGTH],
        }
        await send(head)
        await send({"type": "http.response.body", "body": b'<p>a</p><link href="https://else', "more_body": True})
        await send({"type": "http.response.body", "body": b'where/x.css"><p>b</p>'})

    start, body = ask(Guarded(app, Path("files"), 1))
    assert body["body"] == b"<p>a</p><p>b</p>" and (b"content-length", b"16") in start["headers"]
    assert dict(start["headers"])[b"x-frame-options"] == b"DENY"


def test_other_content_and_compressed_pages_are_passed_on_part_by_part():
    parts = [{"type": "http.response.body", "body": each, "more_body": each == b"1"} for each in (b"1", b"2")]
    for headers in ([(b"content-type", b"image/png")], [(b"content-type", b"text/html"), (b"content-encoding", b"gzip")]):

        async def app(scope, receive, send, headers=headers):
            await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
            for part in parts:
                await send(part)

        _, *passed_on = ask(Guarded(app, Path("files"), 1))
        assert passed_on == parts


def test_the_app_gets_the_body_of_a_request_once_and_then_what_follows():
    got = []

    async def app(scope, receive, send):
        got.extend([await receive(), await receive()])
        await PlainTextResponse("ok")(scope, receive, send)

    assert ask(Guarded(app, Path("files"), 1), "POST")[0]["status"] == 200
    assert got == [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.request"}]
