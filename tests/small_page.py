"""Test data of the page: runs with phantoms and untrained networks, and files that cannot be read as X-rays."""

import json
import struct
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.atomic import write_json
from kitlib.bundle import data_fingerprint, save_bundle
from kitlib.competitions.siim_covid19 import SiimFusion
from kitlib.datasets.folds import make_folds
from kitlib.datasets.siim import read_train
from kitlib.fusion.ensemble_bundle import Ensemble, write_ensemble
from kitlib.fusion.model_fusion import write_settings
from kitlib.inference.answer import AnsweringModel
from kitlib.inference.systems import System
from kitlib.models.classifier import OUTPUTS, FindingsClassifier, StudyClassifier
from kitlib.models.faster_rcnn import FasterRCNNDetector
from kitlib.page.uploads import MAX_UPLOAD_BYTES
from kitlib.phantoms.siim import write_competition
from kitlib.recipes.fields import DetectorRecipe, FindingsRecipe, StudyRecipe
from kitlib.tables import empty_table, write_table
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.writing import write_xray
from tests.small_lungs import bright_segmenter
from tests.small_runs import coverage, image_scores, prepare, study_scores, train, true_boxes

VAST = 60_000  # pixels per side in the header of a too large image
SIDE, COPY = 160, 96  # the longer side of the phantoms and of their decoded copies, pixels: boxes are scaled on the way
FOLDS = (0, 1)
CLASSES = ["COVID-19", "viral", "normal"]
CLASSIFIER = FindingsRecipe(backbone="test_resnet", image_size=32, hidden=8, multi_label=False)
STUDY = StudyRecipe(backbone="test_resnet", image_size=96, hidden=8)  # 3 x 3 cells, in which Grad-CAM can differ
YOLO = DetectorRecipe(family="yolo", backbone="yolov8n", width=0.25, image_size=64, max_detections=12, nms_iou=0.4)
FASTER_RCNN = DetectorRecipe(
    **{"backbone": "test_resnet", "image_size": 64, "fpn_channels": 16, "box_hidden": 16, "proposals": 20},
    **{"box_samples": 16, "max_detections": 12, "nms_iou": 0.4},
)


def page_runs(folder: Path, detectors: tuple[str, ...] = ("yolo", "faster_rcnn")) -> Path:
    """Write the runs prepare, study, yolo, faster_rcnn, lungs and fuse to FOLDER/runs, the competition to FOLDER/inputs.

    Some images are not square, some are MONOCHROME1. Each detector predicts several boxes with different scores.
    """
    runs = folder / "runs"
    inputs, sizes = folder / "inputs", {"train_studies": 16, "test_studies": 4, "side": SIDE, "damaged_test_files": 0}
    competition = write_competition(inputs, inputs / "truth", seed=5, workers=1, progress=False, **sizes)
    data = read_train(competition, progress=False)
    tables = {"images": data.images, "labels": data.labels, "boxes": data.boxes}
    tables["folds"] = make_folds(data.images, data.labels, data.boxes, len(FOLDS), 0)
    cache = XrayCache(runs / "prepare" / "xrays", COPY)
    cache.fill(data.images, workers=1)
    prepare(runs / "prepare", tables, dataset="siim", longest_side=COPY)

    predictions = {"study_scores": study_scores(tables, 0.7), "image_scores": image_scores(tables)}
    train(runs / "study", tables, FOLDS, "study", STUDY, **predictions)
    for model in detectors:
        predictions = {"coverage": coverage(tables, model), "detections": true_boxes(tables, 0.7, model)}
        train(runs / model, tables, FOLDS, model, YOLO if model == "yolo" else FASTER_RCNN, **predictions)
    copies = [cv2.resize(cache.read(image_id).pixels, (64, 64)) for image_id in data.images["image_id"]]
    for fold in FOLDS:
        for model, network in _networks(fold, torch.from_numpy(np.stack(copies))[:, None] / 255, detectors).items():
            _save(runs / model / f"fold{fold}" / "bundle", model, network, fold, data_fingerprint(**tables))

    bright_segmenter(runs / "lungs" / "bundle")
    write_table(empty_table("lungs"), "lungs", runs / "lungs" / "tables" / "lungs.parquet")
    write_json(runs / "lungs" / "metrics.json", {"model": "bright"})

    fused = [str(runs / name) for name in ("study", *detectors)]  # as notebooks record them
    write_settings(SiimFusion(none_no_box=0.5, box_confidence="box_and_model_avg"), runs / "fuse" / "fusion.json")
    write_json(runs / "fuse" / "record.json", {"parameters": {"prepare_run": str(runs / "prepare"), "runs": fused}})
    write_json(runs / "fuse" / "metrics.json", {"runs": fused, "score": 0.5})
    return runs


def sparse_run(folder: Path) -> Path:
    """Write the run of a segmenter that takes bright pixels for a pneumothorax."""
    bundle = bright_segmenter(folder / "fold0" / "bundle", sparse=True)
    for name in ("mask_scores", "mask_maps"):
        write_table(empty_table(name), name, folder / "tables" / f"{name}.parquet")
    recipe = json.loads((bundle / "model.json").read_text())["recipe"]
    write_json(folder / "fold0" / "metrics.json", {"model": "bright", "fold": 0, "recipe": recipe})
    write_json(folder / "metrics.json", {"model": "bright"})
    return folder


def described_system(name: str, *answers: str, classes: tuple[str, ...] = ("x", "y")) -> System:
    """Return a system with one model for each kind of answer, of which no file exists."""
    described = {"longest_side": 50, "wants_masks": False, "masked": False, "segmenter": "", "data_fingerprint": ""}
    models = [AnsweringModel(Path(kind), kind, 0, frozenset({kind}), classes=classes, **described) for kind in answers]
    return System(name, tuple(models))


def write_classifiers(runs: Path, fingerprint: str = "") -> None:
    """Write to RUNS the classifiers `first` and, with nested folds, `second`, and their ensemble `both`."""
    for seed, (name, folds) in enumerate({"first": ("fold0", "fold1"), "second": ("outer0/fold1", "outer1/fold0")}.items()):
        for number, fold in enumerate(folds):
            torch.manual_seed(10 * seed + number)
            network = FindingsClassifier(CLASSIFIER, CLASSES)
            record = {
                **{"family": "findings", "model": name, "classes": CLASSES, "recipe": asdict(CLASSIFIER)},
                **{"architecture": {}, "longest_side": COPY, "image_size": 32, "placement": CLASSIFIER.placement},
                **{"mean": network.mean, "std": network.std, "fold": int(fold[-1]), "data_fingerprint": fingerprint},
            }
            save_bundle(
                runs / name / fold / "bundle", network.state_dict(), {**record, "precision": "float32", "validation": {}}
            )
        (runs / name / "tables").mkdir()
        empty_table("class_scores").to_parquet(runs / name / "tables" / "class_scores.parquet")
        write_json(runs / name / "metrics.json", {"model": name})
    weights = {"learners": np.array([0.25, 0.75])}
    options = {"classes": tuple(CLASSES), "key": "image_id", "temperature": 2.0, "weights": weights}
    write_ensemble(runs / "both" / "ensemble", Ensemble("both", "weighted", ("first", "second"), **options))
    write_json(runs / "both" / "record.json", {"parameters": {"runs": ["first", "second"]}})
    write_json(runs / "both" / "metrics.json", {"model": "both"})


def bad_files(folder: Path, good: Path) -> dict[Path, str]:
    """Write files that cannot be read as X-rays; return each with a part of its error message. `good` is a DICOM file."""
    for name, content in (("text.dcm", b"words, no image"), ("empty.dcm", b""), ("half.dcm", good.read_bytes()[:8000])):
        (folder / name).write_bytes(content)
    zipfile.ZipFile(folder / "study.zip", "w").write(good, "good.dcm")
    header = struct.pack(">4s2I5B", b"IHDR", VAST, VAST, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + bytes(4) + b"IEND\xaeB`\x82")
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    odd = {"vast.dcm": {"Rows": VAST, "Columns": VAST}, "echo.dcm": {"Modality": "US", "PixelData": bytes(192), **colour}}
    for name, extra in odd.items():
        write_xray(folder / name, np.zeros((8, 8), np.uint8), transfer_syntax=ExplicitVRLittleEndian, extra=extra)
    with open(folder / "huge.dcm", "wb") as huge:
        huge.truncate(MAX_UPLOAD_BYTES + 1)
    messages = {
        **{"text.dcm": "not an image", "empty.dcm": "is empty", "half.dcm": "damaged or incomplete DICOM"},
        **{"study.zip": "Unpack it", "vast.png": f"{VAST:,} x {VAST:,}", "vast.dcm": f"{VAST:,} x {VAST:,}"},
        **{"echo.dcm": "ultrasound", "huge.dcm": "larger than the 100 MB"},
    }
    return {folder / name: message for name, message in messages.items()}


def _networks(fold: int, images: torch.Tensor, detectors: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """Return untrained networks whose batch norms fit `images` (n, 1, side, side) of 0..1, so that predictions differ."""
    torch.manual_seed(fold)
    networks: dict[str, torch.nn.Module] = {"study": StudyClassifier(STUDY)}
    _fit_batch_norm(networks["study"].backbone, (images - 0.45) / 0.225)
    if "yolo" in detectors:
        from kitlib.models.yolo import YoloDetector  # ultralytics takes seconds to import

        networks["yolo"] = yolo = YoloDetector(YOLO)
        _fit_batch_norm(yolo.model, images.repeat(1, 3, 1, 1))
    networks["faster_rcnn"] = faster_rcnn = FasterRCNNDetector(FASTER_RCNN)
    _fit_batch_norm(faster_rcnn.model.backbone, (images - 0.45) / 0.225)
    if "yolo" in networks:
        for boxes, scores in zip(yolo.model.model[-1].cv2, yolo.model.model[-1].cv3, strict=True):
            boxes[-1].weight.data.normal_(0, 1), scores[-1].weight.data.normal_(0, 0.4), scores[-1].bias.data.zero_()
    faster_rcnn.model.roi_heads.box_predictor.cls_score.weight.data.normal_(0, 0.5)
    return networks


def _fit_batch_norm(network: torch.nn.Module, images: torch.Tensor) -> None:
    """Set batch statistics from `images`; without them, the signal of random layers fades and all predictions are equal."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network.train()(images)


def _save(folder: Path, model: str, network: torch.nn.Module, fold: int, fingerprint: str) -> None:
    recipe = network.recipe
    record = {
        **{"family": "study" if model == "study" else recipe.family, "model": model, "recipe": asdict(recipe)},
        **{"classes": OUTPUTS if model == "study" else ["opacity"], "architecture": {}, "longest_side": COPY},
        **{"image_size": recipe.image_size, "placement": recipe.placement, "mean": network.mean, "std": network.std},
        **{"fold": fold, "data_fingerprint": fingerprint, "precision": "float32", "validation": {}},
    }
    save_bundle(folder, network.state_dict(), record)
