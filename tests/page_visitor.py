"""Drives the page in tests: a real server, a headless browser, and a visitor's actions and observations."""

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

# No sandbox, because containers often run as root. The other flags stop the browser's own network requests.
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
WAIT_MS = 30_000  # machines are shared
BOXES, TRUTH = "rect.predicted", "rect.truth"
# Console messages of a request that the page's own security policy has blocked.
BLOCKED = re.compile("Content Security Policy|Refused to")
expect.set_options(timeout=WAIT_MS)


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


# Python runs this code at the start of the server and of its decoding processes: it records which hosts they contact.
AUDIT = """
import os, sys
def record(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "a file of this computer"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    with open(os.environ["CONTACTED_HOSTS"], "a") as file:
        file.write(f"{host}\\n")
sys.addaudithook(record)
"""
LOCAL_HOSTS = {"127.0.0.1", "localhost", "None", "a file of this computer"}


@contextmanager
def serving(runs: Path) -> Iterator[subprocess.Popen]:
    """Serve the page of `runs` in its own process, which prints its address to stdout.

    Fails if the server ends by itself, or if it or one of its decoding processes looks up or contacts another computer.
    """
    command = [sys.executable, "-m", "kitlib", "page", "--runs", str(runs), "--port", "0"]
    hooks, hosts = runs.parent / "hooks", runs.parent / "contacted_hosts.txt"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(AUDIT)
    hosts.touch()
    environment = {**os.environ, "PYTHONPATH": str(hooks), "CONTACTED_HOSTS": str(hosts)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            yield server
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()
    assert set(hosts.read_text().split("\n")) - {""} <= LOCAL_HOSTS


def address_of(server: subprocess.Popen) -> str:
    output = ""
    for line in server.stdout:
        if match := re.search(r"http://\S+", line):
            return match[0]
        output += line
    raise AssertionError(f"the server ended without printing an address: {output}")


def new_context(browser: Browser) -> BrowserContext:
    """Return a browser window with an empty cache, which the pages opened in it share."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(WAIT_MS)
    return context


@contextmanager
def visiting(context: BrowserContext, address: str) -> Iterator["Visitor"]:
    """Open the page in the window `context`. Fails on requests to other hosts, errors and dialogs."""
    urls, faults = [], []
    page = context.new_page()
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: BLOCKED.search(message.text) and faults.append(message.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    # Gradio 5.50 requests the progress of an upload once more after it has ended.
    page.on(
        "response", lambda reply: reply.status >= 400 and "upload_progress" not in reply.url and faults.append(reply.url)
    )
    page.goto(address)
    yield Visitor(page)
    page.close()
    assert {urlsplit(url).netloc for url in urls if url.startswith("http")} == {urlsplit(address).netloc}
    assert faults == []


class Visitor:
    def __init__(self, page: Page) -> None:
        self.page = page
        self.status = page.get_by_role("status")

    def choose(self, *files: Path) -> None:
        """Upload these files, replacing those chosen before."""
        clear = self.page.locator("#upload .icon-button-wrapper").get_by_role("button", name="Clear")
        if clear.count():
            clear.click()
            clear.wait_for(state="detached")
        self.page.set_input_files("#upload input[type=file]", [str(file) for file in files])

    def open(self, study_id: str, *files: Path) -> None:
        self.choose(*files)
        # `wait_for` looks twice a second or more often, `expect` once a second after a while.
        self.status.filter(has_text="answered").filter(has_text=study_id).wait_for()

    def fill(self, control: str, value: float | str) -> None:
        self.page.locator(f"#{control} input[type=number]").fill(str(value))

    def show_from(self, threshold: float) -> None:
        self.fill("threshold", threshold)
        self.drawn(f"svg[aria-label*='at least {threshold:.2f}']").wait_for()

    def pick(self, control: str, option: str) -> None:
        self.page.locator(f"#{control} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def drawn(self, selector: str) -> Locator:
        return self.page.locator("#picture").locator(selector)

    @contextmanager
    def redrawn(self, layer: str = "xray") -> Iterator[None]:
        """Wait until the layer shows another image than before."""
        before = self.drawn(f"image.{layer}").get_attribute("href")
        yield
        script = "([image, before]) => ![null, before].includes(document.querySelector(image)?.getAttribute('href') ?? null)"
        self.page.wait_for_function(script, arg=[f"#picture image.{layer}", before])

    def places(self, rectangles: str) -> list[list[float]]:
        """Return xmin, ymin, xmax, ymax of each rectangle in the SVG, sorted."""
        script = "all => all.map(e => ['x', 'y', 'width', 'height'].map(name => +e.getAttribute(name)))"
        x, y, width, height = np.array(self.drawn(rectangles).evaluate_all(script), float).reshape(-1, 4).T
        return sorted(np.stack([x, y, x + width, y + height], 1).tolist())

    def pixels(self) -> np.ndarray:
        """Return the picture without the layers drawn on it, uint8 (h, w)."""
        encoded = self.drawn("image.xray").get_attribute("href").partition(",")[2]
        return cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_GRAYSCALE)

    def download(self, button: str, folder: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click(f"#{button}")
        download.value.save_as(folder / download.value.suggested_filename)
        return folder / download.value.suggested_filename
