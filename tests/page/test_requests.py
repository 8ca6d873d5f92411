"""The filter of the page's requests around a small app: what single messages of ASGI become."""

import asyncio
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse

from kitlib.page.requests import Guarded

LENGTH = (b"content-length", b"1234")


async def answer(app, method="GET", path="/", **headers):
    """Send a request without a body to an ASGI app; return the messages of the answer."""
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"localhost")]}
    scope["headers"] += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}  # ASGI: both `body` and `more_body` may be left out

    await app(scope, receive, send)
    return sent


def ask(*request, **headers):
    return asyncio.run(answer(*request, **headers))


def sending(*messages):
    """Return an ASGI app that answers each request with these messages."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


def start(*headers):
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(content, more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


def test_uploads_that_are_still_arriving_count(tmp_path):
    """Of 99 bytes, 10 are on the disk; while 60 arrive, 30 more are too many and 29 are not; afterwards, 89 are not."""
    (tmp_path / "files" / "old").mkdir(parents=True)
    (tmp_path / "files" / "old" / "x").write_bytes(bytes(10))
    meanwhile = []

    async def upload(size):
        return (await answer(guarded, "POST", "/upload", content_length=str(size)))[0]["status"]

    async def app(scope, receive, send):
        if not meanwhile:
            meanwhile.append("the first upload arrives")
            meanwhile.extend([await upload(30), await upload(29)])
        await PlainTextResponse("ok")(scope, receive, send)

    guarded = Guarded(app, tmp_path / "files", 99)
    assert asyncio.run(upload(60)) == 200 and meanwhile[1:] == [413, 200]
    assert asyncio.run(upload(89)) == 200


def test_an_answer_to_head_keeps_the_length_of_the_page():
    app = sending(start((b"content-type", b"text/html"), LENGTH), {"type": "http.response.body"})
    first, last = ask(Guarded(app, Path("files"), 1), "HEAD")
    assert LENGTH in first["headers"] and last["body"] == b""


def test_tags_of_other_servers_are_removed_also_between_two_parts_of_the_page():
    parts = body(b'<p>a</p><link href="https://else', more=True), body(b'where/x.css"><p>b</p>')
    app = sending(start((b"content-type", b"text/html; charset=utf-8"), LENGTH), *parts)
    first, whole = ask(Guarded(app, Path("files"), 1))
    assert whole["body"] == b"<p>a</p><p>b</p>" and (b"content-length", b"16") in first["headers"]


@pytest.mark.parametrize(
    "headers", [[(b"content-type", b"image/png")], [(b"content-type", b"text/html"), (b"content-encoding", b"gzip")]]
)
def test_other_content_and_compressed_pages_are_passed_on_part_by_part(headers):
    parts = [body(b"1", more=True), body(b"2")]
    assert ask(Guarded(sending(start(*headers), *parts), Path("files"), 1))[1:] == parts


def test_the_app_gets_the_body_of_a_request_once_and_then_what_follows():
    got = []

    async def app(scope, receive, send):
        got.extend([await receive(), await receive()])
        await PlainTextResponse("ok")(scope, receive, send)

    assert ask(Guarded(app, Path("files"), 1), "POST")[0]["status"] == 200
    assert got == [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.request"}]
