"""COVIDx, COVIDGR-1.0, MIDRC-RICORD-1C and BIMCV-COVID19, on small layouts written by the tests."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest

from kitlib.datasets.bimcv import read_bimcv
from kitlib.datasets.covidgr import read_covidgr
from kitlib.datasets.covidx import read_covidx
from kitlib.datasets.pool import read_pool
from kitlib.datasets.ricord import read_ricord
from kitlib.datasets.rsna import MAPPING
from kitlib.errors import DatasetError
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.image_file import decode_image
from kitlib.xrays.writing import write_xray

pytestmark = pytest.mark.usefixtures("quick_processes")


def save(path, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((side, side + 2), 90, np.uint8))


def test_covidx_lists_of_four_columns(tmp_path):
    lines = {
        "train": ["3 SARS day0.jpeg pneumonia cohen", "sub-S03047 a.png COVID-19 bimcv", "x a.png normal rsna", "what"],
        "test": ["419639-000002 MIDRC-RICORD-1C-419639-000002-10161-0.png positive ricord", "8 b.png negative rsna"],
    }
    for part, of_part in lines.items():
        (tmp_path / f"{part}_COVIDx5.txt").write_text("\n".join(of_part) + "\n")
        for line in of_part:
            if " " in line and "b.png" not in line:
                save(tmp_path / part / line.split(" ", 1)[1].rsplit(" ", 2)[0])
    data = read_covidx(tmp_path, progress=False)
    images = data.images.set_index("image_id")
    assert images.diagnosis.to_dict() == {
        "SARS day0": "pneumonia",
        "a": "COVID-19",
        "MIDRC-RICORD-1C-419639-000002-10161-0": "COVID-19",
    }
    assert sorted(images.patient_id) == ["bimcv-S03047", "ieee-3", "ricord-419639-000002"]
    assert sorted(images.source) == ["bimcv", "ieee8023", "ricord"] and images.split.value_counts().to_dict() == {
        "train": 2,
        "test": 1,
    }
    assert sorted(data.faults["row"]) == ["4", "a.png", "test/b.png"]


def test_covidx_older_lists_and_several(tmp_path):
    (tmp_path / "train.txt").write_text("patientid filename class\n1 a.png normal\n\n \n2 b.jpg COVID-19\n")
    (tmp_path / "test.txt").write_text("1 a.png normal\n")
    for name in ("train/a.png", "train/b.jpg", "test/a.png"):
        save(tmp_path / name)
    data = read_covidx(tmp_path, progress=False)
    images = data.images
    # The names of columns and blank lines are no images; the only fault is that NIH's patients are unknown.
    assert data.faults.file.tolist() == [MAPPING]
    # One name in two parts is two images, whose ids have the part; the patient is one, which a data sheet flags as a leak.
    assert sorted(images.image_id) == ["b", "test-a.png", "train-a.png"]
    assert images.patient_id.value_counts()["covidx-covidx-1"] == 2 and set(images.source) == {"covidx"}
    # The release's own name counts; otherwise the last release of which both lists are there.
    (tmp_path / "train_COVIDx2.txt").write_text("9 b.jpg normal\n")
    (tmp_path / "test_COVIDx2.txt").write_text("9 a.png normal\n")
    (tmp_path / "train_COVIDx10.txt").write_text("")
    data = read_covidx(tmp_path, progress=False)
    assert sorted(data.images.image_id) == ["b", "test-a.png", "train-a.png"]
    assert "and 2 others are lists of other releases than train.txt; not read" in data.faults.problem.tolist()
    (tmp_path / "test.txt").unlink()
    images = read_covidx(tmp_path, progress=False).images
    assert images.patient_id.tolist() == ["covidx-covidx-9"] * 2 and sorted(images.image_id) == ["a", "b"]
    (tmp_path / "test_COVIDx2.txt").unlink()
    with pytest.raises(DatasetError, match=r"no pair of lists such as train\.txt.*it has train\.txt, train_COVIDx10"):
        read_covidx(tmp_path, progress=False)
    (tmp_path / "test.txt").write_text("1 c.png normal\n")
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(DatasetError, match=r"contain none of the 1 listed images \(the first is test/c\.png\)"):
        read_covidx(tmp_path, progress=False)


def test_a_covidx_line_does_not_get_the_file_of_another_line_that_differs_in_its_suffix(tmp_path):
    (tmp_path / "train.txt").write_text("1 a.jpg normal fig1\n2 a.png COVID-19 fig1\n3 b.jpg normal fig1\n")
    (tmp_path / "test.txt").write_text("")
    for name in ("a.png", "b.png"):  # a.jpg is missing, b.jpg was converted
        save(tmp_path / "train" / name)
    data = read_covidx(tmp_path, progress=False)
    assert dict(zip(data.images.image_id, data.images.diagnosis, strict=True)) == {"a": "COVID-19", "b": "normal"}
    assert "and 0 others have no file; left out" in data.faults.problem.tolist()


def test_covidx_names_with_blanks_folders_and_letters_of_other_systems(tmp_path):
    lines = [
        "sub one and two a b.png COVID-19 cohen",  # the patient and the file may both contain blanks
        "p normal c.png normal actmed",  # a class's name within a file's
        "q images\\d.png pneumonia fig1",  # a path of Windows
        "r E\u0301t\u00e9.png normal fig1",  # one letter decomposed, as macOS writes names, the other composed
    ]
    (tmp_path / "train.txt").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", newline="")
    (tmp_path / "test.txt").write_text("")
    for name in ("a b.png", "normal c.png", "images/d.png", "\u00c9t\u00e9.png"):
        save(tmp_path / "train" / name)
    data = read_covidx(tmp_path, progress=False)
    assert data.faults.empty
    assert dict(zip(data.images.image_id, data.images.diagnosis, strict=True)) == {
        "a b": "COVID-19",
        "normal c": "normal",
        "d": "pneumonia",
        "\u00c9t\u00e9": "normal",
    }
    assert "ieee-sub one and two" in set(data.images.patient_id)


@pytest.mark.parametrize("source", [" rsna", ""])
def test_covidx_images_of_rsna_are_of_nih_patients(tmp_path, source):
    (tmp_path / "train.txt").write_text("".join(f"{name} {name}.png normal{source}\n" for name in ("a1", "b2", "c3")))
    (tmp_path / "test.txt").write_text("")
    for name in ("a1", "b2", "c3"):
        save(tmp_path / "train" / f"{name}.png")
    apart = read_covidx(tmp_path, progress=False)
    assert apart.images.patient_id.is_unique and "one NIH patient may fall into several folds" in apart.faults.problem[0]
    # Two images of NIH's patient 9 and one that is not in the table.
    entries = [{"subset_img_id": name, "img_id": f"00000009_00{name[1]}.png"} for name in ("a1", "b2")]
    (tmp_path / MAPPING).write_text(json.dumps(entries))
    joined = read_covidx(tmp_path, progress=False)
    assert joined.images.patient_id.tolist()[:2] == ["nih-00000009"] * 2 and joined.images.patient_id.nunique() == 2
    assert joined.faults.empty


def test_covidgr(tmp_path):
    for name in ("P/1.jpg", "P/2.jpg", "N/1.jpg"):
        save(tmp_path / "COVIDGR_1.0" / name)
    data = read_covidgr(tmp_path, progress=False)
    assert data.images.image_id.tolist() == ["N-1", "P-1", "P-2"] and data.images.patient_id.is_unique
    assert data.images.diagnosis.tolist() == ["other", "COVID-19", "COVID-19"] and data.faults.empty
    # Tabik et al. 2020: 426 of each.
    assert data.published["images"] == data.published["COVID-19"] + data.published["other"] == 852
    pool = read_pool({"covidgr": tmp_path}, "covid", progress=False)
    assert pool.labels[["COVID-19", "not COVID-19"]].sum().tolist() == [2, 1]
    (tmp_path / "COVIDGR_1.0" / "N" / "1.jpg").unlink()
    with pytest.raises(DatasetError, match=r"none of the 2 files below .* is a PNG or JPEG image in a folder 'N'"):
        read_covidgr(tmp_path, progress=False)
    with pytest.raises(DatasetError, match="PNG or JPEG image in a folder 'P'"):
        read_covidgr(tmp_path / "COVIDGR_1.0" / "P", progress=False)


def test_ricord(tmp_path):
    top = tmp_path / "manifest" / "midrc_ricord_1c"
    pixels = np.full((20, 24), 90, np.uint8)
    for place, view in (
        ("MIDRC-RICORD-1C-419639-000002/study1/series1/1-1.dcm", "AP"),
        ("MIDRC-RICORD-1C-419639-000002/study2/series1/1-1.dcm", "PA"),
        ("MIDRC-RICORD-1C-SITE2-000105/study1/series1/1-1.dcm", "LL"),
        ("other/1-1.dcm", "AP"),
    ):
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        write_xray(top / place, pixels, transfer_syntax="1.2.840.10008.1.2.1", extra={"ViewPosition": view})
    data = read_ricord(tmp_path, progress=False)
    assert data.images.image_id.tolist() == ["419639-000002-study1-series1-1-1", "419639-000002-study2-series1-1-1"]
    # The same id as in COVIDx.
    assert set(data.images.patient_id) == {"ricord-419639-000002"} and data.images["view"].tolist() == ["AP", "PA"]
    assert list(data.labels) == ["id", "COVID-19"] and len(data.faults) == 2
    # The collection's page at The Cancer Imaging Archive.
    assert data.published == {"images": 998, "patients": 361} and set(data.images.licence) == {"CC BY-NC 4.0"}
    with pytest.raises(DatasetError, match="MIDRC-RICORD-1C-PATIENT"):
        read_ricord(top / "other", progress=False)


def test_bimcv(tmp_path):
    posi, neg = tmp_path / "covid19_posi", tmp_path / "covid19_neg"
    names = {
        posi: (
            "sub-S1_ses-E1_run-1_bp-chest_vp-ap_cr",
            "sub-S1_ses-E2_run-1_bp-chest_vp-pa_dx",
            "sub-S2_ses-E3_run-1_vp-ll_dx",
        ),
        neg: ("sub-S3_ses-E4_run-1_bp-chest_vp-pa_dx", "sub-S4_ses-E5_run-1_vp-pa_dx", "sub-S5_ses-E6_run-1_vp-pa_cr"),
    }
    for root, of_root in names.items():
        for name in of_root:
            subject, session = name.split("_")[:2]
            save(root / subject / session / "mod-rx" / f"{name}.png")
    # Labels are separated by commas, by tabs (cxr_covid) or, if NumPy has written them, by blanks.
    reports = {"ses-E1": "['infiltrates'\t'COVID 19']", "E2": "['normal']", "E3": "['COVID 19']", "E4": "[' normal']"}
    reports |= {"E5": "['chronic changes' \"pneumonia\"]", "E6": "pneumonia", "E7": "'normal'", "E8": "['normal', x]"}
    labels = pd.DataFrame({"PatientID": "x", "ReportID": list(reports), "Labels": list(reports.values())})
    for root in (posi, neg):
        (root / "derivatives" / "labels").mkdir(parents=True)
        labels.to_csv(root / "derivatives" / "labels" / "labels.tsv", sep="\t", index=False)
    people = pd.DataFrame({"participant": ["sub-S1", "sub-S3"], "age": ["[64]", ""], "gender": ["M", "F"]})
    people.to_csv(posi / "participants.tsv", sep="\t", index=False)
    data = read_bimcv(tmp_path, progress=False)
    images = data.images.set_index("patient_id")
    assert images.diagnosis.to_dict() == {"bimcv-S1": "COVID-19", "bimcv-S3": "normal", "bimcv-S4": "pneumonia"}
    assert images["view"].tolist() == ["AP", "PA", "PA"] and images.sex.tolist() == ["M", "F", ""]
    assert images.age["bimcv-S1"] == 64 and images.age[1:].isna().all()
    told = " | ".join(data.faults.problem)
    for words in (
        "neither vp-ap nor vp-pa",
        "have no report",
        "are from the positive set without a report",
        "the labels are not a list",
    ):
        assert words in told
    # The labels of E6, E7 and E8 are no lists, and are read once for each set.
    not_a_list = data.faults["row"][data.faults.problem.str.contains("not a list")]
    assert len(data.faults) == 9 and sorted(not_a_list) == ["E6", "E6", "E7", "E7", "E8", "E8"]
    for root in (posi, neg):
        (root / "derivatives" / "labels" / "labels.tsv").unlink()
    with pytest.raises(DatasetError, match="ReportID, Labels"):
        read_bimcv(tmp_path, progress=False)
    with pytest.raises(DatasetError, match="no image such as sub-S1"):
        read_bimcv(posi / "derivatives", progress=False)


@pytest.mark.parametrize("names", [("BIMCV-COVID19+", "BIMCV-COVID19-"), ("bimcv+/covid19_posi", "bimcv+/covid19_neg")])
def test_bimcv_sets_are_recognised_by_folder_names_and_sexes_by_words(tmp_path, names):
    for folder, subject, labels in zip(names, ("S1", "S2"), ("['COVID 19']", "['normal']"), strict=True):
        root = tmp_path / "in" / folder
        save(root / f"sub-{subject}" / "ses-E1" / "mod-rx" / f"sub-{subject}_ses-{subject.replace('S', 'E')}_vp-ap_cr.png")
        (root / "derivatives" / "labels").mkdir(parents=True)
        reports = pd.DataFrame({"ReportID": [subject.replace("S", "E")], "Labels": [labels]})
        reports.to_csv(root / "derivatives" / "labels" / "labels.tsv", sep="\t", index=False)
    people = pd.DataFrame({"participant": ["sub-S1", "sub-S2", "sub-S3"], "age": "", "gender": ["Mujer", " male", "H"]})
    people.to_csv(tmp_path / "in" / names[0] / "participants.tsv", sep="\t", index=False)
    data = read_bimcv(tmp_path / "in", progress=False)
    images = data.images.set_index("patient_id")
    assert images.diagnosis.to_dict() == {"bimcv-S1": "COVID-19", "bimcv-S2": "normal"}
    assert images.sex.to_dict() == {"bimcv-S1": "F", "bimcv-S2": "M"}
    assert "have an unknown value of gender" in data.faults.problem.item() and data.faults["row"].item() == "sub-S3"
    # The folder passed may itself be the named one; a folder without a name of a set is refused.
    assert len(read_bimcv(tmp_path / "in" / names[0], progress=False).images) == 1
    (tmp_path / "in" / names[1]).rename(tmp_path / "in" / "others")
    with pytest.raises(
        DatasetError,
        match=r"others.* neither its folders nor the names of the tables say .* BIMCV-COVID19\+, .*like covid19_neg",
    ):
        read_bimcv(tmp_path / "in", progress=False)


@pytest.mark.parametrize(
    ("folder", "table", "kept"),
    [
        ("covid19_posi", "labels", "S1"),
        ("covid19_neg", "labels", "S2"),
        ("covid19_posi/covid19_neg", "labels", "S2"),  # the nearest folder decides
        ("covid19_neg/covid19_posi", "labels", "S1"),
        ("covid19_neg/posi_or_neg", "labels", "S2"),  # a name that states both states nothing
        ("images", "labels_covid19_posi", "S1"),
        ("images", "labels_covid19_neg", "S2"),
    ],
)
def test_a_report_of_bimcv_that_contradicts_its_set_costs_the_image(tmp_path, folder, table, kept):
    """S1 has a report of COVID 19, which only the positive set may have, and S2 one of other changes."""
    for name in ("sub-S1_ses-E1_vp-ap_cr", "sub-S2_ses-e2_vp-pa_dx", "chest_neg"):
        save(tmp_path / "in" / folder / f"{name}.png")
    reports = "ReportID\tLabels\nses-e1\t['COVID 19', 'normal']\nE2\t['normal', 'scar']\n"
    (tmp_path / "in" / f"{table}.tsv").write_text(reports)
    # Of two rows for a participant, the first counts.
    people = "participant\tage\tgender\nsub-S1\t[64, 65]\tM\nsub-s2\t[30]\tF\nsub-S1\t[1]\tF\nsub-S2\t[1]\tM\n"
    (tmp_path / "in" / "participants.tsv").write_text(people)
    data = read_bimcv(tmp_path / "in", progress=False)
    columns = ["patient_id", "diagnosis", "sex", "age"]
    expected = {"S1": ["bimcv-S1", "COVID-19", "M", 64], "S2": ["bimcv-S2", "other", "F", 30]}
    assert data.images[columns].to_numpy().tolist() == [expected[kept]]
    unnamed, left_out = data.faults.itertuples(index=False)
    assert unnamed.row == f"{folder}/chest_neg.png" and "left out" in unnamed.problem
    assert left_out.row[:6] == ("sub-S2" if kept == "S1" else "sub-S1") and "left out" in left_out.problem
    # The names of tables matter only if no folder states the set; they must not contradict one another.
    (tmp_path / "in" / f"other_{'neg' if kept == 'S1' else 'posi'}.tsv").write_text("a\n")
    if folder == "images":
        with pytest.raises(DatasetError, match="neither its folders nor the names of the tables say"):
            read_bimcv(tmp_path / "in", progress=False)
    else:
        assert len(read_bimcv(tmp_path / "in", progress=False).images) == 1


@pytest.mark.parametrize("patient", ["419639-000082", "SITE2-000105", "site2_000105", "17"])
def test_ricords_patient_is_in_a_folder_or_begins_a_files_name(tmp_path, patient):
    number = patient.upper().replace("_", "-")
    for name in (f"MIDRC-RICORD-1C-{patient}/a/1-1.png", f"midrc_ricord_1c_{patient}_b-1.png"):
        save(tmp_path / "MIDRC-RICORD-1C-99" / name)  # the folder that holds all has a name like a patient's
    data = read_ricord(tmp_path, progress=False)
    assert data.images.image_id.tolist() == [f"{number}-a-1-1", f"{number}-b-1"] and data.faults.empty
    assert set(data.images.patient_id) == {f"ricord-{number}"}


@pytest.mark.parametrize("view", ["LL", "rl", "LLD", "RLD", "LAT", "Lateral"])
def test_lateral_views_of_ricord_are_left_out(tmp_path, view):
    for name, stated in (("1", "PA"), ("2", view), ("3", "")):
        path = tmp_path / f"MIDRC-RICORD-1C-{name}" / "1-1.dcm"
        path.parent.mkdir()
        pixels = np.full((20, 24), 90, np.uint8)
        write_xray(path, pixels, transfer_syntax="1.2.840.10008.1.2.1", extra={"ViewPosition": stated})
    data = read_ricord(tmp_path, progress=False)
    assert data.images.image_id.tolist() == ["1-1-1", "3-1-1"] and data.faults["row"].tolist() == ["2-1-1"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"00280004": 5}', '{"00280101": {"vr": "US", "Value": ["x"]}}', '{"a": 1}', "[" * 100_000, "\udcff"],
)
def test_an_invalid_json_header_is_a_fault_and_is_ignored(tmp_path, text):
    stored = np.random.default_rng(7).integers(0, 4096, (40, 30)).astype(np.uint16)
    folder = tmp_path / "covid19_neg" / "sub-S1" / "ses-E1" / "mod-rx"
    save(folder / "sub-S1_ses-E1_vp-pa_dx.png")
    path = folder / "sub-S2_ses-E1_vp-pa_dx.png"
    cv2.imwrite(str(path), stored)
    without = decode_image(path)
    (tmp_path / "covid19_neg" / "derivatives" / "labels").mkdir(parents=True)
    labels = pd.DataFrame({"ReportID": ["E1"], "Labels": ["['normal']"]})
    labels.to_csv(tmp_path / "covid19_neg" / "derivatives" / "labels" / "labels.tsv", sep="\t", index=False)
    assert read_bimcv(tmp_path, progress=False).faults.empty
    cache = XrayCache(tmp_path / "c", 64)
    images = pd.DataFrame({"image_id": ["x"], "path": [str(path)]})
    cache.fill(images, workers=1)
    path.with_suffix(".json").write_bytes(text.encode("utf-8", "surrogateescape"))
    xray = decode_image(path)
    np.testing.assert_array_equal(xray.pixels, without.pixels)
    assert (
        xray.warnings[0].startswith("the DICOM header in the JSON file is ignored: ")
        and xray.warnings[1:] == without.warnings
    )
    faults = read_bimcv(tmp_path, progress=False).faults
    assert faults["row"].tolist() == [path.stem]
    assert faults.problem.tolist() == ["and 0 others have an invalid JSON header; decoded without it"]
    # The JSON file counts as part of the image: the cache notices that it was added or changed.
    if text == "{":
        assert cache.fill(images, workers=1).status.tolist() == ["decoded"]
        assert cache.fill(images, workers=1).status.tolist() == ["cached"]
        path.with_suffix(".json").write_text('{"00280101": {"vr": "US", "Value": [12]}}')
        assert cache.fill(images, workers=1).status.tolist() == ["decoded"]
