"""Predictions for any files: those of a submission for the same run, whatever the files are called and however many fail."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from kitlib import draw_boxes, train_classifier
from kitlib.__main__ import app
from kitlib.bundle import read_record
from kitlib.classes import STUDY_CLASSES
from kitlib.competitions.siim_acr import SIIM_ACR, SiimAcrSettings
from kitlib.competitions.siim_covid19 import Fused
from kitlib.errors import RunError
from kitlib.fusion.model_fusion import ModelPredictions, merge, write_settings
from kitlib.inference import predict_files
from kitlib.inference.listed_files import list_files
from kitlib.inference.loaded_models import Answer, LoadedModels
from kitlib.inference.predict import load_predictor
from kitlib.inference.predict_files import predict, predict_parts
from kitlib.inference.submit import SubmissionRun, SubmitSettings
from kitlib.inference.systems import System, find_system
from kitlib.lungs.finders import segmenter_digest
from kitlib.paths import project_root
from kitlib.runs.run_kinds import find_kind
from kitlib.scoring.score import score_files
from kitlib.scoring.submission_csv import as_tables, read_submission, write_all_negative
from kitlib.tables import BOX
from kitlib.xrays.cache import CachedXray
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.run_lengths import draw_runs
from tests.small_bundles import edit_record
from tests.small_page import CLASSES, CLASSIFIER, page_runs, sparse_run, write_classifiers
from tests.small_systems import describe_model

pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/ (see page_runs), two classifiers and their ensemble, and inputs/ with the phantom competition."""
    folder = tmp_path_factory.mktemp("predict")
    runs = page_runs(folder, detectors=("faster_rcnn",))
    write_classifiers(runs)
    return folder


@pytest.fixture(scope="module")
def competition(folder):
    return next((folder / "inputs").glob("siim-*"))


@pytest.fixture(scope="module")
def predicted(folder, competition):
    return predict(competition / "test", folder / "runs")


@pytest.fixture
def pngs(tmp_path):
    """Three PNG files, two of the same name, that are bright in different places."""
    paths = [tmp_path / "a" / "x.png", tmp_path / "a" / "y.png", tmp_path / "b" / "x.png"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        image = np.random.default_rng(number).integers(0, 90, (60, 80), np.uint8)
        image[10 * number : 10 * number + 30, 20:50] += 160
        cv2.imwrite(str(path), image)
    return paths


def test_predictions_equal_those_of_a_submission(folder, competition, predicted, tmp_path):
    """Other images in a batch change a float32 by about 1e-7, which may change the one decimal of a coordinate."""
    system, bundles = find_system(folder / "runs"), []
    for model in system.models:
        bundles.append({"folder": f"{model.model}-fold{model.fold}"})
        shutil.copytree(model.folder, tmp_path / "weights" / bundles[-1]["folder"])
    (tmp_path / "weights" / "weights.json").write_text(json.dumps({"bundles": bundles}))
    shutil.copy(folder / "runs" / "fuse" / "fusion.json", tmp_path / "weights")
    run = SubmissionRun(competition, tmp_path / "submission.csv", SubmitSettings(time_limit_s=600, workers=1))
    run.predict(str(tmp_path / "weights"), tmp_path / "scratch")
    studies, nones, boxes = as_tables(read_submission(run.output))

    assert system.name == "fuse: study + faster_rcnn" and (predicted.error == "").all()
    assert sorted(predicted.file) == sorted(map(str, competition.glob("test/*/*/*.dcm")))
    assert set(predicted.image_id) == set(nones.image_id) and set(predicted.study_id) == set(studies.study_id)
    of_study = studies.set_index("study_id").loc[predicted.study_id, list(STUDY_CLASSES)].to_numpy(float)
    np.testing.assert_allclose(predicted[list(STUDY_CLASSES)], of_study, atol=2e-6)
    np.testing.assert_allclose(predicted.none, nones.set_index("image_id").none[predicted.image_id].astype(float), atol=2e-6)
    for image_id, cell in zip(predicted.image_id, predicted.boxes, strict=True):
        found = pd.DataFrame(json.loads(cell)).sort_values("score", ascending=False, kind="stable")
        submitted = boxes[boxes.image_id == image_id].sort_values("score", ascending=False, kind="stable")
        assert set(found.finding) == {"opacity"} and len(found) == len(submitted) > 1
        np.testing.assert_allclose(found.score, submitted.score, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[list(BOX)], submitted[list(BOX)], atol=0.1101)


def test_a_segmenter_of_another_structure_reports_its_highest_probability(folder, tmp_path):
    image = np.zeros((200, 300), np.uint8)
    image[20:180, 30:270] = 250  # bright is pneumothorax for this segmenter
    cv2.imwrite(str(tmp_path / "ill.png"), image)
    cv2.imwrite(str(tmp_path / "well.png"), image // 250)
    run = sparse_run(tmp_path / "run")
    table = predict([tmp_path / "ill.png", tmp_path / "well.png"], run, pictures=tmp_path / "drawn")
    assert list(table.columns) == ["file", "image_id", "study_id", "pneumothorax", "warning", "error"]
    assert table.pneumothorax[0] > 0.9 and table.pneumothorax[1] < 0.5 and (table.error == "").all()
    ill, well = (cv2.imread(str(tmp_path / "drawn" / "masks" / f"{name}.png"), 0) for name in ("ill", "well"))
    assert ill.shape == image.shape and (ill > 0).mean() == pytest.approx(0.64, abs=0.06) and not well.any()
    assert (tmp_path / "drawn" / "ill.png").is_file()


def test_parts_do_not_change_the_predictions_and_keep_studies_whole(folder, competition, predicted, monkeypatch):
    monkeypatch.setattr(predict_files, "PART", 2)
    system = find_system(folder / "runs" / "study")
    parts = list(predict_parts(list_files(competition / "test"), system))
    assert len(parts) > 1 and all(len(part) >= 2 for part in parts[:-1])
    assert sum(part.study_id.nunique() for part in parts) == predicted.study_id.nunique()
    assert list(parts[0].columns) == ["file", "image_id", "study_id", *STUDY_CLASSES, "none", "warning", "error"]
    whole = predicted.set_index("file")[list(STUDY_CLASSES)]
    alone = pd.concat(parts).set_index("file")[list(STUDY_CLASSES)]  # the fusion has one study model, so they are equal
    np.testing.assert_allclose(alone, whole.loc[alone.index], atol=2e-6)


def own_predictions(run, pngs):
    """Return the plain mean of all models of a run, images x classes, and the predictions of each."""
    xrays = [CachedXray(name, read_xray(path), 60, 80) for name, path in zip(("x", "y", "x-2"), pngs, strict=True)]
    each = [pd.concat(load_predictor(bundle).predict(xrays))[CLASSES].to_numpy() for bundle in sorted(run.glob("**/bundle"))]
    return np.mean(each, axis=0)


def test_classifiers_and_ensembles_predict_their_own_classes(folder, pngs, tmp_path):
    runs = folder / "runs"
    first, second = (predict(tmp_path, runs / name) for name in ("first", "second"))
    assert list(first.columns) == ["file", "image_id", "study_id", *CLASSES, "warning", "error"]
    means = [own_predictions(runs / name, pngs) for name in ("first", "second")]
    for table, mean in zip((first, second), means, strict=True):
        np.testing.assert_allclose(table[CLASSES], mean, atol=1e-6)
    assert np.abs(means[0] - means[1]).max() > 1e-3
    both = predict(tmp_path, runs / "both")
    # The weighted mean, then the temperature 2: probabilities proportional to their square roots.
    roots = np.sqrt(0.25 * means[0] + 0.75 * means[1])
    np.testing.assert_allclose(both[CLASSES], roots / roots.sum(axis=1, keepdims=True), atol=1e-6)


def test_boxes_of_several_findings_are_named(folder, tmp_path, monkeypatch):
    """The boxes of the detector are taken for ones of two findings in turn, and those of its classifiers are added."""
    answer_of_one = LoadedModels.answer

    def answer(models, system, *rest):
        answer = answer_of_one(models, system, *rest)
        boxes = answer.fused.detections
        named = boxes.assign(finding=pd.Categorical(np.where(np.arange(len(boxes)) % 2, "mass", "effusion")))
        classes = answer.fused.nones[["image_id"]].assign(other=0.25)
        return replace(answer, fused=replace(answer.fused, detections=named), classes=classes)

    monkeypatch.setattr(LoadedModels, "answer", answer)
    cv2.imwrite(str(tmp_path / "x.png"), np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8))
    found = predict(tmp_path / "x.png", folder / "runs" / "faster_rcnn", pictures=tmp_path / "drawn")
    boxes = json.loads(found.boxes[0])
    assert list(boxes[0]) == ["finding", "score", *BOX] and {box["finding"] for box in boxes} == {"effusion", "mass"}
    assert (tmp_path / "drawn" / "x.png").is_file()


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """A system whose models are replaced by an answer, and five files: three pictures, a damaged one and a missing one.

    Image b has no prediction of a model, and image c only empty boxes.
    """
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((60, 80), 100, np.uint8))
    (tmp_path / "d.png").write_bytes(b"no image")
    studies = [["a", 0.123456781, 0.5, 0.0, 0.0, False], ["b", 0.5, 0.5, 0.0, 0.0, True], ["c", 0.5, 0.5, 0.0, 0.0, True]]
    nones = [["a", 0.25, False, True], ["b", 0.5, True, False], ["c", 0.5, True, True]]
    boxes = [["a", "opacity", 0.19, 50.0, 30.0, 70.0, 50.0], ["a", "opacity", 0.912345678, 5.123, 6.0, 40.0, 30.5]]
    fused = Fused(
        pd.DataFrame(studies, columns=["study_id", *STUDY_CLASSES, "prior"]),
        pd.DataFrame(nones, columns=["image_id", "none", "prior", "seen"]),
        pd.DataFrame(boxes, columns=["image_id", "finding", "score", *BOX]),
    )
    answer = Answer(pd.DataFrame(), ("of the run", "broken"), ("broken",), fused)
    monkeypatch.setattr(LoadedModels, "answer", lambda *_: answer)
    monkeypatch.setattr(predict_files, "PART", 2)
    model = describe_model("m", "study", "none", "boxes", longest_side=40, classes=["opacity"])
    return System("small", (model,), notes=("of the run",)), [tmp_path / f"{name}.png" for name in "abcde"]


STRONG = {"finding": "opacity", "score": 0.9123457, "xmin": 5.12, "ymin": 6.0, "xmax": 40.0, "ymax": 30.5}
WEAK = {"finding": "opacity", "score": 0.19, "xmin": 50.0, "ymin": 30.0, "xmax": 70.0, "ymax": 50.0}


def test_the_table_has_what_was_predicted_and_tells_why_the_rest_is_empty(answered, caplog):
    system, paths = answered
    parts = list(predict_parts(list_files(paths), system, workers=1))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert caplog.messages.count("of the run") == caplog.messages.count("broken") == 1
    table = pd.concat(parts)
    assert list(table.columns) == ["file", "image_id", "study_id", *STUDY_CLASSES, "none", "boxes", "warning", "error"]
    assert table.image_id.tolist() == list("abcde") and table.file.tolist() == list(map(str, paths))
    numbers = table[[*STUDY_CLASSES, "none"]].to_numpy()
    assert numbers[0].tolist() == [0.1234568, 0.5, 0, 0, 0.25] and np.isnan(numbers[1:]).all()
    # The highest score first. An image that a detector has seen has a list, if an empty one.
    assert [json.loads(cell) if cell else None for cell in table.boxes] == [[STRONG, WEAK], None, [], None, None]
    assert table.warning.tolist() == ["of the run; broken", "", "of the run; broken", "", ""]
    *others, damaged, missing = table.error
    assert others == ["", "no model has predicted finite numbers for the file", ""]
    assert damaged and missing == "there is no such file"


def test_a_picture_has_the_size_of_its_image_and_the_boxes_of_a_score_from_a_fifth_on(answered, tmp_path):
    """The decoded copies have half the size."""
    system, paths = answered
    list(predict_parts(list_files(paths), system, tmp_path / "new" / "drawn", workers=1))
    drawn = {path.name: cv2.imread(str(path))[..., ::-1] for path in (tmp_path / "new" / "drawn").iterdir()}
    assert set(drawn) == {"a.png", "b.png", "c.png"}
    expected = draw_boxes(np.full((60, 80), 100, np.uint8), [STRONG])
    assert (drawn["a.png"] == expected).all() and (expected != 100).any()
    assert (drawn["b.png"] == 100).all()


def test_an_error_of_all_models_is_told_in_the_table_and_one_of_the_disk_is_raised(answered, monkeypatch):
    def fail(*_):
        raise error

    system, paths = answered
    monkeypatch.setattr(LoadedModels, "answer", fail)
    monkeypatch.setattr(predict_files, "find_system", lambda _: system)
    error = OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        predict(paths, "run", workers=1)
    error = ValueError("a bug")
    table = predict(paths, "run", workers=1)
    assert table.error[:3].tolist() == ["no model has predicted the file: ValueError: a bug"] * 3
    assert not table.error[3:].str.contains("no model").any() and set(table.warning) == {""}
    assert table.index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("answers", "name"), [(["classes"], "error"), (["classes", "boxes"], "boxes"), (["masks"], "file")])
def test_a_class_must_not_have_the_name_of_another_column(answers, name):
    valid, invalid = (System("small", (describe_model("m", *answers, classes=["ill", each]),)) for each in ("well", name))
    assert {"ill", "well"} <= set(predict_files.table_columns(valid))
    with pytest.raises(RunError, match=f"small: the class '{name}' has the name of another column of the result"):
        predict_files.table_columns(invalid)


def test_a_segmenter_draws_masks_of_the_original_size(folder, tmp_path):
    image = np.zeros((200, 300), np.uint8)
    image[20:180, 30:270] = 250  # bright is lung for this segmenter
    cv2.imwrite(str(tmp_path / "lungs.png"), image)
    table = predict(tmp_path / "lungs.png", folder / "runs" / "lungs", pictures=tmp_path / "drawn")
    mask = cv2.imread(str(tmp_path / "drawn" / "masks" / "lungs.png"), cv2.IMREAD_UNCHANGED)
    assert table.lungs.tolist() == ["found"] and mask.shape == image.shape and set(np.unique(mask)) == {0, 255}
    # The block is 160 x 240 of 200 x 300 pixels; the mask is drawn on a canvas of 64 pixels.
    assert (mask > 0).mean() == pytest.approx(0.64, abs=0.06) and table.lung_area[0] == pytest.approx(
        (mask > 0).mean(), abs=0.01
    )
    (frame,) = json.loads(table.boxes[0])
    assert frame["finding"] == "lungs" and frame["xmin"] < 30 and frame["xmax"] > 270
    outlined = (cv2.imread(str(tmp_path / "drawn" / "lungs.png"))[..., ::-1] == (255, 165, 0)).all(axis=-1)
    # The outline of the block on the decoded copy: not its middle, and not the edge of the image.
    rows, columns = outlined.shape
    assert 0.02 < outlined.mean() < 0.3 and not outlined[rows // 2, columns // 2] and not outlined[0].any()


def test_masks_of_a_tuned_fusion_are_those_of_its_submission(folder, tmp_path):
    caps = sparse_run(tmp_path / "caps")
    rows, columns = np.mgrid[:32, :48]  # not larger than the copies that the model reads
    image = np.where(columns < 24, 60 + 2 * rows, 250).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    settings = SiimAcrSettings(top=0.9, least_area=1000, bottom=0.75)
    for name, tuned in (("fuse", settings), ("strict", replace(settings, least_area=1024 * 1024))):
        write_settings(tuned, tmp_path / name / "fusion.json", SIIM_ACR)
        parameters = {"competition": "siim-acr", "runs": ["caps"]}
        (tmp_path / name / "record.json").write_text(json.dumps({"parameters": parameters}))
        (tmp_path / name / "metrics.json").write_text("{}")
    masks, tables = {}, {}
    for name in ("caps", "fuse", "strict"):
        tables[name] = predict(tmp_path / "x.png", tmp_path / name, pictures=tmp_path / "drawn" / name)
        masks[name] = cv2.imread(str(tmp_path / "drawn" / name / "masks" / "x.png"), cv2.IMREAD_UNCHANGED) > 0
    assert find_kind(caps) == "masks" and (tables["fuse"].pneumothorax == tables["caps"].pneumothorax).all()
    xray = CachedXray("x", read_xray(tmp_path / "x.png"), 32, 48)
    (maps,) = load_predictor(caps / "fold0" / "bundle").predict([xray])
    images = pd.DataFrame({"image_id": ["x"], "study_id": ["x"], "rows": [32], "columns": [48]})
    merged = merge(ModelPredictions.of(mask_maps=maps), images, settings)
    submitted = draw_runs(SIIM_ACR.decide(merged, settings)["x"]).astype(np.uint8)
    expected = cv2.resize(submitted, (48, 32), interpolation=cv2.INTER_NEAREST) > 0
    assert expected.any() and (masks["fuse"] == expected).all()
    assert masks["caps"].sum() > masks["fuse"].sum() and not masks["strict"].any()


def test_the_command_writes_what_it_prints_and_fails_only_if_nothing_is_predicted(folder, pngs, tmp_path):
    (tmp_path / "bad.dcm").write_bytes(b"no image")
    out, runs = tmp_path / "out" / "p.csv", folder / "runs"
    files = [str(pngs[0]), str(tmp_path / "bad.dcm"), str(tmp_path / "gone.png")]
    options = ["--runs", str(runs / "faster_rcnn"), "--out", str(out), "--pictures", str(tmp_path / "pictures"), "--json"]
    result = CliRunner().invoke(app, ["predict", *files, *options])
    assert result.exit_code == 0, result.output
    printed, table = json.loads(result.stdout), pd.read_csv(out)
    assert (printed["predicted"], printed["files"]) == (1, 3) and table.file.tolist() == files
    assert [row["file"] for row in printed["rows"]] == files
    assert printed["rows"][0]["boxes"] == json.loads(table.boxes[0]) and printed["rows"][1]["boxes"] is None
    assert table.error.notna().tolist() == [False, True, True] and table.error[2] == "there is no such file"
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["x.png"]
    result = CliRunner().invoke(app, ["predict", *files[1:], "--runs", str(runs / "faster_rcnn"), "--out", str(out)])
    assert result.exit_code == 1 and "0 of 2 files predicted by faster_rcnn; 2 failed" in result.stdout
    assert pd.read_csv(out).error.notna().all()
    result = CliRunner().invoke(
        app, ["predict", files[0], "--runs", str(runs / "prepare"), "--out", str(tmp_path / "no.csv")]
    )
    assert result.exit_code == 1 and "'prepared', which predicts nothing" in result.stderr
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.parametrize(
    ("errors", "ending"),
    [
        ((["", ""], [""]), "3 of 3 files predicted by faster_rcnn\n"),
        ((["", ""], ["no image"]), "2 of 3 files predicted by faster_rcnn; 1 failed, the first: part1-0: no image\n"),
        ((["first", ""], ["second"]), "1 of 3 files predicted by faster_rcnn; 2 failed, the first: part0-0: first\n"),
    ],
)
def test_the_command_joins_the_parts_and_names_the_first_failure(folder, pngs, tmp_path, monkeypatch, errors, ending):
    parts = [
        pd.DataFrame({"file": [f"part{number}-{row}" for row in range(len(each))], "error": each})
        for number, each in enumerate(errors)
    ]
    monkeypatch.setattr("kitlib.inference.predict_files.predict_parts", lambda *_, **__: iter(parts))
    options = ["--runs", str(folder / "runs" / "faster_rcnn"), "--out", str(tmp_path / "p.csv")]
    result = CliRunner().invoke(app, ["predict", str(pngs[0]), *options])
    assert result.exit_code == 0 and result.stdout.endswith(ending)
    written = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(written, pd.concat(parts, ignore_index=True))


def test_a_damaged_model_is_a_warning_and_without_any_model_an_error(folder, pngs, tmp_path):
    run = shutil.copytree(folder / "runs" / "first", tmp_path / "first")
    (run / "fold0" / "bundle" / "weights.safetensors").write_bytes(b"damaged")
    table = predict(pngs[0], run)
    assert "first (fold 0) failed and is left out: BundleError" in table.warning[0] and table.error[0] == ""
    (run / "fold1" / "bundle" / "weights.safetensors").write_bytes(b"damaged")
    table = predict(pngs[0], run)
    assert table.error[0].startswith("no model has predicted the file: BundleError") and table[CLASSES].isna().all(axis=None)


def test_models_of_masked_images_find_their_segmenter_beside_them(folder, pngs, tmp_path, caplog):
    runs = folder / "runs"
    run = shutil.copytree(runs / "first", tmp_path / "masked")
    for bundle in run.glob("fold*/bundle"):
        architecture = {"segmenter": segmenter_digest(read_record(runs / "lungs" / "bundle"))}
        edit_record(bundle, recipe={**asdict(CLASSIFIER), "lungs": "masks", "masked": True}, architecture=architecture)
    with pytest.raises(RunError, match=r"need the masks of the segmenter(?s:.)*no run next to"):
        find_system(run)
    shutil.copytree(runs / "lungs", tmp_path / "lungs")
    assert find_system(run).lungs == tmp_path / "lungs" / "bundle"
    masked, plain = (predict(pngs, each) for each in (run, runs / "first"))
    assert (masked.error == "").all() and np.abs(masked[CLASSES] - plain[CLASSES]).to_numpy().max() > 1e-4
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((60, 80), np.uint8))  # no lungs for a segmenter of bright pixels
    predict(tmp_path / "black.png", run)
    assert "first used 1 images uncropped, because no lungs were found" in caplog.text


def test_the_python_of_the_page_runs_as_written(folder, competition, tmp_path, monkeypatch):
    """It reads and draws an X-ray, predicts, trains a classifier on own images (notebooks 10 and 25), and scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kitlib.plans.train_classifier.run_path", lambda name: tmp_path / "runs" / name)
    dicom = next(competition.glob("test/*/*/*.dcm"))
    shutil.copy(dicom, "image.dcm")
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(folder / "runs")
    Path("inputs/chest/images").mkdir(parents=True)
    rows = ["Image,Class,Patient"]
    for number in range(12):
        image = np.random.default_rng(number).integers(0, 200, (64, 64)).astype(np.uint8)
        image[10:30, 10:30] = 250 * (number % 2)
        cv2.imwrite(f"inputs/chest/images/{number:03d}.png", image)
        rows.append(f"{number:03d}.png,{('normal', 'opacity')[number % 2]},P{number}")
    Path("inputs/chest/labels.csv").write_text("\n".join(rows))
    Path("inputs/demo-truth").symlink_to(folder / "inputs" / "truth")
    ids = pd.read_csv(competition / "sample_submission.csv").id
    write_all_negative("runs/demo/submission.csv", ids)

    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (project_root() / "docs" / "predict.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["table"].file.tolist() == ["image.dcm", *(f"inputs/chest/images/{number:03d}.png" for number in range(12))]
    assert (names["table"].error == "").all()
    strong = [box for box in names["boxes"] if box["score"] >= 0.2]
    assert names["picture"].shape == (*names["pixels"].shape, 3) and strong
    assert (names["picture"] == draw_boxes(read_xray(dicom), strong)).all()
    assert list(names["diagnoses"].columns) == ["file", "image_id", "study_id", "normal", "opacity", "warning", "error"]
    assert names["diagnoses"][["normal", "opacity"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-6)
    assert [path.name for path in names["run"].glob("fold*")] == ["fold0"]
    assert names["precision"] == score_files(folder / "inputs" / "truth", "runs/demo/submission.csv")


def test_a_folder_that_is_not_prepared_requires_the_parameter_prepare(tmp_path):
    with pytest.raises(RunError, match=r'is not a prepared run\. .* own images, also give `prepare`: \{"class_folders"'):
        train_classifier(tmp_path, tmp_path / "run")
