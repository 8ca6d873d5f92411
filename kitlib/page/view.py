"""Opens, predicts and draws the study that a visitor of the page sees; independent of the web server."""

import html
import logging
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kitlib.classes import STUDY_CLASSES
from kitlib.errors import PageError, UnreadableXray
from kitlib.inference.loaded_models import Answer
from kitlib.inference.systems import System
from kitlib.page.answer_files import write_answer, write_rows
from kitlib.page.gallery import Gallery
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.page.uploads import open_uploads
from kitlib.page.warm_models import WarmModels
from kitlib.page.window_level import Windowed, read_windowed
from kitlib.page.xray_svg import draw_bars, draw_picture

logger = logging.getLogger(__name__)

# An hour after a study was opened, it is closed, and its uploaded and downloadable files are deleted.
KEEP_S = 3600
BOXES, TRUTH, LUNGS, HEAT = "boxes", "annotated boxes", "lungs", "heat"
WINDOWED_SIDE = 1024  # pixels of the longest side while window and level are set


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A study and the predictions of a system (models that predict together), kept by Gradio between requests.

    Gradio compares and prints these objects, so == and repr are Python's fast defaults, which ignore images and tables.
    """

    study: OpenedStudy
    system: System
    answer: Answer

    def image(self, image_id: str | None) -> OpenedImage:
        """Return the image with this image_id, or the first image if the study does not have it."""
        return next((image for image in self.study.images if image.image_id == image_id), self.study.images[0])

    def classes(self, image: OpenedImage) -> dict[str, float]:
        """Return the class probabilities keyed by class, or {} if no model predicts classes.

        The probabilities are for the study or, if the models classify single images, for `image`.
        """
        answer = self.answer
        if answer.fused is not None and self.system.fills_siim:
            study = answer.fused.studies.iloc[0]
            return {name: float(study[name]) for name in STUDY_CLASSES}
        if answer.classes is None:
            return {}
        rows = answer.classes[answer.classes["image_id"] == image.key].drop(columns="image_id")
        return {str(name): float(value) for name, value in rows.iloc[0].items()} if len(rows) else {}

    @property
    def findings(self) -> tuple[str, ...]:
        """The sorted findings that get a colour: those that the models detect, and those annotated in the prepared run."""
        return tuple(sorted({*self.system.findings, *self.study.findings}))

    @property
    def heat_classes(self) -> list[str]:
        """Names of the classes for which a heat map can be drawn."""
        return [*self.classes(self.study.images[0]), *(["none"] if self.answer.fused is not None else [])]

    @property
    def most_probable(self) -> str | None:
        """Name of the most probable class of the study or of its first image; None if there are no classes."""
        classes = self.classes(self.study.images[0])
        return max(classes, key=lambda name: classes[name], default=None)


class Viewer:
    """Opens and predicts studies for all visitors; downloadable files are written to `folder`."""

    def __init__(
        self, systems: Sequence[System], models: WarmModels, copies: DecodedCopies, gallery: Gallery | None, folder: Path
    ) -> None:
        self.systems = {system.name: system for system in systems}
        self.models, self.copies, self.gallery, self.folder = models, copies, gallery, folder
        # The layers that can be drawn over an image.
        self.layers = [BOXES, TRUTH, *([LUNGS] if any(system.lungs for system in systems) else []), HEAT]

    def upload(self, paths: Sequence[str | Path], system_name: str) -> View:
        """Open the files in `paths` as one study and predict it. Raises PageError, with a message for the visitor."""
        system = self._system(system_name)
        return self._answer(open_uploads(paths, self.copies, system.longest_side), system)

    def pick(self, image_id: str, system_name: str) -> View:
        """Open the study that an image of the gallery belongs to, and predict it.

        Raises PageError if there is no gallery, or if the image cannot be opened.
        """
        if self.gallery is None:
            raise PageError("There is no gallery, because the prepared run that these models were trained on was not found.")
        try:
            study = self.gallery.open(image_id)
        except UnreadableXray as error:
            raise PageError(f"This image cannot be opened: {error.reason}.") from error
        return self._answer(study, self._system(system_name))

    def switch(self, view: View, system_name: str) -> View:
        """Return a view of the same study, predicted with the system called `system_name`.

        Raises PageError if the system does not exist, or if an image cannot be decoded.
        """
        return self._answer(view.study, self._system(system_name))

    def window(self, view: View, image: OpenedImage) -> Windowed:
        """Return a DICOM image's values before windowing; `draw` can then apply any window centre and width to them.

        Raises PageError if the file is missing or not a DICOM file.
        """
        try:
            if not image.is_dicom:
                raise PageError(f"{image.image_id} is not a DICOM file, so window and level cannot be set.")
            return read_windowed(image.path, WINDOWED_SIDE)
        except (UnreadableXray, OSError) as error:
            raise PageError(f"The file of {image.image_id} cannot be read any more. Please open it again.") from error

    def draw(
        self,
        view: View,
        image: OpenedImage,
        threshold: float,
        layers: Collection[str] = (BOXES, TRUTH),
        heat_class: str = "",
        windowed: Windowed | None = None,
        window: tuple[float, float] | None = None,
    ) -> str:
        """Return HTML with the image as SVG and, drawn on top of it, those of `layers` that are available.

        Layers are "boxes", "annotated boxes", "lungs" and "heat". Boxes are drawn if their score is at least `threshold`.
        The heat map is for the class `heat_class`. If `windowed` is given, grey levels are computed from its values with the
        window (centre, width) in `window`. The caption says which layers could not be drawn, and why.
        """
        system, captions, mask, heat, structure = view.system, [], None, None, LUNGS
        pixels = view.study.read(image, system.longest_side).pixels
        if maps := view.answer.maps(image.key):
            structure, mask = ", ".join(maps), view.answer.mask(image.key)
        elif LUNGS in layers or "lungs" in system.answers:
            try:
                mask, reason = self.models.lungs(system, view.study, image)
                captions += [reason] if reason else []
            except Exception as error:  # the other layers can still be drawn
                logger.error("the lungs cannot be drawn", exc_info=error)
                captions.append(f"The lungs cannot be shown: {type(error).__name__}: {error}.")
        if HEAT in layers and view.most_probable:
            heat_class = heat_class if heat_class in view.heat_classes else view.most_probable
            try:
                name, heat = self.models.heat(system, view.study, image, heat_class)
                note = "" if heat.any() else "; no part of the image is evidence for it"
                captions.append(f"Heat map: Grad-CAM of {name} for {heat_class}{note}.")
            except (ImportError, ValueError) as error:  # the message says what is missing
                captions.append(f"The heat map cannot be shown: {error}.")
            except Exception as error:
                logger.error("the heat map cannot be drawn", exc_info=error)
                captions.append(f"The heat map cannot be shown: {type(error).__name__}: {error}.")
        if windowed is not None:
            pixels = windowed.render(*(window or windowed.default))
            captions.append("Window and level change only this picture, not the input of the models.")
            if windowed.has_curve:
                captions.append("Without this setting, the picture follows the file's own grey curve (VOI LUT).")
        boxes = _boxes(view.answer, image)
        if BOXES in layers and boxes is None and view.answer.fused is not None:
            captions.append("No detector has predicted boxes for this image.")
        return draw_picture(
            pixels,
            image.rows,
            image.columns,
            boxes=boxes if BOXES in layers else None,
            truth=image.truth if TRUTH in layers else None,
            threshold=threshold,
            mask=mask,
            heat=heat,
            caption=" ".join(captions),
            findings=view.findings,
            structure=structure,
        )

    def bars(self, view: View, image: OpenedImage) -> str:
        """Return HTML with one bar for each class, for `none` (no finding) and for each segmented structure.

        A structure's bar shows its highest probability. A lung segmenter gets a sentence with the lungs' share of the image.
        """
        fused, classes, annotated = view.answer.fused, view.classes(image), view.study.true_classes
        if "lungs" in view.system.answers:
            mask, reason = self.models.lungs(view.system, view.study, image)
            return f"<p>{html.escape(reason) if mask is None else f'{mask.mean():.1%} of the image is lung.'}</p>"
        if maps := view.answer.maps(image.key):
            classes |= {f"{name}, highest": float(each.max()) for name, each in maps.items()}
        if fused is None:
            return draw_bars(classes, true_classes=annotated) if classes else "<p>No model has predicted this image.</p>"
        none = fused.nones.set_index("image_id").loc[image.key]
        is_prior = view.system.fills_siim and bool(fused.studies["prior"].iloc[0])
        return draw_bars(classes, None if none["prior"] else float(none["none"]), is_prior, annotated)

    def details(self, view: View, image: OpenedImage) -> str:
        """Return, as HTML, facts and remarks about the image, the study and the predictions."""
        folds = view.answer.models.groupby("model", sort=False)["fold"].agg(
            lambda fold_series: ", ".join(map(str, fold_series))
        )
        facts = {
            "Image": image.image_id,
            "Study": view.study.study_id,
            **({"Annotated": ", ".join(view.study.true_classes)} if view.study.true_classes else {}),
            "Models (folds)": "; ".join(f"{model} ({fold_names})" for model, fold_names in folds.items()),
            **image.facts,
        }
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(fact))}</td></tr>" for name, fact in facts.items()
        )
        remarks = [*view.answer.remarks, *view.study.remarks, *image.remarks]
        points = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
        return f'<table class="facts">{rows}</table><ul class="remarks">{points}</ul>'

    def summary(self, view: View) -> str:
        """Return the text of the status line: the study, its number of images, and how many models took how long."""
        images, models = len(view.study.images), view.answer.models
        several = f" of {images} images" if images > 1 else ""
        count = "1 model" if len(models) == 1 else f"{len(models)} models"
        return f"Study {view.study.study_id}{several}: {count} answered in {models.seconds.sum():.2f} s."

    def files(self, view: View) -> tuple[Path | None, Path]:
        """Write the table of predictions and the JSON file to a new folder and return their paths; deletes old folders.

        Depending on the models, the table has submission rows, boxes, or each image's class probabilities. If the models
        only segment, there is no table, and its path is None.
        """
        answers = self.folder / "answers"
        answers.mkdir(parents=True, exist_ok=True)
        for old_folder in answers.iterdir():
            if time.time() - old_folder.stat().st_mtime > KEEP_S:
                shutil.rmtree(old_folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=answers))
        rows_path, json_path = write_rows(folder, view.answer, view.study, view.system), folder / "answer.json"
        write_answer(json_path, view.answer, view.study, view.system)
        return rows_path, json_path

    def _system(self, name: str) -> System:
        if name not in self.systems:
            raise PageError(f"There are no models called {name!r}. Available models: {', '.join(self.systems)}.")
        return self.systems[name]

    def _answer(self, study: OpenedStudy, system: System) -> View:
        try:
            return View(study, system, self.models.answer(system, study))
        except UnreadableXray as error:
            raise PageError(f"An image of this study cannot be decoded: {error.reason}.") from error


def _boxes(answer: Answer, image: OpenedImage) -> pd.DataFrame | None:
    """Return the predicted boxes of an image, or None if no detector has predicted it."""
    if answer.fused is None:
        return None
    detections, nones = answer.fused.detections, answer.fused.nones
    is_seen = nones.loc[nones["image_id"] == image.key, "seen"].all()
    return detections[detections["image_id"] == image.key] if is_seen else None
