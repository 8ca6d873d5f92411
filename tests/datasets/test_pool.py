"""Several data sets as one: classes by scheme, counts of what is left out, and unique ids."""

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.classes import CLASS_SCHEMES, DIAGNOSES, scheme_classes
from kitlib.datasets.folds import find_leak_groups
from kitlib.datasets.pool import read_mask_pool, read_pool, sample_images
from kitlib.datasets.registry import read_dataset
from kitlib.datasets.selection import limit_diagnoses
from kitlib.phantoms.diagnoses import plan_diagnoses, write_diagnoses
from kitlib.phantoms.lungs import write_lungs
from kitlib.phantoms.nih import write_nih

SMALL = {"seed": 2, "images": 40, "side": 40, "progress": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {layout: write_diagnoses(folder, layout, **SMALL) for layout in ("kermany", "covid_chestxray")}


def planned(layout):
    return pd.Series([image.diagnosis for image in plan_diagnoses(layout, 40, seed=2) if not image.damaged])


def test_schemes_know_their_diagnoses_and_the_order_of_their_classes():
    assert all(set(scheme) <= set(DIAGNOSES) for scheme in CLASS_SCHEMES.values())
    assert scheme_classes("flannel") == ("COVID-19", "viral", "bacterial", "normal")
    assert scheme_classes("three") == ("normal", "pneumonia", "COVID-19")
    assert scheme_classes("covid") == ("COVID-19", "not COVID-19") and set(CLASS_SCHEMES["covid"]) == set(DIAGNOSES)
    with pytest.raises(ValueError, match="'four'; available: flannel, three, covid"):
        scheme_classes("four")


@pytest.mark.parametrize("scheme", CLASS_SCHEMES)
def test_labels_are_the_schemes_classes_and_the_rest_is_counted(scheme, parts):
    data = read_pool(parts, scheme, progress=False)
    expected = pd.concat([planned(layout) for layout in parts])
    classes = expected.map(CLASS_SCHEMES[scheme])
    labels = data.labels.set_index("id")
    assert tuple(labels) == scheme_classes(scheme) and (labels.sum(axis=1) == 1).all()
    assert labels.sum().astype(int).to_dict() == {name: int((classes == name).sum()) for name in scheme_classes(scheme)}
    assert data.images.study_id.equals(data.images.image_id) and set(data.images.source) == {"kermany", "ieee8023"}
    lost = data.faults[data.faults.problem.str.contains("has no class in")]
    left = [(layout, name) for layout in parts for name in sorted(set(planned(layout)) - set(CLASS_SCHEMES[scheme]))]
    assert list(zip(lost.file, lost["row"], strict=True)) == left
    assert sum(int(problem.split()[0]) for problem in lost.problem) == classes.isna().sum()
    # The readers' own faults: one damaged file in each, and what ieee8023's table has besides.
    assert data.faults.file.str.startswith(("kermany: ", "covid_chestxray: ")).sum() == 1 + 4
    assert len(set(find_leak_groups(data.images))) == data.images.patient_id.nunique()


def test_mask_sets_of_one_convention_are_pooled_and_others_refused(parts, tmp_path):
    sets = {layout: write_lungs(tmp_path, layout, **SMALL) for layout in ("montgomery", "shenzhen")}
    sets["darwin"] = write_lungs(tmp_path, "darwin", **SMALL | {"images": 4, "side": 320})
    data = read_mask_pool({name: sets[name] for name in ("montgomery", "shenzhen")}, progress=False)
    single = [read_dataset(name, sets[name], progress=False) for name in ("montgomery", "shenzhen")]
    assert len(data.images) == sum(len(each.images) for each in single) and set(data.images.source) == {
        "montgomery",
        "shenzhen",
    }
    assert set(data.masks.image_id) == {image_id for each in single for image_id in each.masks.image_id}
    assert data.masks.index.tolist() == list(range(sum(len(each.masks) for each in single)))
    assert data.labels.id.tolist() == data.images.study_id.tolist() and data.labels.notna().all(axis=None)
    assert (data.published["images"], data.published["masks"]) == (138 + 662, 138 + 566)
    with pytest.raises(ValueError, match=r"several conventions, .*: montgomery lung_fields, darwin with_heart\. Pool"):
        read_mask_pool({name: sets[name] for name in ("montgomery", "darwin")}, progress=False)
    with pytest.raises(ValueError, match="kermany has no masks; a pool without classes requires masks in every data set"):
        read_mask_pool({"kermany": parts["kermany"]}, progress=False)


def test_published_counts_are_those_that_all_sets_have(parts):
    assert read_pool({"kermany": parts["kermany"]}, "flannel", progress=False).published == {
        "viral": 1493,
        "bacterial": 2780,
        "normal": 1583,
    }
    data = read_pool({"kermany": parts["kermany"]}, "three", progress=False)
    # Kermany et al.: 1,493 + 2,780 = 4,273 of pneumonia.
    assert data.published == {"pneumonia": 4273, "normal": 1583}
    assert (
        data.faults["row"].tolist()[-1] == "COVID-19" and "there is no image of this class" in data.faults.problem.iloc[-1]
    )
    assert read_pool(parts, "flannel", progress=False).published == {}


def test_ids_that_clash_take_their_sets_name(tmp_path, parts):
    path = tmp_path / "train" / "NORMAL" / "IM-0001-0001.jpeg"
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.full((20, 20), 90, np.uint8))
    other = tmp_path / "ieee"
    (other / "images").mkdir(parents=True)
    row = {"finding": "COVID-19", "view": "PA", "modality": "X-ray", "patientid": "1"}
    for name in ("IM-0001-0001.png", "alone.png"):
        cv2.imwrite(str(other / "images" / name), np.full((20, 20), 90, np.uint8))
    pd.DataFrame([row | {"filename": name} for name in ("IM-0001-0001.png", "alone.png")]).to_csv(
        other / "metadata.csv", index=False
    )
    data = read_pool({"kermany": tmp_path, "covid_chestxray": other}, "flannel", progress=False)
    assert sorted(data.images.image_id) == ["alone", "covid_chestxray-IM-0001-0001", "kermany-IM-0001-0001"]
    assert data.labels.set_index("id").idxmax(axis=1).to_dict() == {
        "alone": "COVID-19",
        "covid_chestxray-IM-0001-0001": "COVID-19",
        "kermany-IM-0001-0001": "normal",
    }
    # Text columns that only one data set has are "" in the other, not NaN.
    assert set(data.images["part"]) == {"train", ""} and set(data.images.age_group) == {"child", ""}
    assert data.images.age.isna().all()  # a number remains NaN


def test_findings_are_converted_to_diagnoses_and_sets_without_them_are_refused(tmp_path, parts):
    nih = write_nih(tmp_path, images=40, side=32, seed=1, workers=1, progress=False)
    data = read_pool({"nih": nih, "covid_chestxray": parts["covid_chestxray"]}, "three", progress=False)
    of_nih = data.images[data.images.source == "nih"]
    # 45 in a hundred of the phantoms show nothing, 6 in a hundred Pneumonia.
    assert of_nih.diagnosis.value_counts().to_dict() == {"normal": 18, "pneumonia": 2}
    assert set(of_nih.split) == {"train", "test"} and set(data.images.split[data.images.source != "nih"]) == {"train"}
    darwin = write_lungs(tmp_path, "darwin", images=4, side=320, seed=1, workers=1, progress=False)
    with pytest.raises(ValueError, match=r"the data set darwin has no diagnoses.*converted to diagnoses: nih"):
        read_pool({"darwin": darwin}, "three", progress=False)
    with pytest.raises(ValueError, match="available: flannel"):
        read_pool(parts, "seven", progress=False)


def test_a_shortened_pool_has_a_share_of_every_source_and_diagnosis():
    kinds = [("a", "normal")] * 40 + [("a", "pneumonia")] * 20 + [("b", "COVID-19")] * 20
    images = pd.DataFrame(kinds, columns=["source", "diagnosis"]).assign(image_id=[f"i{n:02d}" for n in range(80)])
    some = sample_images(images, 20, seed=1)
    assert some.groupby(["source", "diagnosis"]).size().to_dict() == {
        **{("a", "normal"): 10, ("a", "pneumonia"): 5, ("b", "COVID-19"): 5}
    }
    assert some.image_id.is_monotonic_increasing
    again = sample_images(images[::-1].reset_index(drop=True), 20, seed=1)
    assert set(again.image_id) == set(some.image_id) != set(sample_images(images, 20, seed=2).image_id)
    pd.testing.assert_frame_equal(sample_images(images, 100), images)
    # Of ten images and a single one, every share up to a half is of the ten.
    few = images[30:41].reset_index(drop=True)
    assert [(sample_images(few, count).diagnosis == "pneumonia").sum() for count in (5, 6)] == [0, 1]
    assert sample_images(images, 20).equals(sample_images(images, 20, seed=0))


def test_a_diagnosis_can_be_limited():
    images = pd.DataFrame({"image_id": [f"i{n:02d}" for n in range(30)], "diagnosis": ["COVID-19"] * 20 + ["normal"] * 10})
    few = limit_diagnoses(images, {"COVID-19": 5, "normal": 0}, seed=1)
    assert few.diagnosis.value_counts().to_dict() == {"normal": 10, "COVID-19": 5} and few.image_id.is_monotonic_increasing
    again = limit_diagnoses(images[::-1].reset_index(drop=True), {"COVID-19": 5}, seed=1)
    assert set(again.image_id) == set(few.image_id) != set(limit_diagnoses(images, {"COVID-19": 5}, seed=2).image_id)
    assert limit_diagnoses(images, {"COVID-19": 5}).equals(limit_diagnoses(images, {"COVID-19": 5}, seed=0))
    for wrong in ({"viral": 5}, {"COVID-19": -1}, {"COVID-19": 2.5}):
        with pytest.raises(ValueError, match=r"'at_most' has (the diagnosis 'viral', but|-1 for|2\.5 for)"):
            limit_diagnoses(images, wrong)
