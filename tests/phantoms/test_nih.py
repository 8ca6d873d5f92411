"""Phantoms in NIH's layout: they are read without faults, and each finding is where its label or box says."""

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kitlib.classes import NIH_FINDINGS
from kitlib.datasets.nih import ENTRIES, LISTS, read_nih
from kitlib.phantoms.drawing import render
from kitlib.phantoms.nih import BOXED, SHARES, write_nih
from kitlib.phantoms.patients import DRAWN_FINDINGS, draw_exposure, draw_finding, draw_patient
from kitlib.xrays.image_file import decode_image

SMALL = {"images": 120, "side": 64, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_nih(tmp_path_factory.mktemp("inputs"), **SMALL, workers=1)


@pytest.fixture(scope="module")
def data(written):
    return read_nih(written, progress=False)


def test_the_readers_only_fault_is_that_the_images_are_smaller_than_the_published_ones(written, data):
    assert (
        "from 1024 x 1024 to 64 x 64 pixels; the boxes are scaled" in data.faults.problem.item() and len(data.images) == 120
    )
    assert set(data.images["rows"]) == set(data.images["columns"]) == {64} and set(data.images["view"]) == {"AP", "PA"}
    positives = data.labels.set_index("id").sum()
    assert set(positives.index[positives > 0]) == set(DRAWN_FINDINGS)
    # 45 % of 120 show no finding; 8 % show Cardiomegaly alone, and some others show it with their finding.
    assert positives["No Finding"] == 54 and 10 <= positives["Cardiomegaly"] <= 20
    assert data.labels[list(NIH_FINDINGS)].sum(axis=1).isin([1, 2]).all()
    assert sorted(path.name for path in written.glob("images_*")) == [f"images_{n:03d}" for n in range(1, 13)]
    # The header of the real file, split at its commas.
    assert (written / ENTRIES[0]).read_text().splitlines()[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    entries = pd.read_csv(written / ENTRIES[0])
    # The originals are said to be twice as large, with NIH's usual spacing in mm.
    sizes = entries[["OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"]]
    assert sizes.drop_duplicates().to_numpy().tolist() == [[128, 128, 0.143, 0.143]]
    assert entries["Patient Age"].between(18, 89).all() and set(entries["Patient Gender"]) == {"F", "M"}
    people = entries.groupby("Patient ID")[["Patient Age", "Patient Gender"]].nunique()
    assert (people == 1).all(axis=None) and entries["Patient Age"].nunique() > 30
    assert entries["Patient ID"].iloc[0] == 1 and (entries["Patient ID"].diff().dropna().isin([0, 1])).all()
    assert sum(SHARES.values()) == pytest.approx(1)


def test_no_patient_is_in_both_lists_and_boxes_are_of_test_images(data):
    splits = data.images.groupby("patient_id").split.nunique()
    assert (splits == 1).all() and len(splits) < 120
    # 0.228 of 120 is 27.4; patients have up to four images.
    assert 28 <= (data.images.split == "test").sum() <= 31
    boxed = data.boxes.merge(data.images[["image_id", "split"]]).merge(data.labels, left_on="image_id", right_on="id")
    assert set(boxed.split) == {"test"} and set(boxed.finding) <= set(BOXED)
    # The list's boxes, for images of 1024 pixels, are scaled to the 64 pixels of these images.
    corners = data.boxes[["xmin", "ymin", "xmax", "ymax"]].to_numpy()
    assert corners.min() >= 0 and corners.max() <= 64 and (corners[:, 2:] - corners[:, :2]).max() > 8
    assert all(boxed.loc[row, finding] == 1 for row, finding in boxed.finding.items())
    test = data.labels[data.labels.id.isin(data.images.image_id[data.images.split == "test"])]
    assert set(test.id[(test[list(BOXED)] == 1).any(axis=1)]) == set(data.boxes.image_id)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(3599)  # an effusion of 0.49 % of the image
def test_each_finding_changes_the_expected_part_of_the_image(seed):
    """Subtracts the image without a finding from that with one, for the same patient and exposure, at 160 pixels.

    At least 0.1 % of the pixels must change: the smallest effusion of the smallest patient, at the smallest zoom, changes
    0.18 %, and the smallest mass 0.23 %.
    """
    drawn = {}
    for finding in DRAWN_FINDINGS:
        rng = np.random.default_rng(seed)
        patient = draw_patient(rng)
        exposure = replace(draw_exposure(rng, 160), rows=160, columns=160, noise=0.0, border=0.0, marker="", rotation=0.0)
        patient, opacities = draw_finding(rng, finding, patient)
        drawn[finding] = (*render(patient, exposure, opacities), opacities)
    none = drawn["No Finding"][0]
    assert len(drawn["No Finding"][1]) == 0
    changed = {finding: (grey - none).clip(0) for finding, (grey, _, _) in drawn.items()}
    assert all(
        (change > 0.03).mean() > 0.001 for finding, change in changed.items() if finding not in ("No Finding", "Nodule")
    )
    # The heart grows mostly to the patient's left, the image's right, and in the lower half of the lungs.
    heart = changed["Cardiomegaly"]
    assert heart[:, 80:].sum() > heart[:, :80].sum() and heart[80:].sum() > heart[:60].sum()
    assert changed["Consolidation"][:72].sum() > 0.7 * changed["Consolidation"].sum()
    assert changed["Pneumonia"][72:].sum() > 0.7 * changed["Pneumonia"].sum()
    # Drawn from the same seed, the mass is larger than the nodule.
    nodule, mass = (np.prod(drawn[name][1][0][2:] - drawn[name][1][0][:2]) for name in ("Nodule", "Mass"))
    assert nodule < 0.6 * mass
    assert drawn["Infiltration"][2][0].density < drawn["Pneumonia"][2][0].density < drawn["Consolidation"][2][0].density


def test_a_finding_that_phantoms_do_not_show_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"'Hernia'.*Cardiomegaly, Effusion"):
        draw_finding(rng, "Hernia", draw_patient(rng))


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_the_same_parameters_give_the_same_bytes_and_are_left_alone(written, tmp_path):
    again = write_nih(tmp_path, **SMALL, workers=1)
    assert digest(again) == digest(written)
    canary = again / "canary"
    canary.write_text("")
    write_nih(tmp_path, **SMALL)
    assert canary.exists()
    write_nih(tmp_path, **(SMALL | {"images": 16, "seed": 4}))
    assert not canary.exists() and len(list(again.glob("images_*/images/*.png"))) == 16
    assert all((again / name).read_text() for name in LISTS.values())
    assert len(pd.read_csv(again / ENTRIES[0])) == 16


def test_real_data_is_not_replaced_and_too_small_sizes_are_refused(written, tmp_path):
    (tmp_path / written.name).mkdir()
    (tmp_path / written.name / ENTRIES[0]).write_text("Image Index\n")
    with pytest.raises(FileExistsError, match="files that are not phantoms"):
        write_nih(tmp_path, **SMALL)
    for wrong in ({"images": 15}, {"side": 31}):
        with pytest.raises(ValueError, match="images >= 16 and side >= 32"):
            write_nih(tmp_path / "other", **(SMALL | wrong))


def test_one_image_has_four_channels_and_reads_as_grey(data):
    modes = [Image.open(path).mode for path in data.images.path]
    assert modes.count("RGBA") == 1 and modes.count("L") == 119
    odd = decode_image(data.images.path[modes.index("RGBA")]).pixels
    assert odd.shape == (64, 64) and np.ptp(odd) > 100
