"""Folds never separate a patient's images, and are as similar as whole patients allow."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.classes import STUDY_CLASSES
from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.folds import (
    check_no_leak,
    find_leak_groups,
    hold_out_sources,
    hold_out_test,
    make_folds,
    make_source_folds,
)
from kitlib.datasets.siim import read_label_tables
from kitlib.errors import DatasetError


def tables(patients: list[int], classes: list[int], boxed: list[bool]):
    """Return images, labels and boxes with one image per study."""
    count = len(patients)
    images = pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(count)],
            "study_id": [f"s{k}" for k in range(count)],
            "patient_id": [f"p{patient}" for patient in patients],
            "path": "x.dcm",
            "rows": 10,
            "columns": 12,
            "source": "siim",
            "view": "PA",
            "false_none": False,
        }
    )
    labels = pd.DataFrame(np.eye(4)[classes], columns=list(STUDY_CLASSES)).assign(id=images.study_id)
    boxes = images[["image_id"]][boxed].assign(xmin=1.0, ymin=1.0, xmax=5.0, ymax=5.0)
    return images, labels, boxes


@st.composite
def sets(draw, smallest: int = 12):
    count = draw(st.integers(smallest, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    patients = [*range(6), *rng.integers(0, draw(st.integers(6, 60)), count - 6)]
    return tables(patients, rng.integers(0, 4, count).tolist(), (rng.random(count) < 0.6).tolist()), rng


@settings(max_examples=12, deadline=None)
@given(sets(), st.integers(2, 5), st.integers(0, 100))
def test_nothing_leaks_and_nothing_is_lost(drawn, n_folds, seed):
    (images, labels, boxes), rng = drawn
    near = images[["image_id"]].assign(group=rng.integers(0, len(images), len(images)))
    images.loc[images.index[-1], "false_none"] = True
    kept = images[~images.false_none]
    if len(set(find_leak_groups(kept, near))) < n_folds:
        return
    folds = make_folds(images, labels, boxes, n_folds, seed, near)
    assert sorted(folds.id) == sorted(kept.image_id)
    assert set(folds.fold) == set(range(n_folds))
    for column, table in (("patient_id", kept), ("group", near)):
        assert folds.merge(table, left_on="id", right_on="image_id").groupby(column).fold.nunique().max() == 1
    shuffled = [table.sample(frac=1, random_state=1) for table in (images, labels, boxes)]
    pd.testing.assert_frame_equal(make_folds(*shuffled, n_folds, seed, near.sample(frac=1, random_state=1)), folds)


@settings(max_examples=12, deadline=None)
@given(sets(), st.integers(2, 5))
def test_single_image_patients_spread_evenly(drawn, n_folds):
    """Without shared patients, the numbers of images of a class differ by at most one between folds."""
    (images, labels, boxes), _ = drawn
    images["patient_id"] = images.image_id
    folds = make_folds(images, labels, boxes[:0], n_folds)
    classes = labels.set_index("id").idxmax(axis=1).loc["s" + folds.id.str[1:]].to_numpy()
    counts = pd.crosstab(classes, folds.fold).to_numpy()
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def test_groups_connect_through_chains():
    """a and b share a patient, b and c are near-duplicates, c and d share a patient; e is on its own."""
    images = pd.DataFrame(
        {"image_id": list("abcde"), "study_id": list("12345"), "patient_id": ["p1", "p1", "p2", "p2", "p3"]}
    )
    near = pd.DataFrame({"image_id": list("bcde"), "group": [7, 7, 8, 9]})
    groups = find_leak_groups(images, near)
    assert len(set(groups[:4])) == 1 and groups[4] != groups[0]
    assert len(set(find_leak_groups(images))) == 3


@settings(max_examples=12, deadline=None)
@given(sets(smallest=20), st.integers(2, 3), st.integers(0, 100))
def test_a_study_whose_files_state_two_patients_is_in_one_fold(drawn, n_folds, seed):
    (images, labels, boxes), _ = drawn
    # Each of six images is in the study of another image, which has its own patient.
    images["study_id"] = [f"s{k - 6 if 6 <= k < 12 else k}" for k in range(len(images))]
    if len(set(find_leak_groups(images))) < n_folds:
        return
    folds = make_folds(images, labels, boxes, n_folds, seed)
    merged = folds.merge(images, left_on="id", right_on="image_id")
    assert merged.groupby("study_id").fold.nunique().max() == merged.groupby("patient_id").fold.nunique().max() == 1
    torn = folds.assign(fold=range(len(folds)))
    with pytest.raises(DatasetError, match="in several folds"):
        check_no_leak(torn, images.assign(patient_id=images.image_id))


def test_a_study_of_two_patients_is_a_fault(tmp_path):
    images, labels, _ = tables([0, 1, 2, 3], [0, 1, 2, 3], [False] * 4)
    images["study_id"] = ["s0", "s0", "s2", "s3"]
    data = Dataset.from_tables(DataFolder(tmp_path), images, labels)
    assert data.faults.to_numpy().tolist() == [
        [tmp_path.name, "s0", "the study's images have the patient ids p0, p1; these patients share a fold"]
    ]


def test_a_leak_names_the_patient():
    images, labels, boxes = tables([1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1], [True] * 6)
    folds = make_folds(images, labels, boxes, 2)
    check_no_leak(folds, images)
    folds.loc[folds.id == "i0", "fold"] = 1 - folds.fold[folds.id == "i0"]
    with pytest.raises(DatasetError, match=r"1 patients are in several folds, such as p1 \(i0 in fold"):
        check_no_leak(folds, images)


def test_a_leak_through_near_duplicates_is_found():
    images, labels, boxes = tables([1, 2, 3, 4], [0, 1, 2, 3], [True] * 4)
    folds = make_folds(images, labels, boxes, 4)
    check_no_leak(folds, images, pd.DataFrame({"image_id": ["i0", "i3"], "group": [0, 1]}))
    with pytest.raises(DatasetError, match="near-duplicate"):
        check_no_leak(folds, images, pd.DataFrame({"image_id": ["i0", "i3"], "group": [0, 0]}))


def test_a_fold_of_an_unknown_image_is_a_leak():
    images, labels, boxes = tables([1, 2, 3, 4], [0, 1, 2, 3], [True] * 4)
    with pytest.raises(DatasetError, match="1 images in the folds are not in the `images` table; the first is 'i2'"):
        check_no_leak(make_folds(images, labels, boxes, 2), images[images.image_id != "i2"])


@pytest.mark.parametrize(
    ("patients", "n_folds", "choice"),
    [
        *[([1, 1, 2, 3], n_folds, "choose from 2 to 3 folds") for n_folds in (0, 1, 4)],
        ([1, 1, 2, 2], 3, "choose from 2 to 2 folds"),
        ([1, 1, 1, 1], 1, "at least two groups are needed"),
    ],
)
def test_impossible_numbers_of_folds_are_refused(patients, n_folds, choice):
    images, labels, boxes = tables(patients, [0, 1, 2, 3], [True] * 4)
    message = f"{len(set(patients))} groups of patients cannot be divided into {n_folds} folds: {choice}"
    with pytest.raises(ValueError, match=message):
        make_folds(images, labels, boxes, n_folds)
    with pytest.raises(ValueError, match="0 groups of patients cannot be divided into 2 folds: at least two groups"):
        make_folds(images.assign(false_none=True), labels, boxes, 2)


def test_a_study_without_label_is_refused():
    images, labels, boxes = tables([1, 2, 3], [0, 1, 2], [True] * 3)
    with pytest.raises(ValueError, match="1 studies have no label, such as 's1'"):
        make_folds(images, labels[labels.id != "s1"], boxes, 2)


@settings(max_examples=12, deadline=None)
@given(sets(), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 100))
def test_held_out_images_share_nothing_with_the_rest(drawn, share, seed):
    (images, labels, _), rng = drawn
    near = images[["image_id"]].assign(group=rng.integers(0, len(images), len(images)))
    images.loc[images.index[-1], "false_none"] = True
    if len(set(find_leak_groups(images[~images.false_none], near))) < 6:
        return
    parted = hold_out_test(images, labels, share, seed, near)
    assert parted.image_id.equals(images.image_id) and set(parted.split) == {"train", "test"}
    assert parted.split.iloc[-1] == "train"
    looked_at = parted[~parted.false_none].merge(near, on="image_id")
    for column in ("patient_id", "group"):
        assert looked_at.groupby(column).split.nunique().max() == 1
    again = hold_out_test(images.sample(frac=1, random_state=1), labels, share, seed, near)
    assert again.set_index("image_id").split.to_dict() == parted.set_index("image_id").split.to_dict()


def test_a_tenth_held_out_and_nine_folds_are_80_10_10():
    """500 patients of one image each; classes of 320, 100, 60 and 20 have a tenth of their images in each part."""
    classes = np.repeat(range(4), (320, 100, 60, 20))
    images, labels, boxes = tables(list(range(500)), classes.tolist(), [False] * 500)
    parted = hold_out_test(images, labels, 0.1, 3)
    test = parted.split == "test"
    assert np.bincount(classes[test]).tolist() == [32, 10, 6, 2]
    folds = make_folds(parted, labels, boxes, 9, 3)
    assert set(folds.id) == set(images.image_id[~test])
    counts = pd.crosstab(folds.id.str[1:].astype(int).map(dict(enumerate(classes))), folds.fold).to_numpy()
    assert counts.tolist() == [[32] * 9, [10] * 9, [6] * 9, [2] * 9]


def test_boxed_images_are_spread_evenly_and_the_seed_is_0_unless_stated():
    images, labels, boxes = tables(list(range(32)), [0, 1] * 16, [False] * 16 + [True] * 16)
    folds = make_folds(images, labels, boxes, 4)
    # 8 images of each class with a box, and 8 without.
    number = folds.id.str[1:].astype(int)
    assert (pd.crosstab([number % 2, number >= 16], folds.fold) == 2).all(axis=None)
    parted = hold_out_test(images, labels, 0.5)
    for seed in (0, 1):
        assert make_folds(images, labels, boxes, 4, seed).equals(folds) == (seed == 0)
        assert hold_out_test(images, labels, 0.5, seed).equals(parted) == (seed == 0)


def test_a_rare_class_is_divided_before_a_frequent_one():
    """Of 20, 2 and 2 images of three classes, each fold gets one of the second, also that with more of the first so far."""
    patients = [0] * 4 + [1] * 3 + [2] * 2 + list(range(3, 18))
    images, labels, boxes = tables(patients, [0] * 4 + [1, 2, 2] + [0, 1] + [0] * 15, [False] * 24)
    folds = make_folds(images, labels, boxes, 2).set_index("id").fold
    assert {folds["i4"], folds["i8"]} == {0, 1}
    assert folds[[f"i{number}" for number in (0, 1, 2, 3, 7, *range(9, 24))]].value_counts().tolist() == [10, 10]


@pytest.mark.parametrize(
    ("sizes", "share", "count"),
    [
        ([6, 2, 1, 1], 0.1, 1),  # a tenth of ten images, although a patient has two
        ([9, 1], 0.01, 1),  # neither side is empty, and the patient with the fewest images moves
        ([9, 1], 0.99, 9),
    ],
)
def test_few_patients_of_different_sizes_are_divided_near_the_share(sizes, share, count):
    patients = np.repeat(range(len(sizes)), sizes).tolist()
    images, labels, _ = tables(patients, [0] * len(patients), [False] * len(patients))
    assert (hold_out_test(images, labels, share).split == "test").sum() == count


def test_a_source_is_held_out_with_all_that_is_linked_to_it():
    images = tables([0, 0, 1, 2, 3], [0, 0, 0, 1, 1], [False] * 5)[0]
    images = images.assign(source=["b", "a", "b", "a", "a"])
    # Image 1 is of image 0's patient, image 3 a near-duplicate of image 2.
    near = pd.DataFrame({"image_id": images.image_id, "group": [0, 1, 2, 2, 3]})
    assert hold_out_sources(images, ["b"], near)["split"].tolist() == ["test"] * 4 + ["train"]
    kept = hold_out_sources(images.assign(split=["train"] * 4 + ["test"]), ["b"])["split"].tolist()
    assert kept == ["test", "test", "test", "train", "test"]
    with pytest.raises(ValueError, match="no image is from c; available sources: a, b"):
        hold_out_sources(images, ["c"])
    with pytest.raises(ValueError, match="no image remains to train on"):
        hold_out_sources(images, ["a", "b"])


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_an_impossible_share_is_refused(share):
    images, labels, _ = tables([0, 1, 2], [0, 1, 2], [False] * 3)
    with pytest.raises(ValueError, match=f"share of test images is {share}"):
        hold_out_test(images, labels, share)
    with pytest.raises(ValueError, match="requires two or more groups of patients; the images have 1"):
        hold_out_test(images.assign(patient_id="p"), labels, 0.5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.sampled_from([0.01, 0.1, 0.5, 0.99]), st.integers(0, 9))
def test_a_test_set_can_be_held_out_of_any_two_groups(sizes, share, seed):
    patients = np.repeat(range(len(sizes)), sizes).tolist()
    images, labels, _ = tables(patients, [0] * len(patients), [False] * len(patients))
    split = hold_out_test(images, labels, share, seed).groupby("patient_id").split.agg(set)
    assert set(map(len, split)) == {1} and set().union(*split) == {"train", "test"}


@pytest.mark.parametrize(("others", "refused"), [(9, True), (10, False), (11, False)])
def test_an_id_that_most_studies_share_is_no_patient(others, refused):
    """Ten of 19 studies are most of them; ten of 20 are not."""
    images, labels, boxes = tables([0] * 10 + list(range(1, others + 1)), [0] * (10 + others), [False] * (10 + others))
    for make in (
        lambda table: make_folds(table, labels, boxes, 2),
        lambda table: hold_out_test(table, labels, 0.3),
        lambda table: make_source_folds(table.assign(source=["a"] * 10 + ["b"] * others)),
    ):
        if refused:
            with pytest.raises(DatasetError, match=r"10 of 19 studies have the patient id 'p0'.*set folds_by to \"study\""):
                make(images)
        else:
            make(images)
        make(images.assign(patient_id=images.study_id))  # what folds_by: study does


def test_a_source_is_a_fold_and_shared_patients_are_in_none():
    images, *_ = tables([0, 1, 2, 2, 3, 4, 5], [0] * 7, [False] * 7)
    images["source"] = ["b", "a", "a", "b", "c", "c", "b"]
    # Patient 2 is in both a and b; i5 is a near-duplicate of i6, of another source.
    near = pd.DataFrame({"image_id": ["i5", "i6", "i4"], "group": [1, 1, 2]})
    folds = make_source_folds(images, near)
    assert folds.set_index("id").fold.to_dict() == {"i0": 1, "i1": 0, "i4": 2}
    assert make_source_folds(images.assign(split=["test", *["train"] * 6]), None).set_index("id").fold.to_dict() == {
        "i1": 0,
        "i4": 2,
        "i5": 2,
        "i6": 1,
    }
    with pytest.raises(ValueError, match="from the source a: "):
        make_source_folds(images.assign(source="a"))
    images.loc[2:3, "source"] = ["b", "d"]
    with pytest.raises(ValueError, match="no image of d can be in a fold"):
        make_source_folds(images)


@pytest.mark.real_data
@pytest.mark.parametrize("seed", [0, 1])
def test_on_the_real_tables_shares_are_within_two_points(real_data, seed):
    """6,334 images less 217 false `none`; 3,261 patients (shared/facts/siim-competition.md)."""
    labels, boxes, rows = read_label_tables(real_data / "siim_csv")
    known = pd.read_csv(real_data / "siim_csv" / "train_images_ext.csv")
    known = known.rename(columns={"width": "columns", "height": "rows"})[["image_id", "patient_id", "rows", "columns"]]
    images = rows.merge(known, on="image_id").assign(path="x.dcm", source="siim", view="")
    assert images.patient_id.nunique() == 3261
    folds = make_folds(images, labels, boxes, 5, seed)
    assert len(folds) == 6117
    placed = folds.merge(images, left_on="id", right_on="image_id").merge(
        labels.rename(columns={"id": "study_id"}), on="study_id"
    )
    assert placed.groupby("patient_id").fold.nunique().max() == 1
    placed["boxed"] = placed.image_id.isin(boxes.image_id)
    for units in (placed, placed.drop_duplicates("study_id")):
        shares = units.groupby("fold")[[*STUDY_CLASSES, "boxed"]].mean()
        assert (shares - units[[*STUDY_CLASSES, "boxed"]].mean()).abs().to_numpy().max() < 0.02
