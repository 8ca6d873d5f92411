"""Prediction from bundles: light imports, memory, mirrored views, boxes in original pixels, and the prefetching thread."""

import functools
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.bundle import save_bundle
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import BundleError
from kitlib.inference.predict import VIEWS, Predictor, load_predictor, study_and_image_scores
from kitlib.letterbox import PLACEMENTS, flip_boxes, within
from kitlib.lungs.finders import Lungs
from kitlib.models.classifier import OUTPUTS, FindingsClassifier, StudyClassifier
from kitlib.recipes.fields import FindingsRecipe
from kitlib.settings import override
from kitlib.tables import BOX, check_table
from kitlib.training.xray_dataset import XrayDataset
from kitlib.xrays.cache import CachedXray
from tests.small_kernels import make_run
from tests.small_xrays import COLUMNS, RECIPE, ROWS, SmallXrays

CPU = torch.device("cpu")
RECORD = {
    "family": "study",
    "model": "small",
    "classes": OUTPUTS,
    "recipe": {"backbone": "test_resnet", "image_size": 32, "hidden": 16},
    "architecture": {},
    "longest_side": 50,
    "image_size": 32,
    "placement": "letterbox",
    "mean": [0.5],
    "std": [0.5],
    "fold": 2,
    "data_fingerprint": "",
    "precision": "float32",
    "validation": {},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, StudyClassifier(RECIPE).state_dict(), RECORD)
    return folder


def test_prediction_imports_no_training_library():
    heavy = ("pytorch_lightning", "lightning_fabric", "albumentations", "ultralytics", "matplotlib")
    code = f"import sys, kitlib.inference.predict; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_study_model_yields_one_row_per_image_whatever_the_batch(bundle):
    small = SmallXrays(10)
    tables = [pd.concat(load_predictor(bundle, CPU, size).predict(small.stream())) for size in (1, 4, 10)]
    assert list(tables[0].columns) == ["image_id", "model", "fold", *STUDY_CLASSES, "none"]
    assert tables[0].image_id.tolist() == small.image_ids
    assert set(tables[0].fold) == {2} and set(tables[0].model) == {"small"}
    for other in tables[1:]:
        np.testing.assert_allclose(other[list(OUTPUTS)], tables[0][list(OUTPUTS)], atol=1e-5)


def test_the_batch_size_determines_the_chunks(bundle):
    chunks = list(load_predictor(bundle, CPU, 4).predict(SmallXrays(10).stream()))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert list(load_predictor(bundle, CPU, 4).predict(iter(()))) == []


def test_the_flip_view_makes_predictions_of_image_and_mirror_image_equal(bundle):
    small = SmallXrays(8)
    mirrored = SmallXrays(8)
    mirrored.pixels = {name: np.ascontiguousarray(pixels[:, ::-1]) for name, pixels in small.pixels.items()}
    # 100 columns on a canvas of 32 without padding left or right, so that mirroring commutes with the letterbox
    plain, flipped = (
        pd.concat(load_predictor(bundle, CPU, views=("full", "flip")).predict(each.stream())) for each in (small, mirrored)
    )
    np.testing.assert_allclose(plain[list(OUTPUTS)], flipped[list(OUTPUTS)], atol=1e-4)
    once = pd.concat(load_predictor(bundle, CPU).predict(small.stream()))
    assert np.abs(once[list(OUTPUTS)].to_numpy() - plain[list(OUTPUTS)].to_numpy()).max() > 1e-5


class Detector:
    """Detects the white blocks of SmallXrays in canvas pixels; has memory for `room` images at a time."""

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __init__(self, room=100):
        self.room, self.calls, self.overflows = room, [], 0

    def predict(self, pixels):
        self.calls.append(len(pixels))
        if len(pixels) > self.room:
            raise self.error
        return [self.found(each.numpy()) for each in pixels]

    @staticmethod
    def found(canvas):
        ys, xs = np.nonzero(canvas > 200)
        if not len(ys):
            return np.zeros((0, 6))
        return np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, 0.5, 0]])


def detecting(placement="letterbox", size=160, room=100, batch_size=8, views=("full",), lungs=None, recipe=None):
    record = RECORD | {"family": "faster_rcnn", "image_size": size, "placement": placement, "recipe": recipe or {}}
    return Predictor(record, Detector(room), CPU, batch_size, views, lungs)


@pytest.mark.parametrize("placement", ["letterbox", "stretch"])
@pytest.mark.parametrize("views", [("full",), ("flip",), ("lungs",), ("lungs_flip",), tuple(VIEWS)])
def test_boxes_of_every_view_are_in_original_pixels(placement, views, monkeypatch):
    # A frame with odd sides on the cached copy's grid (50 x 40), around the white block at 10..30, 5..25.
    monkeypatch.setattr("kitlib.lungs.finders.lung_box", lambda pixels: np.array([3.0, 2.0, 44.0, 39.0]))
    small = SmallXrays(16)
    rows = pd.concat(detecting(placement, views=views).predict(small.stream()))
    merged = rows.merge(small.boxes, on="image_id", suffixes=("", "_true"))
    # The boxes of a block in several views are fused into one, with the mean of their equal scores.
    assert sorted(rows.image_id) == sorted(small.boxes.image_id) and len(merged) == len(small.boxes)
    assert rows.score.to_numpy() == pytest.approx(0.5) and set(rows.model) == {"small"}
    for side in ("xmin", "ymin", "xmax", "ymax"):
        # a canvas pixel is at most 0.625 original pixels and a cached pixel is two, so edges are blurred by that much
        assert (merged[side] - merged[f"{side}_true"]).abs().max() < 1.3


def test_a_box_of_score_zero_has_no_part_in_the_fusion_of_views(monkeypatch):
    small, found = SmallXrays(8), Detector.found

    def with_zero(canvas):
        boxes = found(canvas)
        return np.concatenate([boxes, boxes - [5, 5, 5, 5, 0.5, 0]])

    expected = pd.concat(detecting(views=("full", "flip")).predict(small.stream()))
    monkeypatch.setattr(Detector, "found", staticmethod(with_zero))
    pd.testing.assert_frame_equal(pd.concat(detecting(views=("full", "flip")).predict(small.stream())), expected)


def test_views_are_fused_finding_by_finding(monkeypatch):
    small, found = SmallXrays(8), Detector.found

    def twice(canvas):
        first, second = found(canvas), found(canvas)
        first[:, 4:], second[:, 4:] = (0.3, 0), (0.6, 1)
        return np.concatenate([first, second])

    monkeypatch.setattr(Detector, "found", staticmethod(twice))
    for views in (("full",), ("full", "flip")):
        rows = pd.concat(detecting(views=views).predict(small.stream()))
        scores = rows.groupby("finding").score.agg(["size", "min", "max"]).round(6)
        # One box of each of the record's first two classes for every true box.
        count = len(small.boxes)
        assert scores.T.to_dict("list") == {"negative": [count, 0.3, 0.3], "typical": [count, 0.6, 0.6]}


def test_without_lungs_the_lungs_view_is_the_whole_image_and_counted(monkeypatch):
    monkeypatch.setattr("kitlib.lungs.finders.lung_box", lambda pixels: None)
    small = SmallXrays(16)
    lungs = detecting(views=("lungs",))
    pd.testing.assert_frame_equal(pd.concat(lungs.predict(small.stream())), pd.concat(detecting().predict(small.stream())))
    assert lungs.lungs_missed == 16


class Finder:
    """Finds `frame` and a mask of the left half in every image except `missed`; `batches` records its calls."""

    def __init__(self, frame=(6.0, 4.0, 88.0, 78.0), missed=(), masks=True):
        self.frame, self.missed, self.masks, self.batches = np.array(frame), missed, masks, []

    def find(self, xrays):
        self.batches.append([xray.image_id for xray in xrays])
        return [Lungs(None) if xray.image_id in self.missed else Lungs(self.frame, self.mask(xray)) for xray in xrays]

    def mask(self, xray):
        if not self.masks:
            return None
        mask = np.zeros(xray.pixels.shape, bool)
        mask[:, : mask.shape[1] // 2] = True
        return mask


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
@settings(max_examples=30)
@given(st.tuples(*[st.floats(0, 400)] * 2), st.tuples(*[st.floats(1500, 2003)] * 2), st.booleans())
def test_boxes_of_a_crop_convert_back_exactly(placement, low, high, mirrored):
    rows, columns, frame = 3001, 2003, np.array([*low, *high])
    truth = np.array([[700.25, 800.5, 1100.75, 1200.125]])  # in the middle of each crop
    place = within(PLACEMENTS[placement], frame, rows, columns, 512)

    class Exact:
        overflows = 0

        def predict(self, pixels):
            boxes = place.boxes_to_canvas(truth)
            return [np.c_[flip_boxes(boxes, 512) if mirrored else boxes, [0.25], [0]]]

    record = RECORD | {"family": "yolo", "image_size": 512, "placement": placement, "recipe": {"lungs": "masks"}}
    xray = CachedXray(image_id="a", pixels=np.zeros((300, 200), np.uint8), rows=rows, columns=columns)
    views = ["lungs_flip" if mirrored else "lungs"]
    found = next(Predictor(record, Exact(), CPU, 1, views, Finder(frame)).predict([xray]))
    np.testing.assert_allclose(found[list(BOX)], truth, rtol=0, atol=1e-6)


def test_lungs_are_found_in_batches_and_images_without_them_are_used_uncropped():
    small, finder = SmallXrays(16), Finder(missed=["image003", "image014"])
    predictor = detecting(views=("lungs",), lungs=finder, batch_size=4, recipe={"lungs": "masks"})
    found = pd.concat(predictor.predict(small.stream())).set_index("image_id")
    assert [len(batch) for batch in finder.batches] == [4] * 4 and predictor.lungs_missed == 2
    assert set(found.index) == set(small.boxes.image_id)
    whole = pd.concat(detecting().predict(small.stream())).set_index("image_id")
    # On another canvas the block's edges differ by parts of a pixel.
    differ = (found[list(BOX)] != whole[list(BOX)]).any(axis=1)
    assert differ[differ].index.tolist() == [name for name in found.index if name not in finder.missed]


@pytest.mark.parametrize("recipe", [{}, {"masked": True}], ids=["plain", "masked"])
@pytest.mark.parametrize("finder", [None, Finder(missed=SmallXrays(16).image_ids)], ids=["nobody", "finds none"])
def test_images_without_lungs_are_predicted_as_without_cropping_and_counted(recipe, finder):
    small, views = SmallXrays(16), ("full", "lungs", "flip", "lungs_flip")
    lungs = detecting(views=views, lungs=finder, recipe={"lungs": "masks"} | recipe)
    whole = detecting(views=("full", "flip"))
    for one, other in zip(lungs.predict(small.stream()), whole.predict(small.stream()), strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert (lungs.lungs_missed, whole.lungs_missed) == (16, 0)


def test_the_finder_is_not_called_if_no_view_uses_the_lungs():
    finder = Finder()
    predictor = detecting(views=("full", "flip"), lungs=finder, recipe={"lungs": "masks"})
    list(predictor.predict(SmallXrays(8).stream()))
    assert finder.batches == [] and predictor.lungs_missed == 0


@pytest.mark.parametrize("views", [("full",), ("lungs",)])
def test_a_masked_model_gets_black_outside_of_the_mask_and_counts_images_without_one(views):
    class Network:
        overflows = 0

        def __init__(self):
            self.seen = []

        def predict(self, pixels):
            self.seen += list(pixels.numpy())
            return [np.zeros((0, 6))] * len(pixels)

    small, seen = SmallXrays(8), {}
    for masks in (True, False):
        finder, network = Finder(masks=masks), Network()
        record = RECORD | {"family": "yolo", "placement": "stretch", "recipe": {"lungs": "masks", "masked": True}}
        predictor = Predictor(record, network, CPU, 4, views, finder)
        list(predictor.predict(small.stream()))
        seen[masks], missed = network.seen, predictor.lungs_missed
        assert missed == (0 if masks else 8)
    frame = finder.frame if views == ("lungs",) else np.array([0.0, 0.0, COLUMNS, ROWS])
    place = within(PLACEMENTS["stretch"], frame, ROWS, COLUMNS, 32)
    edge = place.boxes_to_canvas(np.array([0.0, 0.0, COLUMNS / 2, ROWS]))[0, 2]
    for index, pixels in enumerate(seen[True]):
        # Shrinking blurs the mask's edge by one pixel of the canvas.
        assert (pixels[:, int(edge) + 2 :] == 0).all() and (pixels[:, : int(edge) - 1] > 0).mean() > 0.5
        whole = PLACEMENTS["stretch"](ROWS, COLUMNS, 32).image(small.pixels[f"image{index:03d}"])
        np.testing.assert_array_equal(seen[False][index], whole)


def test_a_model_predicts_on_the_crop_that_its_training_saw(bundle):
    small, finder = SmallXrays(8), Finder()
    trained = override(RECIPE, lungs="masks", trained_on="lungs", views=["lungs"], masked=True)
    examples = XrayDataset(small.images, small.labels, small.boxes, small, trained, lungs=finder)
    record = RECORD | {"recipe": RECORD["recipe"] | {"lungs": "masks", "views": ["lungs"], "masked": True}}
    network = load_predictor(bundle, CPU).network
    with torch.inference_mode():
        pixels = torch.stack([examples[index]["pixels"] for index in range(8)])
        expected = network.probabilities(network(network.normalise(pixels))).numpy()
    found = pd.concat(Predictor(record, network, CPU, 8, lungs=finder).predict(small.stream()))
    np.testing.assert_allclose(found[list(OUTPUTS)], expected, atol=1e-6)


def test_a_lung_segmenter_is_no_predictor(tmp_path):
    with pytest.raises(BundleError, match="contains a lung segmenter; load it with"):
        load_predictor(make_run(tmp_path, family="segmenter") / "bundle", CPU)


def test_unknown_views_are_refused():
    with pytest.raises(ValueError, match="valid views, each at most once: full, flip, lungs, lungs_flip"):
        detecting(views=("left",))


def test_a_detector_can_predict_on_a_larger_canvas():
    record = RECORD | {"family": "yolo", "recipe": {"inference_size": 320}}
    seen = []

    class Network:
        overflows = 0

        def predict(self, pixels):
            seen.append(tuple(pixels.shape))
            return [np.zeros((0, 6))] * len(pixels)

    list(Predictor(record, Network(), CPU, 8).predict(SmallXrays(8).stream()))
    assert seen == [(8, 320, 320)]


@pytest.mark.parametrize(("outputs", "studies", "nones"), [("both", 8, 16), ("study", 8, 0), ("none", 0, 16)])
def test_outputs_that_were_not_trained_have_no_rows(bundle, outputs, studies, nones):
    small = SmallXrays(16)
    whole = load_predictor(bundle, CPU)
    record = RECORD | {"recipe": RECORD["recipe"] | {"outputs": outputs}}
    chunks = Predictor(record, whole.network, CPU, 4).predict(small.stream())
    study_scores, image_scores = study_and_image_scores(chunks, small.images)
    assert (len(study_scores), len(image_scores)) == (studies, nones)


def test_findings_are_a_table_of_class_scores():
    recipe = FindingsRecipe(backbone="test_resnet", image_size=32, hidden=16, channels=1)
    network = FindingsClassifier(recipe, ["Mass", "Edema"]).eval()
    record = RECORD | {"family": "findings", "classes": ["Mass", "Edema"], "recipe": {}}
    found = pd.concat(Predictor(record, network, CPU, 4).predict(SmallXrays(8).stream()))
    assert list(check_table(found, "class_scores").columns) == ["image_id", "model", "fold", "Mass", "Edema"]


def test_exact_boxes_convert_back_exactly_and_are_clipped_to_the_image():
    placement = PLACEMENTS["letterbox"](3001, 2003, 512)
    truth = np.array([[100.25, 200.5, 1800.75, 2900.125]])

    class Exact:
        overflows = 0

        def predict(self, pixels):
            inside = np.c_[placement.boxes_to_canvas(truth), [0.25], [0]]
            beyond = [[0.0, 0.0, 512.0, 512.0, 1.25, 0], [0.0, 0.0, float(placement.left), 512.0, 0.9, 0]]
            return [np.r_[inside, beyond]]

    xray = CachedXray(image_id="a", pixels=np.zeros((300, 200), np.uint8), rows=3001, columns=2003)
    found = next(Predictor(RECORD | {"family": "yolo", "image_size": 512}, Exact(), CPU, 1).predict([xray]))
    # The box in the padding left of the image is dropped, the box around the whole canvas becomes the image; a score above
    # 1, as float16 has by rounding, becomes 1.
    np.testing.assert_allclose(found[["xmin", "ymin", "xmax", "ymax"]], [truth[0], [0, 0, 2003, 3001]], atol=1e-3)
    assert found.score.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "error",
    [
        Detector.error,
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch_permanently_and_loses_no_image(caplog, error):
    small = SmallXrays(32)
    whole = pd.concat(detecting().predict(small.stream()))
    predictor = detecting(batch_size=16)
    predictor.network.room, predictor.network.error = 3, error
    found = pd.concat(predictor.predict(small.stream()))
    pd.testing.assert_frame_equal(found.reset_index(drop=True), whole.reset_index(drop=True))
    assert predictor.fitted.size == 2 and predictor.network.calls[:3] == [16, 8, 4]
    assert max(predictor.network.calls[3:]) == 2
    assert "out of GPU memory at 16 images, continuing with 8" in caplog.text


def test_one_image_that_does_not_fit_is_an_error_and_so_is_any_other_error():
    with pytest.raises(torch.OutOfMemoryError):
        list(detecting(room=0).predict(SmallXrays(4).stream()))
    predictor = detecting(room=1)
    predictor.network.error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(predictor.predict(SmallXrays(4).stream()))
    assert predictor.network.calls == [4]


def test_an_error_of_the_stream_reaches_the_caller():
    def broken():
        yield from SmallXrays(4).stream()
        raise OSError("the disk is gone")

    chunks = detecting(batch_size=2).predict(broken())
    assert len(next(chunks)) == 0 and len(next(chunks)) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(chunks)


def test_reading_runs_ahead_but_not_far_and_ends_with_the_caller():
    read = []

    def endless():
        small = SmallXrays(8)
        while True:
            read.append(1)
            yield small.read(small.image_ids[len(read) % 8])

    before = threading.active_count()
    chunks = detecting(batch_size=2).predict(endless())
    next(chunks)
    deadline = time.monotonic() + 5
    while len(read) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 8 <= len(read) <= 12  # one batch yielded, three queued, one held by the thread
    chunks.close()
    assert threading.active_count() == before


def test_an_unknown_family_is_refused(tmp_path):
    save_bundle(tmp_path, {"a": torch.zeros(1)}, RECORD | {"family": "mask_rcnn"})
    with pytest.raises(BundleError, match="'mask_rcnn'; the families are: study, findings, patches, faster_rcnn, retinanet"):
        load_predictor(tmp_path, CPU)


def test_study_scores_are_the_mean_over_a_studys_images():
    images = pd.DataFrame({"image_id": ["a", "b", "c"], "study_id": ["s", "s", "t"]})
    chunk = pd.DataFrame(
        [["a", "m", 0, 0.5, 0.5, 0, 0, 0.1], ["c", "m", 0, 0, 0, 1, 0, 0.3]],
        columns=["image_id", "model", "fold", *STUDY_CLASSES, "none"],
    )
    later = chunk.iloc[:1].assign(image_id="b", negative=0.1, typical=0.9)
    studies, per_image = study_and_image_scores([chunk, later], images)
    assert studies.set_index("study_id").loc["s", list(STUDY_CLASSES)].tolist() == pytest.approx([0.3, 0.7, 0, 0])
    assert studies.set_index("study_id").loc["t", "indeterminate"] == 1
    assert per_image.set_index("image_id").none.to_dict() == {"a": 0.1, "b": 0.1, "c": 0.3}


def test_no_predictions_give_empty_tables_and_unknown_images_are_named():
    images = pd.DataFrame({"image_id": ["a"], "study_id": ["s"]})
    studies, per_image = study_and_image_scores([], images)
    assert len(studies) == len(per_image) == 0
    stranger = pd.DataFrame([["x", "m", 0, 1, 0, 0, 0, 0.5]], columns=["image_id", "model", "fold", *STUDY_CLASSES, "none"])
    with pytest.raises(ValueError, match="1 predicted images are not in the `images` table; the first is x"):
        study_and_image_scores([stranger], images)


def test_predictions_use_the_bundles_weights(bundle):
    small = SmallXrays(4)
    torch.manual_seed(0)
    model = StudyClassifier(override(RECIPE)).eval()
    canvas = PLACEMENTS["letterbox"](ROWS, COLUMNS, 32).image(small.pixels["image003"])
    with torch.inference_mode():
        logits = model(model.normalise(torch.from_numpy(canvas)[None]))[0]
    expected = [*logits[:4].softmax(0).tolist(), logits[4].sigmoid().item()]
    found = pd.concat(load_predictor(bundle, CPU).predict(small.stream()))
    assert found.loc[found.image_id == "image003", list(OUTPUTS)].to_numpy()[0] == pytest.approx(expected, abs=1e-5)


class Overflowing(torch.nn.Module):
    """A classifier whose activations exceed float16 for bright images, and whose float32 output is NaN for image value 9."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe = RECIPE

    def normalise(self, pixels):
        return pixels.float()

    def forward(self, x):
        large = x.flatten(1).mean(dim=1, keepdim=True) * 1000
        large = large.half().float() if torch.is_autocast_enabled("cpu") else large
        large = torch.where(x.flatten(1)[:, :1] == 9, torch.nan, large)
        return large.expand(-1, 5) / 1e6

    def probabilities(self, logits):
        return torch.cat([logits[:, :4].softmax(dim=1), 1 - (logits[:, 4:] > 0).float()], dim=1)


@pytest.mark.parametrize(("batch_size", "overflowed"), [(1, 2), (3, 3)])
def test_a_batch_that_overflows_in_half_precision_is_predicted_in_float32(monkeypatch, batch_size, overflowed):
    half = functools.partial(torch.autocast, "cpu", dtype=torch.float16)
    monkeypatch.setattr("kitlib.inference.predict.autocast", lambda *_: half())
    images = {"dark": 1, "bright": 200, "broken": 9}
    xrays = [CachedXray(name, np.full((32, 32), value, np.uint8), 32, 32) for name, value in images.items()]
    predictor = Predictor(RECORD, Overflowing(), CPU, batch_size)
    table = pd.concat(predictor.predict(xrays)).set_index("image_id")
    # 200 x 1000 exceeds 65,504, float16's largest number; the broken image has no prediction, in either precision.
    assert predictor.overflowed == overflowed
    assert table.loc[["dark", "bright"], list(OUTPUTS)].notna().all(axis=None)
    assert table.loc["broken", list(OUTPUTS)].isna().all()


def test_images_of_a_detectors_overflowed_batches_are_counted(monkeypatch):
    predict = Detector.predict

    def overflowing(self, pixels):
        self.overflows += int(len(self.calls) == 1)  # the second batch
        return predict(self, pixels)

    monkeypatch.setattr(Detector, "predict", overflowing)
    predictor = detecting(batch_size=3)
    assert sum(1 for _ in predictor.predict(SmallXrays(8).stream())) == 3 and predictor.overflowed == 3
