"""Which models a submission can use, what their records say, and how an ensemble replaces its learners."""

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
    assert (unwanted({"family": family, "classes": list(classes)}, competition) == "") is is_wanted


@pytest.mark.parametrize(
    ("family", "classes", "predicted", "advice"),
    [
        ("findings", ["a", "b", "c"], "classes (a, b, c)", "leave out its run"),
        ("findings", ["a", "b", "c", "d"], "classes (a, b, c, ...)", "leave out its run"),
        ("segmenter", ["lungs"], "lungs (lungs)", "give its run in the kernel's key `lungs`"),
    ],
)
def test_the_reason_names_three_classes_and_what_to_do(family, classes, predicted, advice):
    problem = unwanted({"family": family, "classes": classes}, SIIM_ACR)
    assert problem == f"predicts {predicted}, of which a submission to siim-acr contains none; {advice}"


def test_a_model_is_described_by_its_record(tmp_path):
    recipe = {"lungs": "masks", "views": ["lungs"], "masked": True}
    bundle = make_run(tmp_path, "boxes", 3, "yolo", architecture={"segmenter": "ab"}, **recipe) / "bundle"
    edit_record(bundle, longest_side=64, data_fingerprint="of data")
    assert read_any_model(bundle) == AnsweringModel(
        folder=bundle,
        model="boxes",
        fold=3,
        answers=frozenset({"boxes"}),
        longest_side=64,
        wants_masks=True,
        masked=True,
        segmenter="ab",
        data_fingerprint="of data",
        classes=("opacity",),
    )


@pytest.mark.parametrize(
    ("recipe", "answers"),
    [({}, {"study", "none"}), ({"outputs": "both"}, {"study", "none"}), ({"outputs": "none"}, {"none"})],
)
def test_a_study_model_answers_what_its_recipe_says(tmp_path, recipe, answers):
    model = read_any_model(make_run(tmp_path, "study", classes=OUTPUTS, **recipe) / "bundle")
    assert (model.answers, model.classes, model.longest_side) == (answers, tuple(OUTPUTS), 8)
    assert (model.wants_masks, model.masked, model.segmenter) == (False, False, "")


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
    """Return a study model's prediction for one image; its `none` is 0.5."""
    return pd.DataFrame(
        [[image_id, model, 0, *probabilities, 0.5]], columns=["image_id", "model", "fold", *STUDY_CLASSES, "none"]
    )


def stacked(tables, *learners, classes=STUDY_CLASSES):
    """Return the fused probabilities of study s and of study t, and the report, if the ensemble is a mean of `learners`."""
    ensemble = Ensemble("stacked", "mean", learners, tuple(classes), "study_id")
    fused, report = fused_answer(tables, [], [], IMAGES, SiimFusion(), ensemble)
    studies = fused.studies.set_index("study_id")[list(STUDY_CLASSES)]
    return *studies.loc[["s", "t"]].to_numpy().tolist(), report


def test_an_ensemble_counts_as_one_model_instead_of_its_learners():
    tables = [scores("one", "a", 0.8, 0.2, 0, 0), scores("two", "a", 0.4, 0.6, 0, 0), scores("other", "a", 0, 0, 0, 1)]
    tables += [scores(model, "b", 0, 0, 1, 0) for model in ("one", "two", "other")]
    of_s, of_t, report = stacked(tables, "one", "two")
    # The mean of the ensemble, which is (0.6, 0.4, 0, 0), and the other model.
    assert of_s == pytest.approx([0.3, 0.2, 0, 0.5]) and of_t == pytest.approx([0, 0, 1, 0])
    assert (report.studies, report.note) == (2, "") and 0 <= report.seconds < 60
    fused, no_report = fused_answer(tables, [], [], IMAGES, SiimFusion())
    # Without an ensemble, all three models count alike.
    of_s = fused.studies.set_index("study_id").loc["s", list(STUDY_CLASSES)].tolist()
    assert of_s == pytest.approx([0.4, 0.8 / 3, 0, 1 / 3]) and no_report is None


def test_studies_without_a_learner_get_the_mean_of_the_others_and_are_noted():
    tables = [scores("one", "a", 0.8, 0.2, 0, 0), scores("one", "b", 0.6, 0.4, 0, 0), scores("two", "a", 0.4, 0.6, 0, 0)]
    of_s, of_t, report = stacked(tables, "one", "two")
    assert of_s == pytest.approx([0.6, 0.4, 0, 0]) and of_t == pytest.approx([0.6, 0.4, 0, 0])
    others = "they get the plain mean of the other learners"
    assert (report.studies, report.note) == (1, f"1 of 2 studies lack a learner that was stopped; {others}")
    *_, report = stacked(tables, "one", "two", "three")
    assert (report.studies, report.note) == (0, f"2 of 2 studies lack three; {others}")


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
