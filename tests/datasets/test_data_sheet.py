"""The data sheet's counts, and each of its flags, on examples computed by hand."""

import numpy as np
import pandas as pd
import pytest

from kitlib.datasets.data_sheet import are_exclusive, data_sheet_figure, group_ages, make_data_sheet
from kitlib.xrays.modality import NOT_AN_XRAY

CLASSES = ["COVID-19", "normal"]


def tables(classes, **columns):
    """Return images and labels with one image per study and patient, by default of one source."""
    ids = [f"i{place}" for place in range(len(classes))]
    images = pd.DataFrame({"image_id": ids, "study_id": ids, "patient_id": ids, "path": "x.png", "rows": 9, "columns": 9})
    images = images.assign(**{"source": "a", "view": "PA"} | columns)
    labels = pd.DataFrame({"id": ids, **{name: [float(each == name) for each in classes] for name in CLASSES}})
    return images, labels


def kinds(sheet):
    return list(zip(sheet.flags.kind, sheet.flags.which, strict=True))


def test_counts_by_source_view_sex_and_age():
    images, labels = tables(
        ["COVID-19", "COVID-19", "normal", "normal"],
        **{"source": list("aabb"), "view": ["PA", "", "AP", "PA"], "sex": ["M", "F", "", "M"]},
        **{"age": [17.9, 18, np.nan, 65], "age_group": ["", "", "child", ""]},
    )
    sheet = make_data_sheet(images, labels)
    assert sheet.tables["source"].to_dict("index") == {"COVID-19": {"a": 2, "b": 0}, "normal": {"a": 0, "b": 2}}
    assert sheet.tables["view"].to_dict("index")["COVID-19"] == {"AP": 0, "PA": 1, "unknown": 1}
    assert sheet.tables["sex"].to_dict("index")["normal"] == {"F": 0, "M": 1, "unknown": 1}
    assert list(sheet.tables["age"]) == ["0-17", "18-39", "65+"]
    assert sheet.tables["age"].to_dict("index")["normal"] == {"0-17": 1, "18-39": 0, "65+": 1}
    assert all(table.to_numpy().sum() == 4 and list(table.index) == CLASSES for table in sheet.tables.values())
    for name, table in sheet.tables.items():
        assert (table.index.name, table.columns.name) == ("class", name)
    panel = data_sheet_figure(sheet).axes[1]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["normal (2)", "COVID-19 (2)"]
    # The shares of AP, PA and unknown of both classes: where each bar's part begins, and how long it is.
    assert panel.get_xlim() == (0, 1)
    parts = [[(bar.get_x(), bar.get_width()) for bar in part if bar.get_width()] for part in panel.containers]
    assert parts == [[(0, 0.5)], [(0.5, 0.5), (0, 0.5)], [(0.5, 0.5)]]
    # Images of unknown sex are counted, too, whether the cell is empty or NaN or the column is missing.
    for other in (images.assign(sex=["M", np.nan, "", "M"]), images.drop(columns="sex")):
        assert make_data_sheet(other, labels).tables["sex"].to_numpy().sum() == 4


def test_ages_at_the_edges_of_their_groups():
    images, _ = tables(["normal"] * 7, age=[0, 17.9, 18, 39.9, 40, 65, np.nan])
    assert group_ages(images).tolist() == ["0-17", "0-17", "18-39", "18-39", "40-64", "65+", "unknown"]
    assert set(group_ages(images.drop(columns="age"))) == {"unknown"}


def test_a_class_from_one_source_is_flagged():
    # 19 of 20 COVID-19 images are 95 % of a's 20 images; the source predicts 38 of 40 correctly, one class 20.
    images, labels = tables(["COVID-19"] * 20 + ["normal"] * 20, source=["a"] * 19 + ["b"] * 20 + ["a"])
    sheet = make_data_sheet(images, labels)
    assert kinds(sheet) == [("one source", "COVID-19"), ("one source", "normal"), ("one source", "")]
    assert "95.0% of this class's 20 images are from a, and 95.0% of the images from there" in sheet.flags.problem[0]
    assert "source alone is right for 95.0% of the images; " in sheet.flags.problem[2]
    assert sheet.flags.problem[2].endswith("most frequent class is right for 50.0%")
    images.loc[18, "source"] = "b"
    assert kinds(make_data_sheet(images, labels))[0] == ("one source", "normal")
    # One image is enough. The source is right for i0 or i1, i2 and i3; three of four images are of one class.
    images, labels = tables(["COVID-19", "normal", "normal", "normal"], source=list("aabb"))
    sheet = make_data_sheet(images, labels)
    assert kinds(sheet) == [("one source", "COVID-19"), ("one source", "")]
    of_class, of_all = sheet.flags.problem
    assert of_class.startswith("100.0% of this class's 1 images are from a, and 50.0% of the images from there")
    assert "right for 75.0% of the images; always predicting the most frequent class is right for 75.0%" in of_all
    # A single source is not flagged.
    assert make_data_sheet(images.assign(source="a"), labels).flags.empty


def test_children_among_adults_are_flagged():
    # 19 of 20 are children in one class, and 1 of 20 in the other; a third class has no known age.
    ages = [*[50.0] * 19, 10.0, *[np.nan] * 19, 30.0, np.nan]
    groups = [""] * 20 + ["child"] * 19 + [""] * 2
    images, labels = tables(["COVID-19"] * 20 + ["normal"] * 20 + ["other"], age=ages, age_group=groups)
    labels["other"] = [0.0] * 40 + [1.0]
    sheet = make_data_sheet(images, labels)
    assert kinds(sheet) == [("children among adults", "normal")]
    problem = sheet.flags.problem[0]
    assert problem.startswith("95.0% of this class's images") and "image of COVID-19 does" in problem
    # Children in both classes, or in neither, are not flagged.
    assert make_data_sheet(images.assign(age=4.0), labels).flags.empty
    assert make_data_sheet(images.assign(age=40.0), labels).flags.empty
    # Unknown ages are not flagged.
    assert make_data_sheet(images.assign(age=np.nan, age_group=""), labels).flags.empty


def test_images_of_other_modalities_are_counted_by_class():
    images, labels = tables(["COVID-19"] * 3 + ["normal"] * 2)
    of_ct, of_mr = (f"{NOT_AN_XRAY}: Modality {name}" for name in ("CT", "MR"))
    warnings = [("another", of_ct), (of_ct,), (), (of_mr,), ("another",)]
    decoding = pd.DataFrame({"image_id": [*images.image_id, "failed"], "warnings": [*warnings, ()]})
    sheet = make_data_sheet(images, labels, decoding=decoding)
    assert kinds(sheet) == [("not an X-ray", "COVID-19"), ("not an X-ray", "normal")]
    assert sheet.flags.problem[0] == "2 images of this class: not a projection X-ray: Modality CT"
    assert make_data_sheet(images, labels, decoding=decoding.assign(warnings=[()] * 6)).flags.empty


def test_leaks_and_missing_classes_are_flagged():
    images, labels = tables(["COVID-19", "normal", "normal", "normal", "COVID-19"])
    images["split"] = ["train"] * 4 + ["test"]
    folds = pd.DataFrame({"id": ["i0", "i1", "i2", "i3"], "fold": [0, 0, 1, 1]})
    near = pd.DataFrame({"image_id": ["i0", "i4", "i2", "i3"], "group": [1, 1, 2, 2]})
    sheet = make_data_sheet(images, labels, folds, near)
    assert kinds(sheet) == [("leak", ""), ("class missing", "fold 1"), ("class missing", "the test set")]
    assert sheet.flags.problem.tolist() == [
        "groups of near-duplicates in several folds, or in a fold and the test set: 1; "
        "the first: i0 in fold 0, i4 in the test set",
        "has no image of COVID-19",
        "has no image of normal",
    ]
    images.loc[1:2, "patient_id"] = "same"
    assert (
        "patients in several folds, or in a fold and the test set: 1; the first: i1 in fold 0, i2 in fold 1"
        in make_data_sheet(images, labels, folds).flags.problem.iloc[0]
    )


def test_an_empty_class_and_labels_that_are_not_exclusive():
    images, labels = tables(["normal", "normal"])
    folds = pd.DataFrame({"id": images.image_id, "fold": [0, 1]})
    assert kinds(make_data_sheet(images, labels, folds)) == [
        ("no image", "COVID-19"),
        ("class missing", "fold 0"),
        ("class missing", "fold 1"),
    ]
    for wrong in (
        labels.assign(normal=0.0),
        labels.assign(normal=np.nan),
        labels.assign(**{"COVID-19": 1.0}),
        labels[["id", "normal"]],
    ):
        assert not are_exclusive(wrong)
        with pytest.raises(ValueError, match="not exclusive"):
            make_data_sheet(images, wrong)
