"""The page's server: who may ask, what leaves the computer, which files remain, and how it ends."""

import hashlib
import json
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import urllib.request
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from kitlib.errors import PageError
from kitlib.page.server import address_to_open, page_app, quiet_gradio, serve

HOME = "http://127.0.0.1:7860"
LIMIT = 50_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp_path_factory.getbasetemp()  # must not lie in the folder that is deleted at the end
    with quiet_gradio() as folder:
        yield folder
    assert not folder.exists()


@pytest.fixture(scope="module")
def going_on():
    """An event that the reader of a stream sets after its first chunk."""
    return threading.Event()


@pytest.fixture(scope="module")
def app(folder, going_on):
    import gradio

    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("version_check", "_do_analytics_request", "_send_telemetry_in_thread"):
            patch.setattr(f"gradio.analytics.{name}", lambda *a, name=name, **k: asked.append(name))

        def steps(text):
            yield f"first {text}"
            if text == "step":  # only one test waits for the second chunk
                assert going_on.wait(30)
            yield f"second {text}"

        with gradio.Blocks(title="Chest X-rays") as blocks:
            written = gradio.Textbox()
            read = gradio.Textbox()
            gradio.File()
            gradio.Button().click(steps, written, read, api_name="steps")
        yield page_app(blocks, LIMIT)
    assert asked == []


def a_page():
    import gradio

    with gradio.Blocks() as blocks:
        gradio.File()
    return blocks


@pytest.fixture
def client(app):
    with TestClient(app, base_url=HOME) as client:
        yield client


def addresses(html):
    """Return all addresses that a browser might load by itself: sources, links and contents of meta tags."""
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag in ("script", "link", "meta", "img", "iframe"):
                found.extend(value for name, value in attributes if name in ("src", "href", "content") and value)

    Tags().feed(html)
    return found


def test_the_page_names_no_other_server(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "Chest X-rays" in answer.text
    assert len(answer.content) == int(answer.headers["content-length"])
    named = addresses(answer.text)
    assert any(re.fullmatch(r"\./assets/index-\w+\.js", address) for address in named)
    assert [address for address in named if "//" in address] == []
    settings = client.get("/config").json()
    assert settings["stylesheets"] == [] and settings["footer_links"] == [] and not settings["analytics_enabled"]
    assert settings["max_file_size"] == LIMIT
    assert re.findall(r"(?:url\(|@import)[\s\"']*(?:https?:)?//", client.get("/theme.css").text) == []


def test_headers_forbid_the_browser_to_ask_elsewhere(client):
    for path in ("/", "/config", "/healthz", "/no-such-place"):
        headers = client.get(path).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'self'" and rules["frame-ancestors"] == "'none'"
        assert "http" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "localhost:1", "[::1]:7860", "127.1.2.3"])
def test_names_of_this_computer_are_answered(client, host):
    answer = client.get("/healthz", headers={"host": host})
    assert (answer.status_code, answer.text) == (200, "ok")


@pytest.mark.parametrize(
    "host",
    [
        *["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "localhost@evil.example"],
        *["192.168.0.7:7860", "0.0.0.0:7860", "[::2]:7860", "[::1", ""],
    ],
)
def test_other_host_names_are_refused(client, host):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 403 and answer.text.startswith("This page works only on the computer that runs it")
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:7860", "http://127.0.0.1:8888"])
def test_other_pages_may_not_ask(client, origin):
    for method in ("GET", "POST", "OPTIONS"):
        answer = client.request(method, "/gradio_api/queue/join", headers={"origin": origin}, json={})
        assert (answer.status_code, answer.text) == (403, "Requests from other web pages are not allowed.")
    assert client.get("/healthz", headers={"origin": HOME}).text == "ok"


def test_no_web_socket(client):
    with pytest.raises(Exception) as refused, client.websocket_connect("/gradio_api/stream/1"):
        pass
    assert refused.value.code == 1008  # RFC 6455: policy violation


def test_files_of_the_machine_are_not_served(client):
    own = Path(__file__).resolve()
    for path in ("/etc/passwd", own, f"{Path.cwd()}/README.md", "../../etc/passwd", "file:///etc/passwd"):
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"):
            assert client.get(f"{route}{path}").status_code in (403, 404), path
    assert client.get(f"/gradio_api/proxy={HOME}/healthz").status_code == 403
    assert client.get("/monitoring/x").status_code == 403
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404] * 2


def test_an_upload_is_stored_in_the_temporary_folder(client, folder):
    content = b"\x89PNG" * 1000
    answer = client.post("/gradio_api/upload", files={"files": ("chest <b>.png", content)})
    (place,) = answer.json()
    assert Path(place).is_relative_to(folder) and Path(place).read_bytes() == content
    assert hashlib.sha256(client.get(f"/gradio_api/file={place}").content).digest() == hashlib.sha256(content).digest()
    assert Path(tempfile.gettempdir()) == folder


def test_a_file_that_is_too_large_is_answered_and_not_kept(client, folder):
    before = sorted(folder.rglob("*"))
    answer = client.post("/gradio_api/upload", files={"files": ("large.dcm", bytes(4 * LIMIT))})
    assert answer.status_code == 413
    assert answer.text == f"File size exceeded maximum allowed size of {LIMIT} bytes."
    assert sorted(folder.rglob("*")) == before
    assert client.get("/healthz").text == "ok"


def test_all_uploads_together_have_a_limit_and_state_their_length(folder):
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with TestClient(page_app(a_page(), LIMIT, max_total_bytes=present + LIMIT), base_url=HOME) as client:
        codes = [
            client.post("/gradio_api/upload", files={"files": (f"{n}.png", bytes([n]) * (LIMIT // 3))}).status_code
            for n in range(1, 4)
        ]
        assert codes == [200, 200, 413]  # the third file and the form around it exceed the limit
        unstated = client.post(
            "/gradio_api/upload",
            content=iter([b"--b--"]),
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        assert unstated.status_code == 411


FOREIGN = ["/etc/passwd", str(Path(__file__).resolve()), "http://evil.example/x.png", "file:///etc/passwd", "x\0y", 5, ["a"]]


@pytest.mark.parametrize("path", [*FOREIGN, "{folder}/../../etc/passwd", "{folder}"], ids=str)
def test_an_event_opens_no_file_but_uploads(client, folder, path, monkeypatch):
    if isinstance(path, str):
        path = path.replace("{folder}/", f"{folder}/files/").replace("{folder}", str(folder))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: pytest.fail(f"looked up {host}"))
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    before = sorted(folder.rglob("*"))
    for data in ([file], [[file]], [{"image": file}], [{"path": path}]):
        for route in ("call/steps", "queue/join", "run/steps", "api/steps", "component_server"):
            answer = client.post(f"/gradio_api/{route}", json={"data": data, "fn_index": 0, "session_hash": "s"})
            assert (answer.status_code, answer.text) == (403, "Only files that were uploaded to this page can be opened.")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy="])
@pytest.mark.parametrize("address", ["https://evil.example/x.png", "HTTP://evil.example/", "ftp://evil.example/x"])
def test_files_of_other_servers_are_neither_looked_up_nor_fetched(client, route, address, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: pytest.fail(f"looked up {host}"))
    answer = client.get(route + address)
    assert (answer.status_code, answer.text) == (403, "Files of other servers cannot be opened.")


def test_an_event_may_have_an_uploaded_file_or_none(client):
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", b"\x89PNG")}).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = client.post("/gradio_api/call/steps", json={"data": [file]})
    assert answer.status_code == 200 and "event_id" in answer.json()
    assert client.post("/gradio_api/call/steps", json={"data": [file | {"path": None}]}).status_code != 403


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"{}", b"[]", b"null", b'"text"', b'{"data": 1}'], ids=repr)
def test_an_odd_body_gets_a_short_answer_without_a_traceback(app, body):
    with TestClient(app, base_url=HOME, raise_server_exceptions=False) as client:
        for route in ("call/steps", "queue/join", "run/steps", "reset", "cancel", "upload", "stream/x/y/z", "no-such"):
            for headers in ({"content-type": "application/json"}, {"content-type": "text/plain"}):
                answer = client.post(f"/gradio_api/{route}", content=body, headers=headers)
                assert 400 <= answer.status_code <= 500 or answer.status_code == 200, route
                assert "Traceback" not in answer.text and ".py" not in answer.text and len(answer.text) < 1000


def test_a_request_that_is_too_long_is_refused(client):
    answer = client.post("/gradio_api/call/steps", json={"data": ["x" * 1_000_001]})
    assert answer.status_code == 413 and answer.text.startswith("A request may have at most 1,000,000 bytes")
    longest = json.dumps("x" * 999_998)  # the quotes are two more bytes
    assert client.post("/gradio_api/call/none", content=longest).status_code != 413


@contextmanager
def running(app):
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
    with socket.create_server(("127.0.0.1", 0)) as opened:
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def test_answers_stream_as_they_come_and_only_the_loopback_is_asked(app, going_on, monkeypatch):
    asked = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: asked.append(to[0]) or connect(self, to))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or lookup(host, *a, **k))
    with running(app) as home, httpx.Client(base_url=home, timeout=30) as client:
        event = client.post("/gradio_api/call/steps", json={"data": ["step"]}).json()["event_id"]
        with client.stream("GET", f"/gradio_api/call/steps/{event}") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = (json.loads(line[6:])[0] for line in answer.iter_lines() if line.startswith("data: ["))
            assert next(pieces) == "first step"  # arrives while the function still waits: the stream is not buffered
            going_on.set()
            assert next(pieces) == "second step"
    assert set(asked) == {"127.0.0.1"}


def test_a_port_in_use_is_reported_with_what_to_do(folder):
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = opened.getsockname()[1]
        with pytest.raises(PageError, match=rf"Port {port} of 127\.0\.0\.1 is already in use.* --port {port + 1}\."):
            serve(a_page(), port)


def test_another_fault_of_a_port_is_reported_too(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(PageError, match=r"Port 80 of localhost cannot be opened \(Permission denied\)\."):
        serve(a_page(), 80, "localhost")


@pytest.fixture
def server(folder, monkeypatch):
    """A replacement of the web server, which runs until its event `ends` is set."""

    class Server:
        ends = threading.Event()

        def __init__(self, config):
            Server.started = self
            self.app, self.should_exit = config.app, False

        def run(self, sockets):
            self.is_daemon = threading.current_thread().daemon
            self.ends.wait(30)

    monkeypatch.setattr("kitlib.page.server._Server", Server)
    return Server


def test_a_server_that_stops_by_itself_is_an_error(server):
    told = []

    def ready(address):
        told.append(address)
        server.ends.set()

    with pytest.raises(RuntimeError, match="stopped unexpectedly"):
        serve(a_page(), 0, "localhost", ready)
    assert re.fullmatch(r"http://localhost:\d+", told[0])
    assert server.started.is_daemon  # so that a running prediction does not delay the end


def test_ctrl_c_ends_a_page_with_its_theme_and_style(server):
    import gradio

    def ready(_):
        server.ends.set()
        raise KeyboardInterrupt

    theme = gradio.themes.Default(font=["my-font"])
    serve(a_page(), 0, "localhost", ready, theme, css="#mine { color: red }")
    assert server.started.should_exit
    with TestClient(server.started.app, base_url=HOME) as client:
        assert "my-font" in client.get("/theme.css").text and "#mine" in client.get("/config").json()["css"]


def test_environment_temporary_folder_and_signals_are_restored(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ), tempfile.tempdir, signal.getsignal(signal.SIGTERM)
    with quiet_gradio() as folder:
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["HF_HUB_OFFLINE"] == "1"
        assert Path(os.environ["GRADIO_TEMP_DIR"]).is_relative_to(folder)
        assert folder.stat().st_mode & 0o077 == 0  # only the user may read the X-rays
    assert (dict(os.environ), tempfile.tempdir, signal.getsignal(signal.SIGTERM)) == before
    assert not folder.exists()


def test_the_address_can_be_opened():
    hosts = ["127.0.0.1", "localhost", "::1", "0.0.0.0", "::"]
    assert [address_to_open(host) for host in hosts] == ["127.0.0.1", "localhost", "[::1]", "127.0.0.1", "127.0.0.1"]


def served(told):
    with quiet_gradio() as folder:
        import gradio

        with gradio.Blocks() as blocks:
            gradio.Textbox()
        serve(blocks, 0, ready=lambda home: told.send((folder, home)))
    sys.exit(77)


@pytest.fixture(scope="module")
def gradio_forks(app):
    """Start processes as forks of a new process that has loaded Gradio, which takes seconds.

    A fork of this process would inherit locks that threads of other tests hold, but not the threads.
    """
    with pytest.MonkeyPatch.context() as patch:
        # multiprocessing keeps its folder until this process ends, so it must not lie in that of `quiet_gradio`.
        patch.setattr(tempfile, "tempdir", None)
        multiprocessing.util.get_temp_dir()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["gradio", __name__])
    return forks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 77), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_server_with_an_open_page_and_leave_no_files(gradio_forks, number, code):
    here, there = gradio_forks.Pipe()
    process = gradio_forks.Process(target=served, args=(there,), daemon=True)
    process.start()
    assert here.poll(120)
    folder, home = here.recv()
    with urllib.request.urlopen(f"{home}/gradio_api/heartbeat/me", timeout=30) as heartbeat:
        assert heartbeat.readline() == b"data: ALIVE\n" and "server" not in heartbeat.headers
        assert folder.is_dir()
        os.kill(process.pid, number)
        process.join(30)
    assert process.exitcode == code
    assert not folder.exists()


def test_a_host_that_other_computers_can_ask_is_refused(app):
    with pytest.raises(ValueError, match=r"--host must be one of 127\.0\.0\.1, .*, not '192\.168\.0\.7'"):
        serve(app, port=0, host="192.168.0.7")
