import numpy as np
import pandas as pd
import pytest

from kitlib.reports.competition import bootstrap
from kitlib.reports.detection_report import detection_draws, interval
from kitlib.scoring.score import truth_of


@pytest.fixture
def tables():
    rng = np.random.default_rng(0)
    image_ids = [f"i{number:02d}" for number in range(40)]
    images = pd.DataFrame({"image_id": image_ids, "study_id": image_ids, "patient_id": [name[:2] for name in image_ids]})
    corner = rng.uniform(0, 50, (20, 2))
    boxes = pd.DataFrame(np.hstack([corner, corner + 40]), columns=["xmin", "ymin", "xmax", "ymax"])
    boxes.insert(0, "image_id", image_ids[:20])
    moved = boxes.assign(xmin=boxes.xmin + rng.uniform(0, 25, 20), score=rng.uniform(size=20))
    false = moved.assign(image_id=image_ids[20:], score=rng.uniform(size=20))
    detections = pd.concat([moved, false], ignore_index=True)
    return detections, pd.DataFrame({"image_id": image_ids}), images, boxes


def test_it_is_the_report_s_opacity_precision(tables):
    detections, coverage, images, boxes = tables
    labels = pd.DataFrame({"id": images.study_id, "negative": 1.0, "typical": 0.0, "indeterminate": 0.0, "atypical": 0.0})
    studies, nones = labels.rename(columns={"id": "study_id"}), images[["image_id"]].assign(none=0.5)
    whole = bootstrap(truth_of(images, labels, boxes), studies, nones, detections, images, samples=2)
    draws = detection_draws(detections, coverage, images, boxes, samples=2)
    assert draws[0] == pytest.approx(whole.set_index("name").value["opacity"])


def test_an_image_without_a_box_is_a_place_for_false_positives(tables):
    detections, coverage, images, boxes = tables
    boxed = coverage[coverage.image_id.isin(boxes.image_id)]
    assert (
        detection_draws(detections, coverage, images, boxes, 0)[0] < detection_draws(detections, boxed, images, boxes, 0)[0]
    )


def test_one_seed_draws_the_same_patients_for_every_detector(tables):
    detections, coverage, images, boxes = tables
    once = detection_draws(detections, coverage, images, boxes, 50)
    again = detection_draws(detections.sample(frac=1, random_state=1), coverage.iloc[::-1], images, boxes, 50)
    assert interval(once - again) == {"value": 0.0, "low": 0.0, "high": 0.0}
    told = interval(once)
    assert told["low"] < told["value"] < told["high"]


def test_an_image_looked_at_twice_is_refused(tables):
    detections, coverage, images, boxes = tables
    with pytest.raises(ValueError, match="looked at twice"):
        detection_draws(detections, pd.concat([coverage, coverage]), images, boxes)
