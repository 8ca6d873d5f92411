"""A visitor of the page: a real server, a headless browser, and what one does and sees there."""

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
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

# No sandbox: containers often run as root. The rest keeps the browser itself from asking outside.
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
WAIT_MS = 30_000  # machines are shared
BOXES, TRUTH = "rect.opacity", "rect.truth"
# What the browser's console says of a request that the page's own policy has stopped.
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


# Python runs it before the server and each of its decoding processes: it notes whom they ask.
AUDIT = """
import os, sys
def note(event, given):
    if event in ("socket.connect", "socket.sendto"):
        asked = given[1][0] if isinstance(given[1], tuple) else "a file of this computer"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked = given[0]
    else:
        return
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{asked}\\n")
sys.addaudithook(note)
"""
NOBODY_ELSE = {"127.0.0.1", "localhost", "None", "a file of this computer"}


@contextmanager
def serving(runs: Path) -> Iterator[subprocess.Popen]:
    """The page of `runs` in a process of its own, which tells its address on stdout.

    No request may be its last, and neither it nor its decoding processes may look up or call another computer.
    """
    command = [sys.executable, "-m", "kitlib", "page", "--runs", str(runs), "--port", "0"]
    hooks, asked = runs.parent / "hooks", runs.parent / "asked.txt"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(AUDIT)
    asked.touch()
    surroundings = {**os.environ, "PYTHONPATH": str(hooks), "ASKED": str(asked)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings) as server:
        try:
            yield server
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()
    assert set(asked.read_text().split("\n")) - {""} <= NOBODY_ELSE


def address_of(server: subprocess.Popen) -> str:
    told = ""
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
        told += line
    raise AssertionError(f"the server has ended without an address: {told}")


@contextmanager
def visiting(browser: Browser, address: str, **window) -> Iterator["Visitor"]:
    """One more visitor. Their browser asks no one but the server, runs into no error and shows no dialog."""
    asked, faults = [], []
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, **window)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: BLOCKED.search(told.text) and faults.append(told.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    # Gradio 5.50 asks how far an upload is once more when there is none.
    page.on("response", lambda got: got.status >= 400 and "upload_progress" not in got.url and faults.append(got.url))
    page.goto(address)
    yield Visitor(page)
    context.close()
    assert {urlsplit(url).netloc for url in asked if url.startswith("http")} == {urlsplit(address).netloc}
    assert faults == []


class Visitor:
    def __init__(self, page: Page) -> None:
        self.page = page
        self.status = page.get_by_role("status")

    def choose(self, *files: Path) -> None:
        """Upload these in the place of those that were chosen before."""
        clear = self.page.locator("#upload .icon-button-wrapper").get_by_role("button", name="Clear")
        if clear.count():
            clear.click()
            expect(clear).to_have_count(0)
        self.page.set_input_files("#upload input[type=file]", [str(file) for file in files])

    def open(self, study_id: str, *files: Path) -> None:
        self.choose(*files)
        expect(self.status.filter(has_text="answered")).to_contain_text(study_id)

    def fill(self, control: str, value: float | str) -> None:
        self.page.locator(f"#{control} input[type=number]").fill(str(value))

    def show_from(self, threshold: float) -> None:
        self.fill("threshold", threshold)
        expect(self.drawn("svg")).to_have_attribute("aria-label", re.compile(f"at least {threshold:.2f}"))

    def pick(self, control: str, option: str) -> None:
        self.page.locator(f"#{control} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def drawn(self, selector: str) -> Locator:
        return self.page.locator("#picture").locator(selector)

    @contextmanager
    def redrawn(self, layer: str = "xray") -> Iterator[None]:
        """Waits until that layer is another image than before."""
        before = self.drawn(f"image.{layer}").get_attribute("href")
        yield
        expect(self.drawn(f"image.{layer}")).not_to_have_attribute("href", before)

    def places(self, rectangles: str) -> list[list[float]]:
        """xmin, ymin, xmax, ymax of each as the SVG has them, sorted."""
        told = "all => all.map(e => ['x', 'y', 'width', 'height'].map(name => +e.getAttribute(name)))"
        x, y, width, height = np.array(self.drawn(rectangles).evaluate_all(told), float).reshape(-1, 4).T
        return sorted(np.stack([x, y, x + width, y + height], 1).tolist())

    def pixels(self) -> np.ndarray:
        """uint8 (h, w), the picture's own below all that is drawn."""
        encoded = self.drawn("image.xray").get_attribute("href").partition(",")[2]
        return cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_GRAYSCALE)

    def download(self, button: str, folder: Path) -> Path:
        with self.page.expect_download() as found:
            self.page.click(f"#{button}")
        found.value.save_as(folder / found.value.suggested_filename)
        return folder / found.value.suggested_filename
