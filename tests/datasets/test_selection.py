"""Selection of images by the patient's age and by source."""

import numpy as np
import pandas as pd
import pytest

from kitlib.datasets.selection import leave_out_young, limit_sources

IMAGES = pd.DataFrame(
    {
        "image_id": list("abcdefgh"),
        "patient_id": ["p1", "p1", "p2", "p3", "p4", "p4", "p5", "p6"],
        "source": ["x"] * 6 + ["y"] * 2,
        "diagnosis": ["COVID-19", "COVID-19", *["normal"] * 6],
        "age": [17.9, 18, np.nan, 40, 5, 6, np.nan, 90],
    }
)


def test_children_are_left_out_and_unknown_ages_kept_and_counted():
    kept, counts = leave_out_young(IMAGES, 18)
    assert kept.equals(IMAGES.iloc[[1, 2, 3, 6, 7]].reset_index(drop=True))
    assert counts.to_numpy().tolist() == [["x", "COVID-19", 2, 1, 0], ["x", "normal", 4, 2, 1], ["y", "normal", 2, 0, 1]]
    # A data set without diagnoses is counted by source alone.
    kept, counts = leave_out_young(IMAGES.drop(columns="diagnosis"), 18)
    assert kept.image_id.tolist() == ["b", "c", "d", "g", "h"]
    assert counts.to_numpy().tolist() == [["x", 6, 3, 1], ["y", 2, 0, 1]]
    with pytest.raises(ValueError, match="all 8 images are of patients younger than 99"):
        leave_out_young(IMAGES.assign(age=7.0), 99)
    with pytest.raises(ValueError, match="states no ages; set least_age to 0"):
        leave_out_young(IMAGES.drop(columns="age"), 18)


def test_a_source_keeps_whole_patients_up_to_its_limit_whatever_the_order():
    for seed in range(4):
        kept = limit_sources(IMAGES, {"x": 3}, seed)
        chosen = kept[kept.source == "x"]
        assert 1 <= len(chosen) <= 3 and (kept.source == "y").sum() == 2
        assert len(chosen) == IMAGES.patient_id.isin(chosen.patient_id).sum()  # no patient is split
        assert set(limit_sources(IMAGES[::-1], {"x": 3}, seed).image_id) == set(kept.image_id)
        assert limit_sources(IMAGES, {"x": 6, "y": 2}, seed).equals(IMAGES)  # all images of x and y
        assert limit_sources(IMAGES, {"x": 0}, seed).equals(IMAGES[6:].reset_index(drop=True))
    assert limit_sources(IMAGES, {}, 0).equals(IMAGES)
    with pytest.raises(ValueError, match=r"'most_of' has the sources \['z'\], but the images have \['x', 'y'\]"):
        limit_sources(IMAGES, {"z": 1}, 0)
