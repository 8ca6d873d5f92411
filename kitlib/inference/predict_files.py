"""Predicts image files with the models of a run, and returns a table with one row per file."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from pebble import ProcessPool
from tqdm import tqdm

from kitlib.atomic import replacing
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import RunError
from kitlib.inference.listed_files import list_files
from kitlib.inference.loaded_models import BATCH_SIZE, CACHED_LUNGS, LoadedModels
from kitlib.inference.read_ahead import ahead
from kitlib.inference.segment_lungs import LungSegmenter, load_segmenter
from kitlib.inference.systems import FUSED, System, find_system
from kitlib.lungs.clean_up import FOUND, clean_up_mask, decode_maps
from kitlib.tables import BOX, storable
from kitlib.xrays.cache import CachedXray, XrayCache, decoding_pool, usable_cores
from kitlib.xrays.drawn_boxes import draw_boxes
from kitlib.xrays.worker import Outcome

logger = logging.getLogger(__name__)

_Outputs = tuple[pd.DataFrame, tuple[str, ...]]  # table of outputs, indexed by image_id, and texts of faults
KEYS = ("file", "image_id", "study_id")
BOXES, VERDICT, AREA, WARNING, ERROR = "boxes", "lungs", "lung_area", "warning", "error"
PART = CACHED_LUNGS  # number of images that are decoded and predicted together, then removed from memory
FILE_TIMEOUT_S = 20.0  # SubmitSettings.file_timeout_s
DRAWN_SCORE = 0.2  # boxes with a lower score are not drawn, because they would cover the picture
PICTURE_SIDE = 1024  # pixels; smaller copies are enlarged, so that scores can be read


@dataclass(frozen=True)
class _Part:
    """A group of decoded files. All files of a study are in the same group.

    `files` has rows of the table that `list_files` returns. `outcomes` has the Outcome of decoding each existing file, keyed
    by image_id. `cache` has the decoded copies.
    """

    files: pd.DataFrame
    outcomes: dict[str, Outcome]
    cache: XrayCache

    @property
    def readable(self) -> pd.DataFrame:
        """Table of the images that could be decoded: image_id, study_id, rows and columns (original size in pixels)."""
        decoded = {name: outcome for name, outcome in self.outcomes.items() if outcome.status != "failed"}
        images = self.files.loc[self.files["image_id"].isin(decoded), ["image_id", "study_id"]].reset_index(drop=True)
        for side in ("rows", "columns"):
            images[side] = np.array([getattr(decoded[name], side) for name in images["image_id"]], dtype=int)
        return images

    def read(self) -> Iterator[CachedXray]:
        """Yield the decoded copies of the images in `readable`."""
        return map(self.cache.read, self.readable["image_id"])


def predict(
    files: str | Path | Iterable[str | Path],
    runs: str | Path,
    *,
    pictures: str | Path | None = None,
    file_column: str = "file",
    study_column: str = "study_id",
    workers: int = 0,
) -> pd.DataFrame:
    """Predict the images in files with the models of a run; return a table with one row per file.

    `files` is one path or several paths. Each path is an image file, a folder of image files, or a table with the columns
    `file_column` and optionally `study_column` (see `list_files`). `runs` is a run, or a folder of runs (see `find_system`).
    For the columns of the result, `pictures` and `workers` see `predict_parts`. If a file cannot be read, the column `error`
    says why. Raises RunNotFound if `runs` does not exist, RunError if no run can predict, and DatasetError if there is no
    image file.
    """
    system = find_system(runs)
    listed = list_files(files, file_column, study_column)
    return pd.concat(list(predict_parts(listed, system, pictures, workers)), ignore_index=True)


def predict_parts(
    files: pd.DataFrame, system: System, pictures: str | Path | None = None, workers: int = 0, progress: bool = False
) -> Generator[pd.DataFrame, None, None]:
    """Predict `files`, a table from `list_files`, in groups, and yield one table of predictions per group.

    The groups keep the memory use independent of the number of files. For the columns of the tables see `table_columns`.
    Probabilities are 0..1. `boxes` is JSON text: a list of dictionaries, the highest score first, with the keys `finding`,
    `score`, and in pixels of the original image `xmin`, `ymin`, `xmax` and `ymax`. If no detector has predicted an image,
    `boxes` is "". Other values without a prediction are NaN or empty. If the system is a lung segmenter, `lungs` says if
    usable lungs were found, and `lung_area` is the share of the image that is lung. `warning` says what is unusual about the
    file, and which models failed; `error` says why there is no prediction.

    If `pictures` is a folder, each image is saved there as IMAGE_ID.png with its predicted boxes of score 0.2 or more. For a
    lung segmenter, the lungs are outlined instead. The picture has the size of the image's decoded copy or is larger.
    A segmenter's mask is written to masks/IMAGE_ID.png, in the size of the original image, with the value 255 inside the
    lungs or another structure (see Answer.mask). `workers` is the number of decoding processes; 0: one per core. Raises
    BundleError if a lung segmenter is damaged, and CacheError or OSError if files cannot be written.
    """
    columns = table_columns(system)
    is_segmenter = "lungs" in system.answers
    predict_part = (_Segmenting if is_segmenter else _Predicting)(system, pictures)
    workers = workers or usable_cores()
    for sentence in system.notes:
        logger.warning(sentence)
    if pictures is not None:
        Path(pictures).mkdir(parents=True, exist_ok=True)
    pool = decoding_pool(workers)
    with (
        tempfile.TemporaryDirectory(prefix="kit-predict-", ignore_cleanup_errors=True) as scratch,
        tqdm(total=len(files), desc="predicting", unit="image", disable=not progress) as bar,
    ):
        try:
            with closing(ahead(_decode(files, Path(scratch), system.longest_side, workers, pool), most=1)) as parts:
                for part in parts:
                    table = _finished(part, *_outputs(predict_part, part), columns)
                    if pictures is not None and not is_segmenter:
                        _write_pictures(part, table, Path(pictures), system.findings)
                    shutil.rmtree(part.cache.folder.parent, ignore_errors=True)
                    bar.update(len(table))
                    yield table
        finally:
            pool.stop()
            pool.join()


def table_columns(system: System) -> list[str]:
    """Return the column names of a table of predictions: file, image_id, study_id, the system's outputs, warning and error.

    The outputs of a lung segmenter are `lungs`, `lung_area` and `boxes`. Other systems have those of the following outputs
    that their models or fusion predict: the study classes, `none`, the classes of classifiers, the structures of segmenters
    (the highest probability in the image), and `boxes`. Raises RunError if a class has the same name as another column.
    """
    answers = system.answers
    if "lungs" in answers:
        outputs = [VERDICT, AREA, BOXES]
    else:
        outputs, classes = list(STUDY_CLASSES) if "study" in answers else [], [*system.classes(), *system.classes("masks")]
        # Fusion computes `none` from boxes or classes if no model predicts it.
        outputs += ["none"] if answers & FUSED else []
        if taken := sorted({*KEYS, *outputs, BOXES, WARNING, ERROR} & set(classes)):
            raise RunError(
                f"{system.name}: the class {taken[0]!r} has the name of another column of the result; rename the class"
            )
        outputs += [*classes, *([BOXES] if "boxes" in answers else [])]
    return [*KEYS, *outputs, WARNING, ERROR]


class _Predicting:
    """Callable that predicts a _Part with the models of a system that is not a lung segmenter.

    Returns a table of outputs, indexed by image_id, and the faults (see Answer).
    """

    def __init__(self, system: System, pictures: str | Path | None) -> None:
        self.system, self.pictures, self.models = system, pictures, LoadedModels()
        self._logged = set(system.notes)

    def __call__(self, part: _Part) -> tuple[pd.DataFrame, tuple[str, ...]]:
        images = part.readable
        answer = self.models.answer(self.system, self.system.models, part.read, images)
        self._log(answer.remarks)
        classes = pd.DataFrame() if answer.classes is None else answer.classes.set_index("image_id")
        if answer.masks is not None:
            maps = {name: answer.maps(name) for name in images["image_id"]}
            rows = {name: {of: float(each.max()) for of, each in of_image.items()} for name, of_image in maps.items()}
            classes = pd.DataFrame.from_dict(rows, orient="index").join(classes)
            if self.pictures is not None:
                for xray in part.read():
                    if (mask := answer.mask(xray.image_id)) is not None:
                        _write_mask(self.pictures, xray, mask)
        if answer.fused is None:
            return classes, (*self.system.notes, *answer.faults)
        studies = answer.fused.studies.set_index("study_id")
        studies = studies.loc[~studies["prior"], list(STUDY_CLASSES)]
        nones = answer.fused.nones.set_index("image_id")
        table = studies.reindex(images["study_id"]).set_axis(images["image_id"])
        table["none"] = nones["none"].where(~nones["prior"])
        boxes = _boxes_as_json(answer.fused.detections)
        seen = nones.index[nones["seen"]]
        table[BOXES] = pd.Series({name: boxes.get(name, "[]") for name in seen}, dtype=object).reindex(table.index)
        return table.join(classes), (*self.system.notes, *answer.faults)

    def _log(self, remarks: tuple[str, ...]) -> None:
        for remark in remarks:
            if remark not in self._logged:
                logger.warning(remark)
        self._logged.update(remarks)


class _Segmenting:
    """Callable that predicts a _Part with a lung segmenter, and writes masks and outlined images to the folder `pictures`.

    If `pictures` is None, nothing is written. Returns a table of outputs, indexed by image_id, and no faults.
    """

    def __init__(self, system: System, pictures: str | Path | None) -> None:
        self.system, self.pictures = system, pictures
        self.segmenter: LungSegmenter = load_segmenter(system.models[0].folder, batch_size=BATCH_SIZE)

    def __call__(self, part: _Part) -> tuple[pd.DataFrame, tuple[str, ...]]:
        recipe, rows = self.segmenter.recipe, {}
        for xray, maps, place in self.segmenter.maps(part.read()):
            cleaned = clean_up_mask(xray, decode_maps(maps, place, xray.pixels.shape, recipe), recipe)
            frame = [{"finding": "lungs", **dict(zip(BOX, cleaned.frame.round(2).tolist(), strict=True))}]
            boxes = json.dumps(frame if cleaned.verdict == FOUND else [])
            rows[xray.image_id] = cleaned.verdict, float(cleaned.mask.mean()), boxes
            if self.pictures is not None:
                _write_mask(self.pictures, xray, cleaned.mask)
                edges = cv2.morphologyEx(cleaned.mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
                outlined = draw_boxes(xray.pixels, [])
                outlined[edges] = (255, 165, 0)
                _write_picture(Path(self.pictures) / f"{xray.image_id}.png", outlined)
        table = pd.DataFrame.from_dict(rows, orient="index", columns=[VERDICT, AREA, BOXES])
        return table, ()


def _decode(files: pd.DataFrame, scratch: Path, longest_side: int, workers: int, pool: ProcessPool) -> Iterator[_Part]:
    """Decode `files` in groups of at least 256 files (PART), and yield each group as a _Part with its own cache folder.

    The last group may be smaller. The files of a study are always in the same group. `pool` has `workers` processes.
    """
    starts = files["study_id"].ne(files["study_id"].shift()).to_numpy()
    bounds = [0]
    for place in np.flatnonzero(starts):
        if place - bounds[-1] >= PART:
            bounds.append(int(place))
    for number, (first, last) in enumerate(zip(bounds, [*bounds[1:], len(files)], strict=True)):
        rows = files.iloc[first:last]
        cache = XrayCache(scratch / str(number), longest_side)
        outcomes = cache.decode(rows[rows["error"] == ""], workers, FILE_TIMEOUT_S, pool)
        yield _Part(rows, {outcome.image_id: outcome for outcome in outcomes}, cache)


def _outputs(predict_part: Callable[[_Part], _Outputs], part: _Part) -> tuple[pd.DataFrame, tuple[str, ...], str]:
    """Return a part's table of outputs, the faults (see Answer), and an error message, "" unless predicting failed.

    An error other than OSError is not raised, because other parts may succeed.
    """
    if part.readable.empty:
        return pd.DataFrame(), (), ""
    try:
        return *predict_part(part), ""
    except OSError:  # a picture cannot be written, or a copy is gone
        raise
    except Exception as error:
        logger.error("%d files are not predicted", len(part.files), exc_info=error)
        return pd.DataFrame(), (), f"no model has predicted the file: {type(error).__name__}: {error}"


def _finished(part: _Part, outputs: pd.DataFrame, faults: tuple[str, ...], failure: str, columns: list[str]) -> pd.DataFrame:
    """Return the table of predictions for a part, with one row per file, and `columns` as its columns.

    Readable files get their outputs; the column `error` of the other files says why they have none. `failure` is the error
    message if all models have failed, else "".
    """
    table = part.files[list(KEYS)].reset_index(drop=True)
    numbers = [name for name in columns if name not in (*KEYS, BOXES, VERDICT, WARNING, ERROR)]
    for name in columns[len(KEYS) : -2]:
        values = outputs[name].reindex(table["image_id"]).to_numpy() if name in outputs else np.full(len(table), None)
        table[name] = (
            pd.Series(values).astype(float).round(7) if name in numbers else pd.Series(values, dtype=object).fillna("")
        )
    failed = {name: storable(done.reason) for name, done in part.outcomes.items() if done.status == "failed"}
    reasons = [failed.get(name) or error for name, error in zip(part.files["image_id"], part.files["error"], strict=True)]
    is_empty = table[numbers].isna().all(axis=1)
    for name in {BOXES, VERDICT} & set(columns):
        is_empty &= table[name] == ""
    warnings = [
        "; ".join(dict.fromkeys((*(part.outcomes[name].warnings if name in part.outcomes else ()), *faults)))
        for name in table["image_id"]
    ]
    table[WARNING] = [storable(text) for text in warnings]
    table[ERROR] = [
        storable(reason or (failure or "no model has predicted finite numbers for the file" if empty else ""))
        for reason, empty in zip(reasons, is_empty, strict=True)
    ]
    table.loc[table[ERROR] != "", WARNING] = ""
    return table[columns]


def _boxes_as_json(detections: pd.DataFrame) -> dict[str, str]:
    """Return a dict that maps the ids of images with boxes to their boxes as JSON text, the highest score first."""
    ordered = detections.sort_values("score", ascending=False, kind="stable")
    rounded = ordered.round({"score": 7, **dict.fromkeys(BOX, 2)})
    return {
        str(name): json.dumps(rows[["finding", "score", *BOX]].to_dict("records"))
        for name, rows in rounded.groupby("image_id", sort=False)
    }


def _write_pictures(part: _Part, table: pd.DataFrame, folder: Path, findings: Iterable[str]) -> None:
    boxes = dict(zip(table["image_id"], table[BOXES] if BOXES in table else [""] * len(table), strict=True))
    for xray in part.read():
        enlarged = _enlarge(xray)
        found: list[dict[str, Any]] = json.loads(boxes[xray.image_id] or "[]")
        picture = draw_boxes(enlarged, found, DRAWN_SCORE, (xray.rows, xray.columns), findings)
        _write_picture(folder / f"{xray.image_id}.png", picture)


def _enlarge(xray: CachedXray) -> np.ndarray:
    side = min(PICTURE_SIDE, max(xray.rows, xray.columns))
    scale = side / max(xray.pixels.shape)
    if scale <= 1:
        return xray.pixels
    height, width = xray.pixels.shape
    return cv2.resize(xray.pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_LINEAR)


def _write_mask(folder: str | Path, xray: CachedXray, mask: np.ndarray) -> None:
    original = cv2.resize(mask.astype(np.uint8) * 255, (xray.columns, xray.rows), interpolation=cv2.INTER_NEAREST)
    _write_picture(Path(folder) / "masks" / f"{xray.image_id}.png", original)


def _write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB or grey picture, uint8, as PNG, atomically."""
    bgr = picture[..., ::-1] if picture.ndim == 3 else picture
    with replacing(path) as temporary_path:
        temporary_path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(bgr))[1].tobytes())
