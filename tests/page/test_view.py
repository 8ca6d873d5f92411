"""What a visitor sees of a study, without a web server."""

import json
import os
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from kitlib.atomic import write_json
from kitlib.classes import STUDY_CLASSES
from kitlib.errors import PageError, UnreadableXray
from kitlib.inference.systems import find_segmenters
from kitlib.leaderboard.listing import list_runs
from kitlib.page.gallery import find_gallery
from kitlib.page.opened_study import DecodedCopies
from kitlib.page.systems import find_systems
from kitlib.page.view import BOXES, HEAT, LUNGS, TRUTH, Viewer
from kitlib.page.warm_models import WarmModels
from kitlib.runs.finished_run import read_prepared
from kitlib.tables import BOX, empty_table
from kitlib.xrays.dicom import decode_xray
from kitlib.xrays.drawn_boxes import finding_colours
from kitlib.xrays.writing import write_xray
from tests.small_page import CLASSES, CLASSIFIER, page_runs, sparse_run, write_classifiers
from tests.small_runs import train

FUSED = "fuse: study + yolo + faster_rcnn"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    listed = list_runs([page_runs(folder)])
    systems, copies = find_systems(listed), DecodedCopies(folder / "copies", workers=1)
    gallery = find_gallery(listed, systems[0].models[0].data_fingerprint, copies)
    yield Viewer(systems, WarmModels(), copies, gallery, folder / "page")
    copies.close()


@pytest.fixture(scope="module")
def view(viewer):
    """A study with annotated boxes; the first page of the gallery has at least one."""
    names = [caption.rpartition(", ")[2] for _, caption in viewer.gallery.page("typical", 1)[0]]
    return next(view for name in names if len((view := viewer.pick(name, FUSED)).study.images[0].truth))


@pytest.fixture(scope="module")
def classifying(viewer):
    """A viewer of the same runs and of classifiers, an ensemble of them, and a probe that sees only the border."""
    runs = viewer.folder.parent / "runs"
    write_classifiers(runs, viewer.gallery.fingerprint)
    train(
        runs / "border",
        read_prepared(runs / "prepare"),
        model="border",
        recipe=replace(CLASSIFIER, probe="border", judged_by="accuracy"),
        of_fold={"best": {"score": 0.625}},
        class_scores=empty_table("class_scores"),
    )
    systems = find_systems(list_runs([runs]))
    return Viewer(systems, viewer.models, viewer.copies, viewer.gallery, viewer.folder)


def drawn(svg, name):
    return len(re.findall(f'class="{name}"', svg))


def test_the_threshold_hides_boxes_below_it_and_only_chosen_layers_are_drawn(viewer, view):
    image, found = view.study.images[0], view.answer.fused.detections
    scores = found.score[found.image_id == image.key].sort_values().to_numpy()
    assert len(scores) > 3
    for threshold in (0.0, scores[1], scores[-1], 1.0):
        svg = viewer.draw(view, image, threshold, [BOXES, TRUTH])
        assert drawn(svg, "predicted") == (scores >= threshold).sum()
        assert drawn(svg, "truth") == len(image.truth)
    bare = viewer.draw(view, image, 0.0, [])
    assert [drawn(bare, name) for name in ("xray", "predicted", "truth", "mask", "heat")] == [1, 0, 0, 0, 0]
    full = viewer.draw(view, image, 0.0, [LUNGS, HEAT])
    assert [drawn(full, name) for name in ("mask", "heat")] == [1, 1]
    assert f"Grad-CAM of study, fold {view.study.fold} for {view.most_probable}" in full


def test_captions_say_what_cannot_be_drawn(viewer, view):
    image = view.study.images[0]
    system = replace(view.system, lungs=None, models=tuple(m for m in view.system.models if "boxes" in m.answers))
    svg = viewer.draw(replace(view, system=system), image, 0.0, [LUNGS, HEAT])
    assert "These models have no lung segmenter" in svg and "predicts" in svg and drawn(svg, "heat") == 0


def test_without_a_detector_the_picture_does_not_say_0_boxes(viewer, view):
    system = replace(view.system, name="classifier", models=tuple(m for m in view.system.models if "boxes" not in m.answers))
    alone = replace(view, system=system, answer=viewer.models.answer(system, view.study))
    svg = viewer.draw(alone, view.study.images[0], 0.0)
    assert "No detector has predicted boxes for this image" in svg and "0 boxes" not in svg


def test_each_visitor_takes_files_of_their_own(viewer, view):
    first, second = viewer.files(view), viewer.files(view)
    assert first[0] != second[0] and first[0].read_text() == second[0].read_text()


def test_a_window_changes_the_picture_and_not_the_answer(viewer, tmp_path):
    pixels = np.tile(np.linspace(0, 4000, 64).astype(np.uint16), (48, 1))
    write_xray(tmp_path / "ramp.dcm", pixels, transfer_syntax=ExplicitVRLittleEndian, bits_stored=12)
    view = viewer.upload([tmp_path / "ramp.dcm"], FUSED)
    image = view.study.images[0]
    windowed = viewer.window(view, image)
    assert windowed.default == (2000.5, 4001)  # the file has no window; values are 0 to 4000 in steps of one
    # PS3.3 C.11.2.1.2.1: black up to centre - 0.5 - (width - 1) / 2, white above centre - 0.5 + (width - 1) / 2.
    shown = windowed.render(1000.5, 1001)
    assert (shown[pixels <= 500] == 0).all() and (shown[pixels > 1500] == 255).all()
    assert np.abs(windowed.render(*windowed.default).astype(int) - decode_xray(tmp_path / "ramp.dcm").pixels).max() <= 1
    plain, own = (viewer.draw(view, image, 0.0, [], windowed=each) for each in (None, windowed))
    note = "Window and level change only this picture"
    assert note in own and note not in plain
    (tmp_path / "ramp.dcm").unlink()
    with pytest.raises(PageError, match="cannot be read any more"):
        viewer.window(view, image)
    with pytest.raises(PageError, match="is not a DICOM file, so window and level cannot be set"):
        viewer.window(view, replace(image, is_dicom=False))


def test_bars_hold_the_numbers_of_the_answer_and_mark_the_annotated_class(viewer, view):
    html = viewer.bars(view, view.study.images[0])
    shown = [float(number) for number in re.findall(r'aria-valuenow="([\d.]+)"', html)]
    study = view.answer.fused.studies.iloc[0]
    nones = view.answer.fused.nones.set_index("image_id").none
    expected = [*(study[name] for name in STUDY_CLASSES), nones[view.study.images[0].key]]
    assert shown == pytest.approx(expected, abs=5e-4)
    assert html.count("annotated</span>") == 1


def test_names_from_files_are_escaped(viewer, view):
    image = replace(view.study.images[0], facts={"View": "<script>alert(1)</script>"}, remarks=("<b>odd</b>",))
    html = viewer.details(view, image)
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>odd" not in html


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("layer", "what", "error", "told"),
    [
        (LUNGS, "lungs", MemoryError("no room"), "The lungs cannot be shown: MemoryError: no room."),
        (HEAT, "heat", ImportError("grad-cam is missing"), "The heat map cannot be shown: grad-cam is missing."),
        (HEAT, "heat", MemoryError("no room"), "The heat map cannot be shown: MemoryError: no room."),
    ],
)
def test_a_layer_that_fails_leaves_the_others(viewer, view, monkeypatch, layer, what, error, told):
    monkeypatch.setattr(viewer.models, what, raising(error))
    svg = viewer.draw(view, view.study.images[0], 0.0, [BOXES, layer])
    assert told in svg and drawn(svg, "predicted") > 0


def test_a_heat_map_without_evidence_says_so(viewer, view, monkeypatch):
    monkeypatch.setattr(viewer.models, "heat", lambda *_: ("m", np.zeros((4, 4), np.float32)))
    caption = "Heat map: Grad-CAM of m for none; no part of the image is evidence for it."
    assert caption in viewer.draw(view, view.study.images[0], 0.0, [HEAT], "none")


def test_images_that_cannot_be_opened_or_decoded_are_refused(viewer, view, monkeypatch):
    unreadable = raising(UnreadableXray("x.dcm", "it is damaged"))
    monkeypatch.setattr(viewer.gallery, "open", unreadable)
    with pytest.raises(PageError, match=r"This image cannot be opened: it is damaged\."):
        viewer.pick("any", FUSED)
    monkeypatch.setattr(viewer.models, "answer", unreadable)
    with pytest.raises(PageError, match=r"An image of this study cannot be decoded: it is damaged\."):
        viewer.switch(view, FUSED)


def test_files_of_an_hour_ago_are_deleted(viewer, view):
    old, recent = (viewer.files(view)[1].parent for _ in range(2))
    for folder, seconds in ((old, 3610), (recent, 3000)):
        os.utime(folder, (time.time() - seconds,) * 2)
    viewer.files(view)
    assert not old.exists() and recent.exists()


def test_details_name_the_annotated_class_and_the_models_in_their_order(viewer, view):
    html = viewer.details(view, view.study.images[0])
    assert f"<td>{view.study.true_classes[0]}</td>" in html
    fold = view.study.fold
    assert f"<td>study ({fold}); yolo ({fold}); faster_rcnn ({fold})</td>" in html
    unknown = replace(view, study=replace(view.study, true_classes=()))
    assert "Annotated" not in viewer.details(unknown, view.study.images[0])


def test_a_view_has_the_image_that_is_asked_for_or_its_first(view):
    images = (view.study.images[0], replace(view.study.images[0], image_id="another"))
    several = replace(view, study=replace(view.study, images=images))
    assert several.image("another") is images[1] and several.image("gone") is several.image(None) is images[0]


def test_an_unknown_system_and_a_missing_gallery_are_refused(viewer, view):
    with pytest.raises(PageError, match=r"There are no models called 'gone'\. Available models: fuse"):
        viewer.switch(view, "gone")
    with pytest.raises(PageError, match="no gallery"):
        Viewer([view.system], viewer.models, viewer.copies, None, viewer.folder).pick("any", FUSED)
    assert viewer.switch(view, "yolo").system.detectors == ("yolo",)


def test_every_run_that_predicts_is_offered_and_a_probe_is_not(classifying):
    expected = [FUSED, "yolo", "faster_rcnn", "both: first + second", "first", "second", "lungs"]
    assert list(classifying.systems) == expected


def test_classifiers_show_their_classes_and_what_a_probe_reaches(classifying, view):
    shown, image = classifying.switch(view, "both: first + second"), view.study.images[0]
    expected = classifying.models.answer(shown.system, view.study).classes.set_index("image_id").loc[image.key]
    html = classifying.bars(shown, image)
    assert [float(number) for number in re.findall(r'aria-valuenow="([\d.]+)"', html)] == pytest.approx(expected, abs=5e-4)
    viral = replace(shown, study=replace(shown.study, true_classes=("viral",)))
    assert classifying.bars(viral, image).count("annotated</span>") == 1 and "annotated" not in html
    assert "none" not in html and shown.heat_classes == CLASSES == list(expected.index)
    details = classifying.details(shown, image)
    assert "(border) that sees only the border of each image reaches a validation accuracy of 0.625" in details
    assert "reaches a validation" not in classifying.details(view, image)
    svg = classifying.draw(shown, image, 0.0, [BOXES, HEAT], "atypical")
    assert f"Grad-CAM of first, fold {view.study.fold} for {expected.idxmax()}" in svg and "No detector" not in svg
    rows, answer = classifying.files(shown)
    pd.testing.assert_series_equal(pd.read_csv(rows).set_index("image_id").loc[image.image_id], expected, check_names=False)
    of_image = json.loads(answer.read_text())["images"][0]
    assert of_image["classes"] == pytest.approx(dict(expected)) and "boxes" not in of_image


def test_detectors_of_other_findings_show_them_by_name_and_no_study_class(viewer, view):
    """The detectors of the fusion are taken for ones of two findings, which its boxes have in turn."""
    detectors = [replace(m, classes=("effusion", "mass")) for m in view.system.models if "boxes" in m.answers]
    detections = view.answer.fused.detections
    named = detections.assign(finding=np.where(np.arange(len(detections)) % 2, "mass", "effusion"))
    answer = replace(view.answer, fused=replace(view.answer.fused, detections=named))
    other = replace(view, system=replace(view.system, models=tuple(detectors), competition=None), answer=answer)
    image = other.study.images[0]
    assert other.findings == ("effusion", "mass", "opacity") and other.classes(image) == {}
    assert re.findall(r'aria-label="([^"]+)" aria-valuemin', viewer.bars(other, image)) == ["no finding in this image"]
    svg = viewer.draw(other, image, 0.0)
    assert drawn(svg, "predicted") == (named.image_id == image.key).sum() and "</span> mass</span>" in svg
    # A finding has the same colour in every picture, also in one that shows no other.
    alone = replace(other, answer=replace(answer, fused=replace(answer.fused, detections=named[named.finding == "mass"])))
    colour = finding_colours(other.findings)["mass"]
    assert f'stroke="{colour}"' in svg and f'stroke="{colour}"' in viewer.draw(alone, image, 0.0, [BOXES])
    rows, answer_path = viewer.files(other)
    table, told = pd.read_csv(rows), json.loads(answer_path.read_text())
    assert rows.name == "boxes.csv" and list(table) == ["image_id", "finding", "score", *BOX] and len(table) == len(named)
    boxes = told["images"][0]["boxes"]
    first = table[table.image_id == image.image_id].iloc[0]
    assert "study" not in told and boxes[0]["finding"] == first.finding and boxes[0]["score"] == pytest.approx(first.score)


def test_a_segmenter_shows_the_lungs_and_their_share(classifying, view):
    shown, image = classifying.switch(view, "lungs"), view.study.images[0]
    mask, _ = classifying.models.lungs(shown.system, view.study, image)
    assert f"{mask.mean():.1%} of the image is lung" in classifying.bars(shown, image) and 0 < mask.mean() < 1
    assert drawn(classifying.draw(shown, image, 0.0, []), "mask") == 1
    assert classifying.files(shown)[0] is None and ": 1 model answered" in classifying.summary(shown)


def test_a_segmenter_of_another_structure_outlines_it(viewer, view, tmp_path):
    lungs, caps = view.system.lungs.parent, sparse_run(tmp_path / "caps")
    assert list(find_segmenters([("lungs", caps), ("lungs", lungs)]).values()) == [view.system.lungs]
    systems = find_systems(list_runs([tmp_path]))
    viewer = Viewer(systems, viewer.models, viewer.copies, viewer.gallery, viewer.folder)
    shown, image = viewer.switch(view, "caps"), view.study.images[0]
    highest = shown.answer.maps(image.key)["pneumothorax"].max()
    assert [float(value) for value in re.findall(r'aria-valuenow="([\d.]+)"', viewer.bars(shown, image))] == [
        pytest.approx(highest, abs=1e-3)
    ]
    svg = viewer.draw(shown, image, 0.0)
    assert drawn(svg, "mask") == 1 and "pneumothorax found by the model" in svg
    rows, answer = viewer.files(shown)
    assert rows is None and json.loads(answer.read_text())["images"][0]["masks"]["pneumothorax"] == round(highest, 3)


def test_variants_of_several_fusions_say_whose_other_models_they_use(viewer, tmp_path):
    runs = viewer.folder.parent / "runs"
    shutil.copytree(runs / "fuse", tmp_path / "again")
    again = FUSED.replace("fuse", "again")
    names = [system.name for system in find_systems([*list_runs([runs]), *list_runs([tmp_path])])]
    variants = {
        fusion: [f"{name}, with {fusion}'s other models" for name in ("yolo", "faster_rcnn")] for fusion in (FUSED, again)
    }
    assert names[:6] == [FUSED, *variants[FUSED], again, *variants[again]]


def test_a_run_with_the_name_of_a_variant_is_told_apart(classifying, tmp_path):
    runs = classifying.folder.parent / "runs"
    shutil.copytree(runs / "first", tmp_path / "yolo")
    names = [system.name for system in find_systems([*list_runs([runs]), *list_runs([tmp_path])])]
    assert names.count("yolo") == names.count("yolo (alone)") == names.count("first") == 1


def test_probes_of_the_same_prepared_run_are_noted_with_their_mean_score(classifying, tmp_path):
    runs = classifying.folder.parent / "runs"
    tables, outside = read_prepared(runs / "prepare"), replace(CLASSIFIER, probe="outside_lungs", lungs="masks")
    probe = {"recipe": replace(outside, judged_by="macro_f1"), "class_scores": empty_table("class_scores")}
    train(tmp_path / "outside", tables, model="outside", of_fold={"best": {"score": 0.5}}, **probe)
    second = tmp_path / "outside" / "fold1" / "metrics.json"
    write_json(second, json.loads(second.read_text()) | {"best": {"score": 0.75}})
    train(tmp_path / "other", tables, model="other", of_fold={"best": {"score": 0.9}, "data_fingerprint": "other"}, **probe)
    train(tmp_path / "scoreless", tables, model="scoreless", of_fold={"best": {"score": None}}, **probe)
    train(tmp_path / "unfinished", tables, model="unfinished", of_fold={"best": {"score": 0.9}}, finished=False, **probe)
    systems = {system.name: system for system in find_systems([*list_runs([runs]), *list_runs([tmp_path])])}
    (note,) = [note for note in systems["first"].notes if "(border)" not in note]
    assert note.startswith(
        "A probe (outside) that sees only what lies outside the lungs reaches a validation macro F1 of 0.625:"
    )
    assert not any("probe" in note for name in (FUSED, "lungs") for note in systems[name].notes)


def test_copies_of_a_lung_segmenter_are_offered_once(classifying, tmp_path):
    for name in ("one", "another"):
        shutil.copytree(classifying.folder.parent / "runs" / "lungs", tmp_path / name)
    assert len(find_systems(list_runs([tmp_path]))) == 1


def test_runs_without_bundles_do_not_hide_the_others(classifying, tmp_path):
    runs = classifying.folder.parent / "runs"
    shutil.copytree(runs / "first", tmp_path / "first")
    train(tmp_path / "study", read_prepared(runs / "prepare"), study_scores=empty_table("study_scores"))
    assert [system.name for system in find_systems(list_runs([tmp_path]))] == ["first"]
