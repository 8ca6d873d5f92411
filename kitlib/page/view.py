"""Opens, predicts and draws the study that a visitor of the page sees; independent of the web server."""

import html
import logging
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """A study with a system's predictions, kept by Gradio between requests.

    Gradio compares and prints these objects, so == and repr are Python's fast defaults, which ignore images and tables.
    """

    study: OpenedStudy
    system: System
    answer: Answer

    def image(self, image_id: str | None) -> OpenedImage:
        """Return the image with this image_id, or the first image if the study does not have it."""
        return next((image for image in self.study.images if image.image_id == image_id), self.study.images[0])

    @property
    def most_probable(self) -> str:
        """Name of the study class with the highest probability."""
        return max(STUDY_CLASSES, key=lambda name: self.answer.fused.studies.iloc[0][name])


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
        """Read a DICOM image's grey levels before windowing, so that the page can show it with any window centre and width.

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
        """Return HTML with the image as SVG, and the available layers of `layers` drawn on top of it.

        Boxes are drawn if their score is at least `threshold`. The heat map is for the class `heat_class`. If `windowed` is
        given, grey levels are computed from its values with the window (centre, width) in `window`. The caption says which
        layers could not be drawn, and why.
        """
        system, captions, mask, heat = view.system, [], None, None
        pixels = view.study.read(image, system.longest_side).pixels
        if LUNGS in layers:
            try:
                mask, reason = self.models.lungs(system, view.study, image)
                captions += [reason] if reason else []
            except Exception as error:  # the other layers can still be drawn
                logger.error("the lungs cannot be drawn", exc_info=error)
                captions.append(f"The lungs cannot be shown: {type(error).__name__}: {error}.")
        if HEAT in layers:
            try:
                name, heat = self.models.heat(system, view.study, image, heat_class or view.most_probable)
                note = "" if heat.any() else "; no part of the image is evidence for it"
                captions.append(f"Heat map: Grad-CAM of {name} for {heat_class or view.most_probable}{note}.")
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
        detections, nones = view.answer.fused.detections, view.answer.fused.nones
        has_detections = bool(nones.loc[nones["image_id"] == image.key, "seen"].all())
        if BOXES in layers and not has_detections:
            captions.append("No detector has predicted boxes for this image.")
        return draw_picture(
            pixels,
            image.rows,
            image.columns,
            boxes=detections[detections["image_id"] == image.key] if BOXES in layers and has_detections else None,
            truth=image.truth if TRUTH in layers else None,
            threshold=threshold,
            mask=mask,
            heat=heat,
            caption=" ".join(captions),
        )

    def bars(self, view: View, image: OpenedImage) -> str:
        """Return HTML bars for the study's four class probabilities and the image's probability of `none`."""
        fused = view.answer.fused
        study = fused.studies.iloc[0]
        none = fused.nones.set_index("image_id").loc[image.key]
        is_predicted = not none["prior"]
        return draw_bars(
            {name: float(study[name]) for name in STUDY_CLASSES},
            float(none["none"]) if is_predicted else None,
            bool(study["prior"]),
            view.study.true_class,
        )

    def details(self, view: View, image: OpenedImage) -> str:
        """Return, as HTML, facts and remarks about the image, the study and the predictions."""
        folds = view.answer.models.groupby("model", sort=False)["fold"].agg(
            lambda fold_series: ", ".join(map(str, fold_series))
        )
        facts = {
            "Image": image.image_id,
            "Study": view.study.study_id,
            **({"Annotated class": view.study.true_class} if view.study.true_class else {}),
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
        """Return the text of the status line: the study, its number of images, the number of models and their time."""
        images, models = len(view.study.images), view.answer.models
        several = f" of {images} images" if images > 1 else ""
        return f"Study {view.study.study_id}{several}: {len(models)} models answered in {models.seconds.sum():.2f} s."

    def files(self, view: View) -> tuple[Path, Path]:
        """Write the submission rows and the JSON file to a new folder and return their paths; deletes old folders."""
        answers = self.folder / "answers"
        answers.mkdir(parents=True, exist_ok=True)
        for old_folder in answers.iterdir():
            if time.time() - old_folder.stat().st_mtime > KEEP_S:
                shutil.rmtree(old_folder, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=answers))
        rows_path, json_path = folder / "submission.csv", folder / "answer.json"
        write_rows(rows_path, view.answer, view.study)
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
