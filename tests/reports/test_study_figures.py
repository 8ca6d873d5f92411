"""Which studies the figure shows, and the text above them."""

import pandas as pd

from kitlib.classes import STUDY_CLASSES
from kitlib.reports.study_figures import study_examples
from tests.small_xrays import SmallXrays

SMALL = SmallXrays(32)


def scores(sure):
    """Study scores that give the true class `sure[study]` and the rest to the next class; `none` is right with 0.8."""
    truth = SMALL.labels.set_index("id")
    rows = []
    for study_id, share in sure.items():
        probabilities = truth.loc[study_id].to_numpy(float)
        values = (
            share * probabilities + (1 - share) * pd.Series(probabilities).shift(1, fill_value=probabilities[-1]).to_numpy()
        )
        rows.append({"study_id": study_id, "model": "small", "fold": 0, **dict(zip(STUDY_CLASSES, values, strict=True))})
    with_box = set(SMALL.boxes.image_id)
    shown = SMALL.images[SMALL.images.study_id.isin(sure)]
    none = [0.2 if image_id in with_box else 0.8 for image_id in shown.image_id]
    images = pd.DataFrame({"image_id": shown.image_id, "model": "small", "fold": 0, "none": none})
    return pd.DataFrame(rows), images


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def draw(studies, images, **options):
    return study_examples(SMALL, SMALL.images, SMALL.labels, SMALL.boxes, studies, images, **options)


def test_the_most_confident_studies_come_first_and_the_least_confident_below():
    # Studies 0, 1, 2, 3 are negative, typical, indeterminate, atypical, with two images each.
    studies, images = scores({"study000": 0.9, "study001": 0.2, "study002": 0.7, "study003": 0.4})
    figure = draw(studies, images, count=2)
    # Images of negative studies have no box, all others have one.
    assert [len(axis.patches) for axis in figure.axes] == [0, 1, 1, 1]
    assert [axis.get_subplotspec().rowspan.start for axis in figure.axes] == [0, 0, 1, 1]
    shown = titles(figure)
    assert [title.splitlines()[0] for title in shown] == ["image000", "image004", "image002", "image006"]
    assert shown[0].splitlines()[1] == "ground truth: negative, no box" and shown[0].endswith("none 0.80")
    assert shown[2].splitlines()[1:3] == ["ground truth: typical, boxes", "predicted: indeterminate 0.80  typical 0.20"]
    # Two of four fill the first row; of three, the second row has one.
    shown = [axis.get_title().splitlines()[0] for axis in draw(studies, images, count=3).axes[:4]]
    assert shown == ["image000", "image004", "image006", "image002"]


def test_probabilities_of_several_models_are_averaged_and_unknown_labels_are_left_out():
    studies, images = scores({"study000": 0.9, "study001": 0.2, "study002": 0.7})
    twice = pd.concat([studies, studies.assign(model="other", negative=0.1)])
    shown = titles(draw(twice, pd.concat([images, images.assign(none=0.4)]), count=2))
    assert shown[1].splitlines()[2:] == ["predicted: negative 0.50  typical 0.10", "predicted: none 0.60"]
    labels = SMALL.labels.assign(typical=SMALL.labels["typical"].where(SMALL.labels["id"] != "study000"))
    figure = study_examples(SMALL, SMALL.images, labels, SMALL.boxes, studies, images)
    assert [title.splitlines()[0] for title in titles(figure)] == ["image004", "image002"]


def test_without_study_scores_the_probability_that_there_is_no_opacity_decides_the_order():
    studies, images = scores({"study000": 0.9, "study001": 0.2, "study002": 0.7})
    by_image = {"image000": 0.3, "image002": 0.1, "image004": 0.5}
    images = images[images["image_id"].isin(by_image)].assign(none=list(by_image.values()))
    # image000 has no box and image002 and image004 have one, so that none is right with 0.3, and wrong with 0.1 and 0.5.
    shown = [title.splitlines()[0] for title in titles(draw(studies.iloc[:0], images))]
    assert shown == ["image002", "image004", "image000"]


def test_a_model_with_one_output_and_a_few_studies_can_be_shown():
    studies, images = scores({"study000": 0.9, "study001": 0.2})
    nothing = studies.iloc[:0], images.iloc[:0]
    assert len(titles(draw(studies, nothing[1]))) == 2
    assert titles(draw(nothing[0], images))[0] == "image000\nground truth: negative, no box\npredicted: none 0.80"
    assert titles(draw(*nothing)) == []
