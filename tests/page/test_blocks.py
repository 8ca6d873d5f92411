"""What the page's controls do: which handlers run, what they show, and what is left after an error.

There is no browser and no model: a `Visitor` calls the handlers as a browser would, and `Shown` answers in words.
"""

import math
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from kitlib.__main__ import app
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_covid19 import Fused
from kitlib.errors import PageError
from kitlib.inference.loaded_models import Answer
from kitlib.page.opened_study import OpenedImage, OpenedStudy
from kitlib.page.server import quiet_gradio
from kitlib.page.view import BOXES, HEAT, KEEP_S, TRUTH, View, Viewer
from kitlib.page.window_level import Windowed
from kitlib.reports.figures import SHOWN_SCORE
from tests.small_page import described_system, sparse_run

IMAGES = (OpenedImage("a", "a", Path("a.dcm"), 10, 20, is_dicom=True), OpenedImage("b", "b", Path("b.png"), 10, 20))
STUDY = OpenedStudy("1.2.3", IMAGES, copies=None)
HIDDEN_AT_FIRST = ["images", "threshold", "layers", "heat-class", "own-window", "center", "width", "rows", "json"]


# Both study systems have the same classes, and "typical" is the most probable; of the classifier's classes it is "y".
KINDS = {"study": "study", "other study": "study", "x and y": "classes", "boxes": "boxes"}
SYSTEMS = [described_system(name, kind) for name, kind in KINDS.items()]
MODELS = pd.DataFrame({"model": ["m"], "fold": [0], "seconds": [0.25]})
STUDIES = pd.DataFrame([(0.1, 0.7, 0.1, 0.1, False)], columns=[*STUDY_CLASSES, "prior"])
FUSED = Answer(MODELS, (), fused=Fused(STUDIES, pd.DataFrame(), pd.DataFrame()))
CLASSIFIED = Answer(MODELS, (), classes=pd.DataFrame({"image_id": ["a", "b"], "x": [0.2, 0.2], "y": [0.8, 0.8]}))


class Shown(Viewer):
    """Opens STUDY whatever is asked for, and describes in a text what it would draw."""

    def __init__(self, gallery=None):
        super().__init__(SYSTEMS, None, None, gallery, Path())
        self.asked = []

    def upload(self, paths, system_name):
        self.asked.append(paths)
        return self.switch(View(STUDY, None, None), system_name)

    def pick(self, image_id, system_name):
        return self.upload(image_id, system_name)

    def switch(self, view, system_name):
        return View(view.study, self.systems[system_name], CLASSIFIED if system_name == "x and y" else FUSED)

    def window(self, view, image):
        return Windowed(np.zeros((2, 2)), False, 100.0, 1100.0, (2000.0, 3000.0), False)

    def draw(self, view, image, threshold, layers, heat_class="", windowed=None, window=None):
        by = f", {window}" if windowed else ""
        return f"{image.image_id} by {view.system.name}: {threshold:g}, {layers}, {heat_class}{by}"

    def bars(self, view, image):
        return f"bars of {image.image_id}"

    def details(self, view, image):
        return f"details of {image.image_id}"

    def files(self, view):
        return (None if view.system.name == "boxes" else Path("rows.csv")), Path("answer.json")


class Pages:
    """A gallery of two images, one on each page, if all are shown, or of one of the class "few"."""

    name = "prepare"

    def __init__(self, *choices):
        self._choices = choices

    def choices(self):
        return list(self._choices)

    def page(self, choice, number):
        return [(np.zeros((4, 4), np.uint8), f"{choice}, image{number}")], {"all": 2, "few": 1}[choice]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The module, whose import loads Gradio."""
    tmp_path_factory.getbasetemp()  # must not lie in the folder that is deleted at the end
    with quiet_gradio():
        import kitlib.page.blocks

        yield kitlib.page.blocks


class Visitor:
    """Does what a browser does: sends the values of the controls to the handlers of an event, and shows what they return."""

    def __init__(self, page):
        self.page, self.parts, self.shown = page, {}, {}
        for part in self.page.blocks.values():
            names = ("value", "visible", "label", "choices", "minimum", "maximum", "step")
            self.shown[part] = {name: getattr(part, name) for name in names if hasattr(part, name)}
            if part.elem_id:
                self.parts[part.elem_id] = part

    def __getitem__(self, name):
        return self.shown[self.parts[name]]

    def visible(self, names):
        return [name for name in names if self[name]["visible"]]

    def do(self, name, *value, event="input", data=None):
        """Set the value of a control, if one is given, and cause an event of it."""
        if value:
            self[name]["value"] = value[0]
        target = (self.parts[name]._id, event)
        handlers = [handler for handler in self.page.fns.values() if target in handler.targets]
        assert handlers, f"{name} ignores {event}"
        for handler in handlers:
            self._run(handler, data)

    def _run(self, handler, data=None):
        inputs = [self.shown[part].get("value") for part in handler.inputs]
        returned = handler.fn(*inputs, *([data] if handler.collects_event_data else []))
        if not isinstance(returned, dict) or "__type__" in returned:
            several = returned if isinstance(returned, tuple) else [returned]
            returned = dict(zip(handler.outputs, several, strict=True))
        assert returned.keys() <= set(handler.outputs)
        for part, update in returned.items():
            is_update = isinstance(update, dict) and update.get("__type__") == "update"
            self.shown[part] |= update if is_update else {"value": update}
        for follower in self.page.fns.values():
            if follower.trigger_after == handler._id:
                self._run(follower)


@pytest.fixture(scope="module")
def shown_page(blocks):
    viewer = Shown()
    return viewer, blocks.build_page(viewer)


@pytest.fixture
def viewer(shown_page):
    viewer, _ = shown_page
    viewer.asked.clear()
    return viewer


@pytest.fixture
def visitor(shown_page, viewer):
    return Visitor(shown_page[1])


@pytest.fixture
def opened(visitor):
    visitor.do("upload", ["a.dcm", "b.png"], event="upload")
    return visitor


def test_at_first_no_study_is_open_and_its_controls_are_hidden(blocks, visitor):
    assert "No study is open." in visitor["status"]["value"] and "refused" not in visitor["status"]["value"]
    assert "Not for diagnosis" in visitor["title"]["value"] and visitor.page.title == blocks.TITLE
    assert visitor.visible(visitor.parts) == [name for name in visitor.parts if name not in HIDDEN_AT_FIRST]
    assert [label for _, label in visitor["models"]["choices"]] == [each.name for each in SYSTEMS]
    assert visitor["models"]["value"] == "study"
    assert visitor["threshold"].items() >= {"minimum": 0, "maximum": 1, "value": SHOWN_SCORE}.items()
    assert visitor["layers"]["value"] == [BOXES, TRUTH]
    assert [label for _, label in visitor["layers"]["choices"]] == [BOXES, TRUTH, HEAT]  # no model finds lungs
    assert "choice" not in visitor.parts  # without a gallery
    labelled = ["models", "images", "threshold", "layers", "heat-class", "own-window", "center", "width"]
    assert all(visitor[name]["label"] for name in labelled)
    assert visitor.parts["upload"].file_count == "multiple" and "up to 100 MB" in visitor["upload"]["label"]


def test_no_event_waits_in_a_queue_is_lost_or_is_public(visitor):
    handlers = visitor.page.fns.values()
    assert {(each.queue, each.trigger_mode, each.api_visibility) for each in handlers} == {(False, "always_last", "private")}


def test_uploads_and_studies_are_forgotten_and_no_visit_is_reported(visitor):
    assert visitor.page.delete_cache[1] == KEEP_S and not visitor.page.analytics_enabled
    states = [part for part in visitor.page.blocks.values() if part.get_block_name() == "state"]
    # The open study and its window; the third state has no data.
    assert sorted(state.time_to_live for state in states) == [KEEP_S, KEEP_S, math.inf]


def test_an_upload_opens_the_study_and_shows_its_first_image(viewer, opened):
    assert viewer.asked == [["a.dcm", "b.png"]]
    assert "Study 1.2.3 of 2 images: 1 model answered in 0.25 s." in opened["status"]["value"]
    assert opened["picture"]["value"] == f"a by study: {SHOWN_SCORE:g}, ['boxes', 'annotated boxes'], typical"
    assert (opened["bars"]["value"], opened["details"]["value"]) == ("bars of a", "details of a")
    # The study's models predict no boxes, so there is no threshold; `a` is a DICOM file.
    assert opened.visible(HIDDEN_AT_FIRST) == ["images", "layers", "own-window", "rows", "json"]
    assert (opened["images"]["choices"], opened["images"]["value"]) == (["a", "b"], "a")
    assert opened["rows"].items() >= {"value": Path("rows.csv"), "label": "Submission rows"}.items()
    assert opened["json"]["value"] == Path("answer.json")
    assert opened["heat-class"].items() >= {"choices": [*STUDY_CLASSES, "none"], "value": "typical"}.items()
    opened.do("images", "b")
    assert opened["bars"]["value"] == "bars of b" and opened["picture"]["value"].startswith("b by study")
    assert not opened["own-window"]["visible"]


def test_a_study_of_one_image_needs_no_choice_of_images(viewer, visitor, monkeypatch):
    monkeypatch.setattr(f"{__name__}.STUDY", replace(STUDY, images=IMAGES[1:]))
    visitor.do("upload", ["b.png"], event="upload")
    assert visitor.visible(HIDDEN_AT_FIRST) == ["layers", "rows", "json"]
    assert visitor["picture"]["value"].startswith("b by study")


def test_controls_of_the_picture_draw_it_anew(opened):
    opened.do("threshold", 0.5)
    opened.do("layers", [HEAT])
    assert opened["picture"]["value"] == "a by study: 0.5, ['heat'], typical" and opened["heat-class"]["visible"]
    opened.do("heat-class", "none")
    assert opened["picture"]["value"] == "a by study: 0.5, ['heat'], none"
    opened.do("images", "b")  # the heat map's class stays visible
    assert opened["heat-class"]["visible"]
    opened.do("layers", [BOXES])
    assert not opened["heat-class"]["visible"]


def test_other_models_answer_and_a_chosen_class_stays_if_they_have_it(viewer, opened):
    opened.do("layers", [HEAT])
    opened.do("images", "b")
    opened.do("heat-class", "none")
    opened.do("models", "other study")
    assert opened["picture"]["value"] == f"b by other study: {SHOWN_SCORE:g}, ['heat'], none"
    opened.do("models", "x and y")
    assert opened["picture"]["value"] == f"b by x and y: {SHOWN_SCORE:g}, ['heat'], y"
    assert opened["heat-class"]["choices"] == ["x", "y"] and opened["rows"]["label"] == "Table"
    opened.do("models", "boxes")
    assert opened["threshold"]["visible"] and not opened["rows"]["visible"] and opened["json"]["visible"]


def test_models_are_chosen_before_a_study_is_open_and_while_it_is_predicted(viewer, visitor, monkeypatch):
    visitor.do("models", "x and y")
    assert "No study is open." in visitor["status"]["value"] and visitor.visible(HIDDEN_AT_FIRST) == []
    upload = viewer.upload

    def slow(paths, system_name):
        visitor["models"]["value"] = "other study"
        return upload(paths, system_name)

    monkeypatch.setattr(viewer, "upload", slow)
    visitor.do("upload", ["a.dcm"], event="upload")
    assert visitor["picture"]["value"].startswith("a by other study")


def test_heat_maps_of_models_without_classes_have_no_class_to_choose(opened, monkeypatch):
    opened.do("layers", [HEAT])
    monkeypatch.setattr(View, "most_probable", None)
    opened.do("models", "boxes")
    assert not opened["heat-class"]["visible"]


@pytest.mark.parametrize(
    ("error", "told"),
    [(PageError("<b> is no X-ray."), "&lt;b&gt; is no X-ray."), (OSError("disk"), "could not be predicted (OSError: disk)")],
)
def test_an_error_closes_the_study_and_says_why_and_the_next_one_opens(viewer, opened, monkeypatch, error, told):
    def fails(*_):
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(viewer, "upload", fails)
        opened.do("upload", ["x"], event="upload")
    assert told in opened["status"]["value"] and 'class="refused"' in opened["status"]["value"]
    assert opened.visible(HIDDEN_AT_FIRST) == []
    assert [opened[name]["value"] for name in ("picture", "bars", "details")] == [""] * 3
    opened.do("upload", ["a.dcm"], event="upload")
    assert "Study 1.2.3" in opened["status"]["value"] and "refused" not in opened["status"]["value"]


@pytest.mark.parametrize("event", ["delete", "clear"])
def test_without_files_the_study_is_closed(viewer, opened, event):
    opened.do("upload", None, event=event)
    assert "No study is open." in opened["status"]["value"] and opened.visible(HIDDEN_AT_FIRST) == []
    assert len(viewer.asked) == 1
    opened.do("threshold", 0.5)  # a control whose event was sent before it was hidden
    assert "No study is open." in opened["picture"]["value"]
    opened.do("images", "b")
    opened.do("own-window", True)
    assert opened.visible(HIDDEN_AT_FIRST) == []


@pytest.mark.parametrize("then", [["b.png"], None])
def test_the_result_of_an_earlier_request_is_not_shown(viewer, visitor, monkeypatch, then):
    """While the first study is predicted, the visitor chooses others or none."""
    upload = viewer.upload

    def slow(paths, system_name):
        if paths == ["a.dcm"]:
            visitor.do("upload", then, event="upload" if then else "clear")
            return upload(paths, "x and y")
        return upload(paths, system_name)

    monkeypatch.setattr(viewer, "upload", slow)
    visitor.do("upload", ["a.dcm"], event="upload")
    expected = "Study 1.2.3" if then else "No study is open."
    assert expected in visitor["status"]["value"] and "x and y" not in visitor["picture"]["value"]


def test_window_and_level_can_be_set_and_reset(opened):
    opened.do("own-window", True)
    # The values are 100 to 1100, and the file's own window is outside of them.
    assert opened["center"].items() >= {"visible": True, "minimum": 100, "maximum": 2000, "value": 2000}.items()
    assert opened["width"].items() >= {"visible": True, "minimum": 1, "maximum": 3000, "value": 3000}.items()
    assert opened["picture"]["value"].endswith("typical, (2000.0, 3000.0)")
    opened.do("center", 500)
    opened.do("width", 10)
    assert opened["picture"]["value"].endswith("typical, (500, 10)")
    opened.do("own-window", False)
    assert opened.visible(["center", "width"]) == [] and opened["picture"]["value"].endswith("typical")


def test_another_image_has_no_window_until_one_is_set(opened):
    opened.do("own-window", True)
    opened.do("images", "a")
    assert opened.visible(["center", "width"]) == [] and not opened["own-window"]["value"]
    assert opened["own-window"]["visible"] and opened["picture"]["value"].endswith("typical")


def test_window_and_level_of_a_narrow_range_can_be_set(viewer, opened, monkeypatch):
    narrow = Windowed(np.zeros((2, 2)), False, 0.0, 1.0, (-5.0, 2.0), False)
    monkeypatch.setattr(viewer, "window", lambda view, image: narrow)
    opened.do("own-window", True)
    assert opened["center"].items() >= {"minimum": -5, "maximum": 1, "value": -5}.items()
    assert opened["width"]["value"] == 2 <= opened["width"]["maximum"]
    assert all(0 < opened[name]["step"] < 0.1 for name in ("center", "width"))


def test_a_window_that_cannot_be_read_leaves_the_picture(viewer, opened, monkeypatch):
    def fails(*_):
        raise PageError("<gone>")

    monkeypatch.setattr(viewer, "window", fails)
    opened.do("own-window", True)
    assert opened["picture"]["value"].startswith("<p>&lt;gone&gt;</p>a by study") and not opened["center"]["visible"]


def test_the_gallery_turns_its_pages(blocks):
    gallery = Visitor(blocks.build_page(Shown(Pages("all", "few"))))

    def captions():
        return [caption for _, caption in gallery["gallery"]["value"]]

    names = {part.label for part in gallery.page.blocks.values() if part.get_block_name() == "tabitem"}
    assert names == {"Your images", "Gallery: prepare"}
    assert ([label for _, label in gallery["choice"]["choices"]], gallery["choice"]["value"]) == (["all", "few"], "all")
    assert gallery["page"].items() >= {"minimum": 1, "maximum": 2, "value": 1, "step": 1, "visible": True}.items()
    assert [image["caption"] for image in gallery["gallery"]["value"]] == ["all, image1"]
    gallery.do("page", 2.0)
    assert captions() == ["all, image2"]
    gallery.do("choice", "few")
    assert captions() == ["few, image1"] and gallery["page"].items() >= {"value": 1, "visible": False}.items()
    gallery.do("choice", "all")
    assert gallery["page"].items() >= {"maximum": 2, "value": 1, "visible": True}.items()


def test_a_click_opens_an_image_of_a_gallery_of_one_page(blocks):
    viewer = Shown(Pages("few"))
    visitor = Visitor(blocks.build_page(viewer))
    assert not visitor["page"]["visible"]
    assert not visitor.parts["gallery"].allow_preview  # with which a click would only enlarge the thumbnail
    clicked = SimpleNamespace(value={"caption": "typical, 1 box, image001"})
    visitor.do("gallery", event="select", data=clicked)
    assert viewer.asked == ["image001"] and "Study 1.2.3" in visitor["status"]["value"]


def test_a_slider_takes_the_nearest_valid_number(blocks):
    slider = blocks.LenientSlider(1, 5, 2)
    assert [slider.preprocess(typed) for typed in (None, -3, 1, 4.5, 5, 60)] == [1, 1, 1, 4.5, 5, 5]
    assert slider.get_block_name() == "slider"  # the browser has no code for another name
    assert not Path(blocks.__file__).with_suffix(".pyi").exists()


@pytest.fixture
def closed(blocks, monkeypatch):
    """Without decoding processes: whether they have been closed."""
    closed = []
    copies = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(blocks, "DecodedCopies", lambda folder: copies)
    return closed


def test_the_page_loads_its_first_models_while_it_opens(blocks, closed, tmp_path, monkeypatch):
    served, loaded, told, done = [], [], [], threading.Event()

    def load(system):
        loaded.append((system.name, threading.current_thread().daemon))
        done.set()

    monkeypatch.setattr(blocks, "WarmModels", lambda: SimpleNamespace(load=load))
    monkeypatch.setattr(blocks, "serve", lambda *given: served.append(given))
    sparse_run(tmp_path / "runs" / "caps")
    blocks.open_page(tmp_path / "runs", tmp_path, 123, "localhost", told.append)
    ((page, port, host, begin, _, style),) = served
    assert (page.title, port, host, style) == (blocks.TITLE, 123, "localhost", blocks.STYLE) and closed == [True]
    begin("http://here")
    assert done.wait(30) and told == ["http://here"] and loaded == [("caps", True)]


def test_the_page_shows_the_demos_models_unless_others_are_named(blocks, closed, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "project_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/demo"):
        blocks.open_page(None, tmp_path, 0, "localhost", print)


@pytest.mark.parametrize(("made", "says"), [(False, "does not exist"), (True, "no trained study model or detector")])
def test_the_command_says_what_is_missing(tmp_path, made, says):
    if made:
        (tmp_path / "runs").mkdir()
    result = CliRunner().invoke(app, ["page", "--runs", str(tmp_path / "runs")])
    assert result.exit_code and says in " ".join(result.output.replace("│", " ").split())
