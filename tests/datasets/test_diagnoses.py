"""A data set whose images have one diagnosis each: which diagnoses are valid, and how sexes and ages are read."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.diagnoses import diagnosis_dataset, parse_ages, parse_sexes
from kitlib.datasets.faults import Faults


def test_each_diagnosis_is_one_of_the_data_set_and_of_the_kit(tmp_path):
    rows = pd.DataFrame({"image_id": ["b", "a"], "patient_id": ["p", "q"], "diagnosis": ["normal", "COVID-19"]})
    rows = rows.assign(path=[f"{tmp_path}/{name}.png" for name in "ba"], source="s", view="")
    for path in rows.path:
        cv2.imwrite(path, np.zeros((4, 5), np.uint8))
    data = diagnosis_dataset(rows, DataFolder(tmp_path), ("normal", "viral", "COVID-19"), "get it", progress=False)
    assert data.labels.to_numpy().tolist() == [["a", 0, 0, 1], ["b", 1, 0, 0]]
    assert data.images.patient_id.tolist() == ["q", "p"]
    assert data.faults.empty and data.published == {}
    for diagnoses, invalid in ((("normal",), "COVID-19"), (("normal", "COVID-19", "flu"), "flu")):
        with pytest.raises(ValueError, match=rf"unknown diagnoses \['{invalid}'\]; valid: normal"):
            diagnosis_dataset(rows, DataFolder(tmp_path), diagnoses, "get it", progress=False)


def test_sexes_begin_with_m_or_f_and_ages_are_0_to_130():
    assert parse_sexes(pd.Series([" male", "F", "female", "M", "other", "", "xm"])) == ["M", "F", "F", "M", "", "", ""]
    faults, cells = Faults(), pd.Series([" 0 ", "0.5", "130", "131", "-1", "x", " "])
    ages = parse_ages(cells, pd.Series(list("gfedcba")), faults, "t.csv")
    np.testing.assert_array_equal(ages, [0, 0.5, 130, *[np.nan] * 4])
    problem = "and 2 others have an age that is not a number of years; the age is unknown"
    assert faults.rows == [("t.csv", "b", problem)]
