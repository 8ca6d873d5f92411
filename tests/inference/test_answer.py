"""What a submission can use of a model, by its record, and how an ensemble replaces its learners."""

import pandas as pd
import pytest

from kitlib.classes import RSNA_CLASSES, STUDY_CLASSES
from kitlib.competitions.rsna_pneumonia import RSNA_PNEUMONIA
from kitlib.competitions.siim_acr import SIIM_ACR
from kitlib.competitions.siim_covid19 import SIIM_COVID19, SiimFusion
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.errors import BundleError, SettingsError
from kitlib.fusion.ensemble_bundle import Ensemble
from kitlib.inference.answer import AnsweringModel, fused_answer, read_any_model, unwanted
from kitlib.models.classifier import OUTPUTS
from tests.small_bundles import edit_record
from tests.small_kernels import make_run

IMAGES = pd.DataFrame({"image_id": ["a", "b"], "study_id": ["s", "t"], "rows": 8, "columns": 6})


@pytest.mark.parametrize(
    ("family", "classes", "competition", "is_wanted"),
    [
        ("study", OUTPUTS, SIIM_COVID19, True),
        ("study", OUTPUTS, VINBIGDATA, False),
        ("findings", ["none"], SIIM_COVID19, True),
        ("findings", ["Mass", "No finding"], VINBIGDATA, True),
        ("findings", ["Mass"], VINBIGDATA, False),  # a finding of its boxes, not of its images
        # RSNA's three classes change the scores of its boxes, but only together.
        ("findings", RSNA_CLASSES, RSNA_PNEUMONIA, True),
        ("findings", [*RSNA_CLASSES, "other"], RSNA_PNEUMONIA, True),
        ("findings", RSNA_CLASSES[1:], RSNA_PNEUMONIA, False),
        ("yolo", ["opacity"], RSNA_PNEUMONIA, True),
        ("yolo", ["ILD"], SIIM_COVID19, False),
        ("sparse_segmenter", ["pneumothorax"], SIIM_ACR, True),
        ("sparse_segmenter", ["pneumothorax"], SIIM_COVID19, False),
        ("segmenter", ["lungs"], SIIM_ACR, False),
    ],
)
def test_a_model_is_wanted_if_the_competition_uses_one_of_its_classes(family, classes, competition, is_wanted):
    problem = unwanted({"family": family, "classes": list(classes)}, competition)
    assert (problem == "") is is_wanted
    advice = "give its run in the kernel's key `lungs`" if family == "segmenter" else "leave out its run"
    assert is_wanted or problem.endswith(f"of which a submission to {competition.name} contains none; {advice}")


def test_of_many_unwanted_classes_three_are_named():
    for classes, named in ((["a", "b", "c"], "(a, b, c)"), (["a", "b", "c", "d"], "(a, b, c, ...)")):
        assert unwanted({"family": "findings", "classes": classes}, SIIM_COVID19).startswith(f"predicts classes {named}, of")


def test_a_model_is_described_by_its_record(tmp_path):
    keys = {"architecture": {"segmenter": "ab"}, "lungs": "masks", "views": ["lungs"], "masked": True}
    bundle = make_run(tmp_path / "boxes", "boxes", 3, "yolo", **keys) / "bundle"
    edit_record(bundle, longest_side=64, data_fingerprint="of data")
    expected = AnsweringModel(bundle, "boxes", 3, frozenset({"boxes"}), 64, True, True, "ab", "of data", ("opacity",))
    assert read_any_model(bundle) == expected
    for outputs, answers in ((None, {"study", "none"}), ("both", {"study", "none"}), ("none", {"none"})):
        recipe = {} if outputs is None else {"outputs": outputs}
        bundle = make_run(tmp_path / str(outputs), "study", classes=OUTPUTS, **recipe) / "bundle"
        expected = AnsweringModel(bundle, "study", 0, frozenset(answers), 8, False, False, "", "", tuple(OUTPUTS))
        assert read_any_model(bundle) == expected


def test_a_model_whose_recipe_has_an_unknown_field_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no field 'colour'"):
        read_any_model(make_run(tmp_path, family="yolo", colour=1) / "bundle")


@pytest.mark.parametrize(("side", "is_valid"), [(0, False), (1, True), (65_535, True), (65_536, False)])
def test_the_longest_side_is_one_that_a_dicom_file_can_have(tmp_path, side, is_valid):
    """DICOM's rows and columns have 16 bits."""
    bundle = make_run(tmp_path, family="yolo") / "bundle"
    edit_record(bundle, longest_side=side)
    if is_valid:
        assert read_any_model(bundle).longest_side == side
    else:
        with pytest.raises(BundleError, match=f"'longest_side' is {side}; expected 1 to 65535 pixels"):
            read_any_model(bundle)


def scores(model, image_id, *probabilities):
    return pd.DataFrame(
        [[image_id, model, 0, *probabilities, 0.5]], columns=["image_id", "model", "fold", *STUDY_CLASSES, "none"]
    )


def stacked(tables, *learners, classes=STUDY_CLASSES):
    """Return the fused probabilities of the studies s and t, and the report, with a mean of `learners` as the ensemble."""
    ensemble = Ensemble("stacked", "mean", learners, tuple(classes), "study_id")
    fused, report = fused_answer(tables, [], [], IMAGES, SiimFusion(), ensemble)
    studies = fused.studies.set_index("study_id")[list(STUDY_CLASSES)]
    return *studies.loc[["s", "t"]].to_numpy().tolist(), report


def test_an_ensemble_counts_as_one_model_instead_of_its_learners():
    tables = [scores("one", "a", 0.8, 0.2, 0, 0), scores("two", "a", 0.4, 0.6, 0, 0), scores("other", "a", 0, 0, 0, 1)]
    tables += [scores(model, "b", 0, 0, 1, 0) for model in ("one", "two", "other")]
    of_s, of_t, report = stacked(tables, "one", "two")
    # The mean of the ensemble's 0.6 and 0.4, and of the other model.
    assert of_s == pytest.approx([0.3, 0.2, 0, 0.5]) and of_t == pytest.approx([0, 0, 1, 0])
    assert (report.studies, report.note) == (2, "") and 0 <= report.seconds < 60
    fused, none = fused_answer(tables, [], [], IMAGES, SiimFusion())
    # Without an ensemble, all three models count alike.
    assert fused.studies[list(STUDY_CLASSES)].to_numpy()[0].tolist() == pytest.approx([0.4, 0.8 / 3, 0, 1 / 3])
    assert none is None


def test_studies_without_a_learner_get_the_mean_of_the_others_and_are_noted():
    tables = [scores("one", "a", 0.8, 0.2, 0, 0), scores("one", "b", 0.6, 0.4, 0, 0), scores("two", "a", 0.4, 0.6, 0, 0)]
    of_s, of_t, report = stacked(tables, "one", "two")
    assert of_s == pytest.approx([0.6, 0.4, 0, 0]) and of_t == pytest.approx([0.6, 0.4, 0, 0])
    lacking = "studies lack {}; they get the plain mean of the other learners"
    assert (report.studies, report.note) == (1, f"1 of 2 {lacking.format('a learner that was stopped')}")
    report = stacked(tables, "one", "two", "three")[-1]
    assert (report.studies, report.note) == (0, f"2 of 2 {lacking.format('three')}")


@pytest.mark.parametrize(
    ("learners", "classes", "note"),
    [
        (("three", "four"), STUDY_CLASSES, "none of its learners (three, four) has predicted; "),
        (("one",), ("x", "y"), "failed: BundleError: "),
    ],
)
def test_without_the_ensemble_its_learners_are_fused_like_other_models(learners, classes, note):
    tables = [scores("one", "a", 0.8, 0.2, 0, 0), scores("two", "a", 0.4, 0.6, 0, 0), scores("one", "b", 0, 0, 1, 0)]
    of_s, of_t, report = stacked(tables, *learners, classes=classes)
    assert of_s == pytest.approx([0.6, 0.4, 0, 0]) and of_t == pytest.approx([0, 0, 1, 0])
    assert report.note.startswith(note) and report.note.endswith("the study models are fused without it")
    assert report.studies == 0 and 0 <= report.seconds < 60


def test_classifiers_of_images_are_averaged_with_study_models():
    other = pd.DataFrame({"image_id": ["a", "b"], "model": "other", "fold": 1, "none": [0.1, 0.2]})
    fused, _ = fused_answer([scores("one", "a", 0.8, 0.2, 0, 0), other], [], [], IMAGES, SiimFusion())
    assert fused.nones.set_index("image_id").none.to_dict() == pytest.approx({"a": 0.3, "b": 0.2})
    assert fused.studies.set_index("study_id").prior.to_dict() == {"s": False, "t": True}


def test_without_a_study_model_there_is_no_report_on_the_ensemble():
    assert stacked([], "one", "two")[-1] is None
