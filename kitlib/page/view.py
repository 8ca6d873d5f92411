"""What one visitor of the page looks at, and how it is drawn: the page without its web server."""

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
from kitlib.page.answer_files import write_answer, write_rows
from kitlib.page.gallery import Gallery
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.page.systems import System
from kitlib.page.uploads import open_uploads
from kitlib.page.warm_models import Answer, WarmModels
from kitlib.page.window_level import Windowed, read_windowed
from kitlib.page.xray_svg import bars, picture

logger = logging.getLogger(__name__)

# An hour after a visitor opened it a study is forgotten, and what was uploaded and written for it is deleted.
KEPT_S = 3600
BOXES, TRUTH, LUNGS, HEAT = "boxes", "annotated boxes", "lungs", "heat"
WINDOWED_SIDE = 1024  # pixels of the picture that window and level are set on


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """A study with a system's answer. Opaque to comparing and printing, which Gradio does with what it keeps."""

    study: OpenedStudy
    system: System
    answer: Answer

    def image(self, image_id: str | None) -> OpenedImage:
        """The image of that name; the first where there is none."""
        return next((image for image in self.study.images if image.image_id == image_id), self.study.images[0])

    @property
    def likeliest(self) -> str:
        """The study class with the highest probability."""
        return max(STUDY_CLASSES, key=lambda name: self.answer.fused.studies.iloc[0][name])


class Viewer:
    """Opens studies and has them answered, for all visitors; `folder` takes the files to take away."""

    def __init__(
        self, systems: Sequence[System], models: WarmModels, copies: DecodedCopies, gallery: Gallery | None, folder: Path
    ) -> None:
        self.systems = {system.name: system for system in systems}
        self.models, self.copies, self.gallery, self.folder = models, copies, gallery, folder
        # What there may be to draw over an image.
        self.layers = [BOXES, TRUTH, *([LUNGS] if any(system.lungs for system in systems) else []), HEAT]

    def upload(self, paths: Sequence[str | Path], system_name: str) -> View:
        """Several files are one study. Raises PageError with a sentence."""
        system = self._system(system_name)
        return self._answered(open_uploads(paths, self.copies, system.longest_side), system)

    def pick(self, image_id: str, system_name: str) -> View:
        """The study of an image of the gallery. Raises PageError."""
        if self.gallery is None:
            raise PageError("There is no gallery: these models' prepared run is not here.")
        try:
            study = self.gallery.open(image_id)
        except UnreadableXray as error:
            raise PageError(f"This image cannot be opened: {error.reason}.") from error
        return self._answered(study, self._system(system_name))

    def switch(self, view: View, system_name: str) -> View:
        """The same study, answered by another system. Raises PageError."""
        return self._answered(view.study, self._system(system_name))

    def window(self, view: View, image: OpenedImage) -> Windowed:
        """Raises PageError where the file is gone or no DICOM file."""
        try:
            if not image.is_dicom:
                raise PageError(f"{image.image_id} is no DICOM file: it has no values to set a window on.")
            return read_windowed(image.path, WINDOWED_SIDE)
        except (UnreadableXray, OSError) as error:
            raise PageError(f"The file of {image.image_id} cannot be read again: open it once more.") from error

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
        """The image as an SVG element with what is asked for of `layers` and is there; `windowed` at `window` as its pixels.

        The captions say what could not be drawn, and why.
        """
        system, captions, mask, heat = view.system, [], None, None
        pixels = view.study.read(image, system.longest_side).pixels
        if LUNGS in layers:
            try:
                mask, why = self.models.lungs(system, view.study, image)
                captions += [why] if why else []
            except Exception as error:  # the rest can be drawn
                logger.error("no lungs", exc_info=error)
                captions.append(f"No lungs: {type(error).__name__}: {error}.")
        if HEAT in layers:
            try:
                name, heat = self.models.heat(system, view.study, image, heat_class or view.likeliest)
                cold = "" if heat.any() else ": nothing speaks for it"
                captions.append(f"Heat: Grad-CAM of {name} for {heat_class or view.likeliest}{cold}.")
            except (ImportError, ValueError) as error:  # which say what is missing
                captions.append(f"No heat: {error}.")
            except Exception as error:
                logger.error("no heat", exc_info=error)
                captions.append(f"No heat: {type(error).__name__}: {error}.")
        if windowed is not None:
            pixels = windowed.shown(*(window or windowed.default))
            captions.append("The window is for your eyes alone: the models see the image as it was before.")
            if windowed.has_curve:
                captions.append("Before, the file's own curve (VOI LUT) was applied, which no window equals.")
        found, nones = view.answer.fused.detections, view.answer.fused.nones
        seen = bool(nones.loc[nones["image_id"] == image.key, "seen"].all())
        if BOXES in layers and not seen:
            captions.append("No detector answers for this image.")
        return picture(
            pixels,
            image.rows,
            image.columns,
            boxes=found[found["image_id"] == image.key] if BOXES in layers and seen else None,
            truth=image.truth if TRUTH in layers else None,
            threshold=threshold,
            mask=mask,
            heat=heat,
            caption=" ".join(captions),
        )

    def bars(self, view: View, image: OpenedImage) -> str:
        """The study's four probabilities and the image's `none`."""
        fused = view.answer.fused
        study = fused.studies.iloc[0]
        none = fused.nones.set_index("image_id").loc[image.key]
        known = not none["prior"]
        return bars(
            {name: float(study[name]) for name in STUDY_CLASSES},
            float(none["none"]) if known else None,
            bool(study["prior"]),
            view.study.true_class,
        )

    def told(self, view: View, image: OpenedImage) -> str:
        """What there is to say of image, study and answer, as HTML."""
        folds = view.answer.models.groupby("model", sort=False)["fold"].agg(lambda each: ", ".join(map(str, each)))
        facts = {
            "Image": image.image_id,
            "Study": view.study.study_id,
            **({"Annotated class": view.study.true_class} if view.study.true_class else {}),
            "Models (folds)": "; ".join(f"{model} ({of_it})" for model, of_it in folds.items()),
            **image.facts,
        }
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(fact))}</td></tr>" for name, fact in facts.items()
        )
        remarks = [*view.answer.remarks, *view.study.remarks, *image.remarks]
        points = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
        return f'<table class="facts">{rows}</table><ul class="remarks">{points}</ul>'

    def summary(self, view: View) -> str:
        """One sentence for the status line."""
        images, models = len(view.study.images), view.answer.models
        several = f" of {images} images" if images > 1 else ""
        return f"Study {view.study.study_id}{several}: {len(models)} models answered in {models.seconds.sum():.2f} s."

    def files(self, view: View) -> tuple[Path, Path]:
        """The submission's rows and the JSON file, in a new folder; those of an hour ago are deleted."""
        answers = self.folder / "answers"
        answers.mkdir(parents=True, exist_ok=True)
        for old in answers.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_S:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=answers))
        rows, told = folder / "submission.csv", folder / "answer.json"
        write_rows(rows, view.answer, view.study)
        write_answer(told, view.answer, view.study, view.system)
        return rows, told

    def _system(self, name: str) -> System:
        if name not in self.systems:
            raise PageError(f"There are no models called {name!r}; there are: {', '.join(self.systems)}.")
        return self.systems[name]

    def _answered(self, study: OpenedStudy, system: System) -> View:
        try:
            return View(study, system, self.models.answer(system, study))
        except UnreadableXray as error:
            raise PageError(f"An image of this study cannot be decoded: {error.reason}.") from error
