"""The layout and the event handlers of the page, in Gradio."""

import logging
import threading
from abc import ABCMeta
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta

from kitlib.errors import PageError
from kitlib.leaderboard.listing import list_runs
from kitlib.page.answer_files import NOT_FOR_DIAGNOSIS
from kitlib.page.gallery import Gallery, find_gallery
from kitlib.page.opened_study import DecodedCopies
from kitlib.page.server import serve
from kitlib.page.systems import find_systems
from kitlib.page.uploads import MAX_UPLOAD_BYTES
from kitlib.page.view import BOXES, HEAT, KEEP_S, TRUTH, View, Viewer
from kitlib.page.warm_models import WarmModels
from kitlib.page.window_level import Windowed
from kitlib.paths import project_root
from kitlib.reports.figures import SHOWN_SCORE

logger = logging.getLogger(__name__)

TITLE = "Chest X-rays and the kit's models"
NOTHING = "No study is open. Upload an X-ray or choose one from the gallery."
STYLE = """
footer { display: none !important }
#status { min-height: 1.6em } #status .refused { color: #b00020; font-weight: 600 } .dark #status .refused { color: #ff8a80 }
#gallery .caption-label { inset: auto 0 0 0; max-width: 100%; padding: 0 .3em; font-size: .65rem; border-radius: 0 }
#gallery .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important }
#details table.facts, #details .facts tr { width: 100%; border: 0 }
#details .facts :is(th, td) { border: 0; padding: .1em .8em .1em 0; font-size: .85em; text-align: left; vertical-align: top }
#details .facts th { white-space: nowrap; opacity: .7; font-weight: 400 } #details .facts td { overflow-wrap: anywhere }
#picture .box-table { font-size: .85em } #picture .box-table :is(th, td) { padding: .1em .8em; text-align: left }
#details .remarks { font-size: .85em; margin-top: .5em }
"""


def build_page(viewer: Viewer) -> gr.Blocks:
    """Return the page as Gradio blocks. Predictions run one at a time, and so do heat maps that are not cached."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, KEEP_S), fill_width=True) as blocks:
        gr.Markdown(f"# {TITLE}\n**{NOT_FOR_DIAGNOSIS}**", elem_id="title")
        _Page(viewer).lay_out()
    return blocks


def open_page(runs: Path | None, folder: Path, port: int, host: str, ready: Callable[[str], None]) -> None:
    """Serve a page with the models below `runs` (default: runs/demo) until stopped; call `ready` with the page's address.

    Downloadable files are written to `folder`; `port` and `host` are passed to kitlib.page.server.serve. Raises RunError if
    there are no trained models, PageError if the port is not available, and FileNotFoundError if a folder does not exist.
    """
    listed = list_runs([runs or project_root() / "runs" / "demo"])
    systems, copies, models = find_systems(listed), DecodedCopies(folder / "copies"), WarmModels()
    try:
        gallery = find_gallery(listed, systems[0].models[0].data_fingerprint, copies)

        def begin(address: str) -> None:
            # The models are loaded while the page opens; the first prediction waits until this is done.
            threading.Thread(target=models.load, args=[systems[0]], daemon=True).start()
            ready(address)

        page = build_page(Viewer(systems, models, copies, gallery, folder))
        # Uses fonts of the visitor's computer, because the default theme downloads fonts from Google.
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        serve(page, port, host, begin, theme, STYLE)
    finally:
        copies.close()


class _NoInterfaceFile(ComponentMeta):
    """Creates a component class without the interface file (.pyi) that Gradio would write next to its source."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class LenientSlider(gr.Slider, metaclass=_NoInterfaceFile):
    """A slider that accepts any input while a number is being typed, and uses the nearest valid value.

    Gradio's own slider raises an error for each keystroke that leaves it empty or out of range.
    """

    is_template = True  # the browser uses the code of the parent class, Slider

    def preprocess(self, payload: float | None) -> float:
        lowest = self.minimum
        return super().preprocess(min(max(lowest if payload is None else payload, lowest), self.maximum))


class _Visit:
    """Identifies a visitor's latest request; results of earlier ones are not shown. Gradio makes one object per visitor."""

    turn: object = None


class _Page:
    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer

    def lay_out(self) -> None:
        names = list(self.viewer.systems)
        # A View, or the text of the status line if no study is open: at the start, and after the view has expired.
        self.view = gr.State(_status(NOTHING), time_to_live=KEEP_S)
        self.windowed, self.visit = gr.State(None, time_to_live=KEEP_S), gr.State(_Visit())
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.systems = gr.Radio(
                    names,
                    value=names[0],
                    label="Models",
                    info="A single detector is combined with the fusion's study models. Other runs predict on their own.",
                    elem_id="models",
                )
                with gr.Tabs():
                    with gr.Tab("Your images"):
                        self.upload = gr.File(
                            file_count="multiple",
                            label=f"DICOM, PNG or JPEG files of one study, up to {MAX_UPLOAD_BYTES / 1e6:.0f} MB each",
                            height=150,
                            elem_id="upload",
                        )
                    if self.viewer.gallery is not None:
                        self._lay_out_gallery(self.viewer.gallery)
            with gr.Column(scale=5, min_width=320):
                self.status = gr.HTML(_status(NOTHING), elem_id="status")
                self.picture = gr.HTML(elem_id="picture")
                self.images = gr.Dropdown([], label="Image of the study", visible=False, elem_id="images")
                self.threshold = LenientSlider(
                    *(0, 1, SHOWN_SCORE),
                    step=0.01,
                    label="Show boxes with a score of at least",
                    visible=False,
                    elem_id="threshold",
                )
            with gr.Column(scale=3, min_width=260):
                self.bars = gr.HTML(elem_id="bars")
                self.layers = gr.CheckboxGroup(
                    self.viewer.layers, value=[BOXES, TRUTH], label="Show", visible=False, elem_id="layers"
                )
                self.heat_class = gr.Dropdown([], label="Heat for", visible=False, elem_id="heat-class")
                self.own_window = gr.Checkbox(label="Set window and level", visible=False, elem_id="own-window")
                self.center = LenientSlider(0, 1, 0, label="Level (centre)", visible=False, elem_id="center")
                self.width = LenientSlider(1, 2, 1, label="Window (width)", visible=False, elem_id="width")
                with gr.Row():
                    self.rows = gr.DownloadButton("Submission rows", visible=False, size="sm", elem_id="rows")
                    self.json = gr.DownloadButton("JSON", visible=False, size="sm", elem_id="json")
                self.details = gr.HTML(elem_id="details")
        self._listen()

    def _lay_out_gallery(self, gallery: Gallery) -> None:
        shown, pages = gallery.page(gallery.choices()[0], 1)
        with gr.Tab(f"Gallery: {gallery.name}"):
            self.choice = gr.Dropdown(gallery.choices(), value=gallery.choices()[0], label="Images", elem_id="choice")
            self.page = LenientSlider(1, max(pages, 2), 1, step=1, label="Page", visible=pages > 1, elem_id="page")
            self.thumbnails = gr.Gallery(
                shown, columns=3, allow_preview=False, height="auto", show_label=False, elem_id="gallery", format="jpeg"
            )

    def _listen(self) -> None:
        opened = [
            *(self.view, self.windowed, self.status, self.picture, self.images, self.bars, self.details),
            *(self.threshold, self.layers, self.heat_class, self.own_window, self.center, self.width, self.rows, self.json),
        ]
        drawing_inputs = [
            self.view,
            self.images,
            self.threshold,
            self.layers,
            self.heat_class,
            self.windowed,
            self.center,
            self.width,
        ]
        # "always_last" runs the last click made while an earlier one was being processed. The queue is off because it sends
        # all results of a visitor in one stream, and loses requests that arrive while this stream is being closed.
        quiet: dict[str, Any] = {
            "trigger_mode": "always_last",
            "queue": False,
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        loud = {**quiet, "show_progress": "minimal", "show_progress_on": self.picture}
        answers = [
            # One listener for all three, so that the reply to a cleared upload cannot overtake that of the next one.
            gr.on(
                [self.upload.upload, self.upload.delete, self.upload.clear],
                self._uploaded,
                [self.visit, self.upload, self.systems],
                opened,
                **loud,
            ),
            self.systems.input(self._switch_models, [self.visit, self.view, self.systems], opened, **loud),
        ]
        if (gallery := self.viewer.gallery) is not None:
            answers.append(self.thumbnails.select(self._picked, [self.visit, self.systems], opened, **loud))
            self.choice.input(
                lambda choice: self._first_page(gallery, choice), self.choice, [self.page, self.thumbnails], **quiet
            )
            page_inputs = [self.choice, self.page], self.thumbnails
            self.page.input(lambda choice, page: gallery.page(choice, int(page))[0], *page_inputs, **quiet)
        # The picture is drawn in a separate step, which reads the controls again: they may have changed in the meantime.
        changes = [
            *(
                answer.then(self._switch_models, [self.visit, self.view, self.systems], opened, **quiet)
                for answer in answers
            ),
            self.images.input(self._image, [self.view, self.images], opened, **quiet),
            self.own_window.input(self._window, [self.view, self.images, self.own_window], opened, **quiet),
        ]
        for change in changes:
            change.then(self._show, drawing_inputs, opened, **quiet)
        self.layers.input(lambda layers: gr.update(visible=HEAT in layers), self.layers, self.heat_class, **quiet)
        moves = (self.layers, self.threshold, self.heat_class, self.center, self.width)
        gr.on([control.input for control in moves], self._draw, drawing_inputs, self.picture, **quiet)

    def _handler(self, predict: Callable[..., View], render: Callable[[View], dict]) -> Callable[..., dict]:
        """Return an event handler that calls `predict` and shows its result with `render`, or shows its error."""

        def handler(visit: _Visit, *inputs: Any) -> dict:
            turn = visit.turn = object()
            try:
                updates = render(predict(*inputs))
            except PageError as refused:
                updates = self._close(_status(str(refused), "refused"))
            except Exception as error:  # the page must remain usable for other studies
                logger.error("a study could not be predicted", exc_info=error)
                sentence = f"The study could not be predicted ({type(error).__name__}: {error}). The terminal shows details."
                updates = self._close(_status(sentence, "refused"))
            # The visitor may have opened another study in the meantime.
            return updates if visit.turn is turn else {self.view: gr.skip()}

        return handler

    def _uploaded(self, visit: _Visit, paths: list[str] | None, system: str) -> dict:
        if not paths:
            visit.turn = object()
            return self._close(_status(NOTHING))
        return self._handler(self.viewer.upload, self._open)(visit, paths, system)

    def _picked(self, visit: _Visit, system: str, event: gr.SelectData) -> dict:
        image_id = event.value["caption"].rpartition(", ")[2]
        return self._handler(self.viewer.pick, self._open)(visit, image_id, system)

    def _switch_models(self, visit: _Visit, view: View | str, system: str) -> dict:
        """Return the updates that show the open study as predicted by `system`; no change if it is shown or none is open."""
        if isinstance(view, str) or view.system.name == system:
            return {self.view: gr.skip()}

        def render(switched: View) -> dict:
            # A chosen class stays chosen if the other models predict it, too.
            has_same_classes = switched.heat_classes == view.heat_classes
            return {**self._answer(switched), **({} if has_same_classes else self._heat_classes(switched))}

        return self._handler(self.viewer.switch, render)(visit, view, system)

    def _first_page(self, gallery: Gallery, choice: str) -> tuple[dict, list]:
        shown, pages = gallery.page(choice, 1)
        return gr.update(value=1, maximum=max(pages, 2), visible=pages > 1), shown

    def _open(self, view: View) -> dict:
        names = [image.image_id for image in view.study.images]
        return {
            self.images: gr.update(choices=names, value=names[0], visible=len(names) > 1),
            self.layers: gr.update(visible=True),
            **self._heat_classes(view),
            **self._image(view, names[0]),
            **self._answer(view),
        }

    def _heat_classes(self, view: View) -> dict:
        return {self.heat_class: gr.update(choices=view.heat_classes, value=view.most_probable)}

    def _answer(self, view: View) -> dict:
        rows, json_path = self.viewer.files(view)
        label = "Submission rows" if view.system.fills_siim else "Table"
        return {
            self.view: view,
            self.threshold: gr.update(visible=bool(view.system.detectors)),
            self.rows: gr.update(value=rows, label=label, visible=rows is not None),
            self.json: gr.update(value=json_path, visible=True),
        }

    def _image(self, view: View | str, image_id: str | None) -> dict:
        is_dicom = isinstance(view, View) and view.image(image_id).is_dicom
        return {
            self.windowed: None,
            self.own_window: gr.update(value=False, visible=is_dicom),
            **dict.fromkeys((self.center, self.width), gr.update(visible=False)),
        }

    def _close(self, status: str) -> dict:
        """Return the updates that close the open study and show the text `status`."""
        return {self.view: status, self.windowed: None, **self._hide(status)}

    def _hide(self, status: str) -> dict:
        """Return the updates that show the text `status` and hide everything that belongs to a study.

        The state `view` is not updated, because a later request may have opened a study in the meantime.
        """
        hidden = (self.images, self.threshold, self.layers, self.heat_class, self.own_window, self.center, self.width)
        return {
            self.status: status,
            **dict.fromkeys((self.picture, self.bars, self.details), ""),
            **dict.fromkeys((*hidden, self.rows, self.json), gr.update(visible=False)),
        }

    def _window(self, view: View | str, image_id: str | None, is_custom: bool) -> dict:
        hidden: dict[gr.blocks.Block, Any] = {
            self.windowed: None,
            **dict.fromkeys((self.center, self.width), gr.update(visible=False)),
        }
        if isinstance(view, str) or not is_custom:
            return hidden
        try:
            windowed = self.viewer.window(view, view.image(image_id))
        except PageError as refused:
            return {**hidden, self.windowed: str(refused)}
        (center, width), step = windowed.default, max((windowed.highest - windowed.lowest) / 500, 0.01)
        # The file's window may be outside the range of its values.
        ends = min(windowed.lowest, center), max(windowed.highest, center)
        return {
            self.windowed: windowed,
            self.center: gr.update(minimum=ends[0], maximum=ends[1], value=center, step=step, visible=True),
            self.width: gr.update(maximum=max(2 * windowed.full_range[1], width), value=width, step=step, visible=True),
        }

    def _show(self, view: View | str, image_id: str | None, *drawing_inputs: Any) -> dict:
        if isinstance(view, str):
            return self._hide(view)
        image = view.image(image_id)
        return {
            self.status: _status(self.viewer.summary(view)),
            self.picture: self._draw(view, image_id, *drawing_inputs),
            self.bars: self.viewer.bars(view, image),
            self.details: self.viewer.details(view, image),
            self.heat_class: gr.update(visible=HEAT in drawing_inputs[1] and view.most_probable is not None),
        }

    def _draw(
        self,
        view: View | str,
        image_id: str | None,
        threshold: float,
        layers: list[str],
        heat_class: str,
        windowed: Windowed | str | None,
        center: float,
        width: float,
    ) -> str:
        if isinstance(view, str):
            return f"<p>{view}</p>"
        if isinstance(windowed, str):  # the reason why the window cannot be set
            return f"<p>{escape(windowed)}</p>{self.viewer.draw(view, view.image(image_id), threshold, layers, heat_class)}"
        return self.viewer.draw(view, view.image(image_id), threshold, layers, heat_class, windowed, (center, width))


def _status(sentence: str, kind: str = "") -> str:
    return f'<span class="{kind}" role="status">{escape(sentence)}</span>'
