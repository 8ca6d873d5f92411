"""The page in a real browser: numbers and positions match the models, and an unusable file only causes a message."""

import json
import os
import re
from contextlib import closing

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from playwright.sync_api import expect

from kitlib.leaderboard.listing import list_runs
from kitlib.page.opened_study import DecodedCopies
from kitlib.page.systems import find_systems
from kitlib.page.uploads import open_uploads
from kitlib.page.warm_models import WarmModels
from kitlib.runs.finished_run import read_prepared
from kitlib.scoring.submission_csv import read_submission
from kitlib.tables import BOX
from tests.page_visitor import BOXES, TRUTH, address_of, chromium, find_chromium, new_context, serving, visiting
from tests.small_page import COPY, bad_files, page_runs


@pytest.fixture(scope="module")
def browser():
    if not (found := find_chromium()):
        why = "no Chromium on PATH, and $CHROMIUM does not name one: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    with chromium(found) as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(browser, tmp_path_factory):
    return page_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(runs):
    with serving(runs) as server:
        yield server


@pytest.fixture(scope="module")
def xrays(runs):
    """Return the files of the test set with values from their headers; the first is MONOCHROME1 and not square."""
    files = sorted((runs.parent / "inputs").rglob("test/*/*/*.dcm"))
    heads = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
    told = [(head.PhotometricInterpretation, head.Rows, head.Columns) for head in heads]
    table = pd.DataFrame(told, columns=["photometric", "height", "width"])
    assert table.photometric[0] == "MONOCHROME1" and table.height[0] != table.width[0]
    return table.assign(path=files, study_id=[file.parts[-3] for file in files])


@pytest.fixture(scope="module")
def answer(runs, xrays, server):
    """Return the predictions of the fused models for the first file, computed in this process while the server starts."""
    copies = DecodedCopies(runs.parent / "copies")
    study = open_uploads([xrays.path[0]], copies, COPY)
    yield WarmModels().answer(find_systems(list_runs([runs]))[0], study).fused
    copies.close()


@pytest.fixture(scope="module")
def address(server):
    return address_of(server)


@pytest.fixture(scope="module")
def window(browser):
    """A window in which each test opens the page anew, without loading its scripts again."""
    with closing(new_context(browser)) as window:
        yield window


@pytest.fixture
def visitor(window, address):
    with visiting(window, address) as visitor:
        yield visitor


def test_bars_and_boxes_are_the_models_own_on_a_monochrome1_image_that_is_not_square(xrays, answer, visitor):
    xray = xrays.iloc[0]
    visitor.open(xray.study_id, xray.path)
    visitor.show_from(0)
    expected = answer.detections.sort_values("score")[list(BOX)].to_numpy()
    np.testing.assert_allclose(visitor.places(BOXES), sorted(expected.tolist()), atol=0.1)
    expect(visitor.drawn("svg")).to_have_attribute("viewBox", f"0 0 {xray.width} {xray.height}")
    bars = visitor.page.locator("#bars [role=meter]").evaluate_all("all => all.map(e => +e.getAttribute('aria-valuenow'))")
    said = answer.studies.iloc[0][["negative", "typical", "indeterminate", "atypical"]].tolist()
    np.testing.assert_allclose(bars, [*said, answer.nones["none"][0]], atol=0.001)
    # On screen, the centre of a box is at the same relative position as in the file, within one pixel.
    image, best = (visitor.drawn(each).last.bounding_box() for each in ("image.xray", BOXES))
    xmin, ymin, xmax, ymax = expected[-1]
    assert image["width"] / image["height"] == pytest.approx(xray.width / xray.height, rel=0.01)
    for start, size, middle in (("x", "width", (xmin + xmax) / 2), ("y", "height", (ymin + ymax) / 2)):
        assert best[start] + best[size] / 2 == pytest.approx(image[start] + image[size] * middle / xray[size], abs=1)
    # MONOCHROME1: low values are bright.
    shown = visitor.pixels()
    stored = cv2.resize(pydicom.dcmread(xray.path).pixel_array.astype(np.float32), shown.shape[::-1])
    assert np.corrcoef(shown.ravel(), stored.ravel())[0, 1] < -0.95


def test_the_slider_shows_as_many_boxes_as_have_that_score(xrays, visitor, tmp_path):
    visitor.open(xrays.study_id[0], xrays.path[0])
    told = json.loads(visitor.download("json", tmp_path).read_text())
    scores = np.array([box["score"] for box in told["images"][0]["boxes"]])
    assert len(scores) > 8 and np.ptp(scores) > 0.3
    for threshold in (0, 0.15, 0.3, 0.95):
        visitor.show_from(threshold)
        expect(visitor.drawn(BOXES)).to_have_count(int((scores >= threshold).sum()))
    visitor.page.locator("#threshold input[type=range]").press("Home")
    expect(visitor.drawn(BOXES)).to_have_count(len(scores))


def test_another_model_answers_otherwise_and_the_first_one_as_before(xrays, visitor):
    visitor.open(xrays.study_id[0], xrays.path[0])
    visitor.show_from(0)
    found, told = {"at first": visitor.places(BOXES)}, visitor.page.locator("#details")
    radios = {
        name: visitor.page.get_by_role("radio", name=re.compile(f"^{name}")) for name in ("fuse", "yolo", "faster_rcnn")
    }
    for name, models, without in (("yolo", 4, "faster_rcnn"), ("faster_rcnn", 4, "yolo"), ("fuse", 6, "no other")):
        radios[name].click()
        expect(told).not_to_contain_text(without)
        expect(visitor.status).to_contain_text(f"{models} models")  # of two folds each
        found[name] = visitor.places(BOXES)
    assert found["fuse"] == found["at first"]
    assert len({str(boxes) for boxes in found.values()}) == 3
    # The second click comes while the first is processed; the picture must match the selected button.
    radios["yolo"].click()
    radios["faster_rcnn"].click()
    expect(told).not_to_contain_text("yolo")
    assert visitor.places(BOXES) == found["faster_rcnn"]


def test_lungs_and_heat_are_drawn_when_they_are_asked_for(xrays, visitor):
    visitor.open(xrays.study_id[0], xrays.path[0])
    expect(visitor.drawn("path.mask, image.heat")).to_have_count(0)
    visitor.page.get_by_role("checkbox", name="lungs").check()
    expect(visitor.drawn("path.mask")).to_have_count(1)
    visitor.page.get_by_role("checkbox", name="heat").check()
    expect(visitor.drawn("image.heat")).to_have_count(1)
    with visitor.redrawn("heat"):
        visitor.pick("heat-class", "none")
    visitor.page.get_by_label("boxes", exact=True).uncheck()
    expect(visitor.drawn(BOXES)).to_have_count(0)
    expect(visitor.drawn("path.mask, image.heat")).to_have_count(2)


def test_window_and_level_change_the_picture_of_a_dicom_file_alone(xrays, visitor, tmp_path):
    visitor.open(xrays.study_id[0], xrays.path[0])
    before, own = visitor.pixels(), visitor.page.locator("#own-window input")
    with visitor.redrawn():
        own.check()
    with visitor.redrawn():
        visitor.fill("width", 1)
    # A window of width 1 at the lowest value: all values are above it, so black in MONOCHROME1; at the highest value white.
    for end, grey in (("min", 0), ("max", 255)):
        with visitor.redrawn():
            visitor.fill("center", visitor.page.get_attribute("#center input[type=number]", end))
        assert np.median(visitor.pixels()) == pytest.approx(grey, abs=1)
    with visitor.redrawn():
        own.uncheck()
    assert np.array_equal(visitor.pixels(), before)
    Image.fromarray(before).save(tmp_path / "plain.png")
    visitor.open("plain", tmp_path / "plain.png")
    expect(own).to_have_count(0)


def test_several_files_are_one_study_and_a_bad_one_among_them_is_named(xrays, visitor, tmp_path):
    study = xrays[xrays.study_id == xrays.study_id.mode()[0]]
    (tmp_path / "notes.dcm").write_text("words, not an image")
    visitor.open(study.study_id.iloc[0], *study.path, tmp_path / "notes.dcm")
    told = visitor.page.locator("#details")
    expect(visitor.status).to_contain_text(f"{len(study)} images")
    expect(told).to_contain_text("Left out: notes.dcm")
    for xray in study[::-1].itertuples():
        visitor.pick("images", xray.path.stem)
        expect(told).to_contain_text(xray.path.stem)
        expect(visitor.drawn("svg")).to_have_attribute("viewBox", f"0 0 {xray.width} {xray.height}")
    visitor.fill("threshold", "")  # as happens while a number is typed
    expect(visitor.drawn("image.xray")).to_have_count(1)
    # Switching models keeps the selected image, which is not the first.
    visitor.pick("images", study.path.iloc[-1].stem)
    expect(told).to_contain_text(study.path.iloc[-1].stem)
    visitor.page.get_by_role("radio", name=re.compile("^yolo")).click()
    expect(told).not_to_contain_text("faster_rcnn")
    expect(told).to_contain_text(study.path.iloc[-1].stem)
    rows = read_submission(visitor.download("rows", tmp_path))
    assert set(rows.studies.study_id) == set(study.study_id)
    assert set(rows.images.image_id) == {path.stem for path in study.path}
    visitor.page.locator("#upload").get_by_label(re.compile("remove", re.I)).first.click()
    expect(visitor.status).not_to_contain_text(f"{len(study)} images")


def test_the_gallery_shows_annotations_beside_what_models_that_have_not_seen_the_image_say(runs, visitor):
    tables = read_prepared(runs / "prepare")
    images, labels = tables["images"], tables["labels"].set_index("id")
    visitor.page.get_by_role("tab", name="Gallery").click()
    tiles = visitor.page.locator("#gallery button.thumbnail-item")
    expect(tiles).to_have_count(12)
    first = tiles.all_inner_texts()
    visitor.fill("page", 2)
    expect(tiles).to_have_count(len(images) - 12)
    assert len({*first, *tiles.all_inner_texts()}) == len(images)
    visitor.pick("choice", "atypical")
    atypical = images[labels.atypical[images.study_id].to_numpy() == 1].set_index("image_id")
    expect(tiles).to_have_count(len(atypical))
    boxes = tables["boxes"][tables["boxes"].image_id.isin(atypical.index)]
    chosen = boxes.image_id.iloc[0]
    tiles.filter(has_text=chosen).click()
    expect(visitor.status).to_contain_text(atypical.study_id[chosen])
    expect(visitor.status).to_contain_text("3 models")  # of one fold
    expected = sorted(boxes.loc[boxes.image_id == chosen, list(BOX)].to_numpy().tolist())
    np.testing.assert_allclose(visitor.places(TRUTH), expected, atol=0.01)
    expect(visitor.page.locator("#bars .bar.truth")).to_contain_text("atypical")
    fold = tables["folds"].set_index("id").fold[chosen]
    expect(visitor.page.locator("#details")).to_contain_text(f"Predicted by the models of fold {fold}")


def test_a_bad_file_costs_a_sentence_and_the_next_good_one_is_answered(xrays, visitor, tmp_path):
    for path, told in bad_files(tmp_path, xrays.path[0]).items():
        visitor.choose(path)
        expect(visitor.page.locator("#status .refused, [role=alert]").filter(has_text=path.name)).to_contain_text(told)
    visitor.open(xrays.study_id[0], xrays.path[0])
    expect(visitor.drawn("image.xray")).to_have_count(1)


def test_a_cleared_upload_whose_request_is_late_does_not_hide_the_next_one(visitor, tmp_path):
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "text.dcm").write_text("words, not an image")
    visitor.choose(tmp_path / "empty.dcm")
    refused, late = visitor.page.locator("#status .refused"), []
    expect(refused).to_contain_text("empty.dcm")
    visitor.page.wait_for_timeout(1000)  # the steps that follow an upload have ended
    visitor.page.route("**/gradio_api/run/predict*", lambda route: late.append(route), times=1)
    visitor.choose(tmp_path / "text.dcm")
    visitor.page.wait_for_timeout(1000)  # the next upload has been answered, or waits
    late[0].continue_()
    visitor.page.wait_for_timeout(1000)
    expect(refused).to_contain_text("text.dcm")


def test_a_name_that_is_a_script_is_only_a_name(visitor, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).save(path)
    visitor.open("img_src", path)
    path.write_text("not an image now")
    visitor.choose(path)
    expect(visitor.page.locator("#status .refused")).to_contain_text("not an image")
    expect(visitor.page.locator("img[src=x]")).to_have_count(0)


def test_two_visitors_see_each_their_own_study(browser, window, address, xrays):
    first, second = xrays.drop_duplicates("study_id").iloc[:2].itertuples()
    with closing(new_context(browser)) as another, visiting(window, address) as one, visiting(another, address) as other:
        one.choose(first.path)
        other.open(second.study_id, second.path)
        one.show_from(1)
        other.show_from(0)
        expect(one.drawn(BOXES)).to_have_count(0)
        one.show_from(0)
        for visitor, xray in ((one, first), (other, second)):
            expect(visitor.status).to_contain_text(xray.study_id)
            expect(visitor.drawn("svg")).to_have_attribute("viewBox", f"0 0 {xray.width} {xray.height}")
        assert one.places(BOXES) != other.places(BOXES)


def test_keys_alone_reach_every_control(xrays, visitor):
    visitor.open(xrays.study_id[0], xrays.path[0])
    expect(visitor.page.locator("#json")).to_be_visible()
    reached = set()
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        reached.add(visitor.page.evaluate("(document.activeElement.closest('[id]:not(input)') || document.body).id"))
    assert reached >= {"models", "upload", "threshold", "layers", "own-window", "rows", "json"}
