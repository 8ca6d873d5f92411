"""Which rows of the learners' tables are used to train and to evaluate ensembles, and which tables are refused."""

import numpy as np
import pandas as pd
import pytest

from kitlib.errors import FusionError
from kitlib.fusion.stacking import CROSS_FITTED, NESTED, gather

CLASSES = ["sick", "well"]
IMAGES = pd.DataFrame({"image_id": list("abcdef"), "patient_id": ["p", "p", "q", "r", "s", "t"]})
IMAGES = IMAGES.assign(study_id="study " + IMAGES.image_id, path="", rows=1, columns=1, source="", view="")
LABELS = pd.DataFrame({"id": IMAGES.study_id, "sick": [1, 0, 1, 0, 1, 0], "well": [0, 1, 0, 1, 0, 1]})
FOLDS = pd.DataFrame({"id": IMAGES.image_id, "fold": [0, 0, 1, 1, 2, 2]})
PREPARED = IMAGES, LABELS, FOLDS
OWN = FOLDS.set_index("id").fold


def nested(model, scale=1.0, outers=(0, 1, 2)) -> pd.DataFrame:
    """Scores of every image by every model; `sick` encodes outer and inner fold: (10 outer + inner + 11) / 100 * scale."""
    rows = [
        (image, model, outer, inner, (10 * outer + inner + 11) / 100 * scale)
        for outer in outers
        for inner in (0, 1, 2)
        if inner != outer
        for image in IMAGES.image_id
    ]
    table = pd.DataFrame(rows, columns=["image_id", "model", "outer", "fold", "sick"])
    return table.assign(well=1 - table.sick)


def plain(model, sick=0.25) -> pd.DataFrame:
    return pd.DataFrame({"image_id": OWN.index, "model": model, "fold": OWN.to_numpy(), "sick": sick, "well": 1 - sick})


def test_nested_scores_are_selected_by_outer_and_inner_fold():
    gathered = gather([nested("one"), nested("half", 0.5)], *PREPARED)
    assert (gathered.protocol, gathered.learners, gathered.classes) == (NESTED, ("one", "half"), ("sick", "well"))
    assert gathered.folds == [0, 1, 2] and gathered.key == "image_id" and gathered.has_in_sample()
    judged = gathered.test_stack(1)
    assert judged.ids.tolist() == ["c", "d"] and judged.probabilities.shape == (2, 2, 2)
    # the mean over the inner models 0 and 2 of the outer fold 1: (21 + 23) / 2
    np.testing.assert_allclose(judged.probabilities[:, :, 0], [[0.22, 0.11]] * 2)
    lesson = gathered.training_stack(1)
    assert lesson.ids.tolist() == ["a", "b", "e", "f"]
    assert lesson.truth.tolist() == [0, 1, 0, 1] and lesson.fold.tolist() == [0, 0, 2, 2]
    assert lesson.patient.tolist() == [0, 0, 1, 2]
    # images of fold 0 by the model of (1, 0), of fold 2 by that of (1, 2)
    np.testing.assert_allclose(lesson.probabilities[:, 0, 0], [0.21, 0.21, 0.23, 0.23])
    # in-sample scores are those of the other inner model
    np.testing.assert_allclose(gathered.training_stack(1, "in_sample").probabilities[:, 0, 0], [0.23, 0.23, 0.21, 0.21])
    np.testing.assert_allclose(gathered.full_stack().probabilities[:, 0, 0], [0.125, 0.125, 0.22, 0.22, 0.315, 0.315])


def test_with_one_outer_fold_the_other_folds_are_still_out_of_fold():
    gathered = gather([nested("one", outers=(0,))], *PREPARED)
    assert gathered.folds == [0] and gathered.training_stack(0).ids.tolist() == list("cdef")
    # fold 0 by the mean of (0, 1) and (0, 2); folds 1 and 2 by the model that chose its epoch on that fold
    np.testing.assert_allclose(gathered.full_stack().probabilities[:, 0, 0], [0.125, 0.125, 0.12, 0.12, 0.13, 0.13])


def test_plain_scores_are_cross_fitted():
    table = plain("one", sick=np.array([1, 2, 3, 4, 5, 6]) / 10)
    gathered = gather([table, plain("other")], *PREPARED)
    assert (gathered.protocol, gathered.folds, gathered.has_in_sample()) == (CROSS_FITTED, [0, 1, 2], False)
    np.testing.assert_allclose(gathered.test_stack(1).probabilities[:, 0, 0], [0.3, 0.4])
    np.testing.assert_allclose(gathered.training_stack(1).probabilities[:, 0, 0], [0.1, 0.2, 0.5, 0.6])
    np.testing.assert_allclose(gathered.full_stack().probabilities[:, 0, 0], table.sick)
    with pytest.raises(FusionError, match=r"no 'in_sample' scores .* fold 1"):
        gathered.training_stack(1, "in_sample")
    with pytest.raises(FusionError, match=r"no 'out_of_fold' scores .* more folds"):
        gather([plain("one").head(2)], *PREPARED).training_stack(0)


def test_models_without_an_outer_fold_give_in_sample_scores_of_the_other_folds():
    # outer -1, the published protocol of the test set: the training images of the model of fold 1 are a, b, e, f
    table = pd.concat([plain("one", 0.5 + fold / 10).assign(outer=-1, fold=fold) for fold in (0, 1, 2)])
    gathered = gather([table], *PREPARED)
    assert (gathered.protocol, gathered.folds, gathered.has_in_sample()) == (CROSS_FITTED, [0, 1, 2], True)
    np.testing.assert_allclose(gathered.training_stack(1, "in_sample").probabilities[:, 0, 0], [0.6] * 4)
    np.testing.assert_allclose(gathered.training_stack(1).probabilities[:, 0, 0], [0.5, 0.5, 0.7, 0.7])


def test_studies_are_stacked_too():
    images = IMAGES.assign(study_id=["s0", "s0", "s1", "s1", "s2", "s2"])
    classes = ["negative", "typical", "indeterminate", "atypical"]
    labels = pd.DataFrame(np.eye(4)[:3], columns=classes).assign(id=["s0", "s1", "s2"])
    table = pd.DataFrame({"study_id": ["s0", "s1", "s2"], "model": "one", "fold": [0, 1, 2]}).assign(
        **dict.fromkeys(classes, 0.25)
    )
    gathered = gather([table], images, labels, FOLDS)
    assert (gathered.key, gathered.classes) == ("study_id", tuple(classes))
    assert gathered.full_stack().truth.tolist() == [0, 1, 2] and gathered.test_stack(2).ids.tolist() == ["s2"]


def test_in_sample_scores_must_be_requested_and_every_learner_must_have_them():
    gathered = gather([nested("one"), nested("two")], *PREPARED)
    # image a, of fold 0, by the models (1, 2) and (2, 1): .23 and .32
    np.testing.assert_allclose(gathered.full_stack("in_sample").probabilities[0, :, 0], (0.23 + 0.32) / 2)
    without = nested("two")
    own = without.image_id.map(OWN)
    without = without[(without.outer == own) | (without.fold == own)]
    assert not gather([nested("one"), without], *PREPARED).has_in_sample()


def test_ids_that_no_learner_has_predicted_are_counted():
    gathered = gather([plain("one").iloc[:-1], plain("other").iloc[:-1]], *PREPARED)
    assert gathered.unanswered == 1 and gathered.full_stack().ids.tolist() == list("abcde")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "no learner has scores"),
        ([plain("one"), plain("one")], "'one' has two scores for 'a' in fold 0; give only one run"),
        (
            [plain("one").rename(columns={"well": "other"}), plain("two")],
            "two has the classes sick, well, but one has other, sick",
        ),
        ([plain("one"), plain("two", np.r_[np.nan, np.ones(5)])], "1 rows have NaN scores; the first: 'a', by 'two' of"),
        ([plain("one").assign(well=0.9)], "6 rows have scores that do not sum to 1, "),
        ([plain("one").assign(image_id=list("abcdeX"))], "1 ids have scores but no fold; the first is X"),
        ([plain("one"), plain("two").head(4)], "'one' has scores for fold 2 .not nested., but 'two' has none"),
        ([plain("one"), nested("two")], "'one' has scores for fold 0 .not nested., but 'two' has none"),
        (
            [plain("one").assign(fold=[1, 0, 1, 1, 2, 2])],
            "1 scores are for images that their model was trained on; the first is 'a' in fold 0, by 'one' of",
        ),
        (
            [nested("one").query("fold == (outer + 1) % 3").assign(fold=lambda table: table.outer)],
            "the same outer and inner fold",
        ),
        (
            [plain("one"), plain("one").rename(columns={"image_id": "study_id"})],
            "images and scores of studies cannot be",
        ),
    ],
)
def test_inconsistent_tables_are_refused(tables, message):
    with pytest.raises(FusionError, match=message):
        gather(tables, *PREPARED)


def test_a_learner_without_an_image_is_named():
    gathered = gather([plain("one"), plain("two").drop(index=4)], *PREPARED)
    with pytest.raises(FusionError, match=r"test scores of fold 2: two has no score for 1 of 2 ids .* the first is e"):
        gathered.test_stack(2)


def test_labels_of_overlapping_or_other_classes_are_refused():
    with pytest.raises(FusionError, match="1 ids do not have exactly one of the classes sick, well; the first is b"):
        gather([plain("one")], IMAGES, LABELS.assign(sick=1).assign(well=[0, 1, 0, 0, 0, 0]), FOLDS)
    with pytest.raises(FusionError, match=r"labels lack the learners' classes \['well'\]"):
        gather([plain("one")], IMAGES, LABELS.drop(columns="well"), FOLDS)
