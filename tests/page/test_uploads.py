"""Uploaded files become a study with safe names, or are refused in whole sentences, whatever their content."""

import contextlib
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

import kitlib.page.opened_study
from kitlib.errors import CacheError, PageError
from kitlib.page.opened_study import DecodedCopies, OpenedStudy
from kitlib.page.uploads import MAX_IMAGES, MAX_UPLOAD_BYTES, open_uploads
from kitlib.xrays.cache import XrayCache
from kitlib.xrays.image_file import read_xray
from kitlib.xrays.writing import write_xray

pytestmark = pytest.mark.usefixtures("quick_processes")

SIDE = 32
GREY = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    copies = DecodedCopies(tmp_path_factory.mktemp("copies"))
    yield copies
    copies.close()


def write(path, stored=GREY, syntax=ExplicitVRLittleEndian, **told):
    write_xray(path, stored, transfer_syntax=syntax, bits_stored=12, **told)
    return path


def png(path, mode="L"):
    Image.fromarray((GREY % 256).astype(np.uint8)).convert(mode).save(path)
    return path


def gigantic_png(path):
    """Write a PNG with a valid header and checksum for 60,000 x 60,000 pixels."""
    raw = bytearray(png(path).read_bytes())
    raw[16:24] = struct.pack(">II", 60_000, 60_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    path.write_bytes(raw)
    return path


def refusal(paths, copies) -> str:
    with pytest.raises(PageError) as caught:
        open_uploads(paths, copies, SIDE)
    assert re.fullmatch(r"([^\n]+\. )*[^\n]+\.", str(caught.value)), "sentences"
    return str(caught.value)


def test_a_dicom_file_is_a_study_of_one_image(tmp_path, copies):
    path = write(tmp_path / "chest.dcm", photometric="MONOCHROME1", study_id="1.2.3", patient_id="Doe^John")
    study = open_uploads([str(path)], copies, SIDE)
    (image,) = study.images
    assert (study.study_id, image.image_id, image.rows, image.columns, image.is_dicom) == ("1.2.3", "chest", 48, 64, True)
    assert (study.remarks, image.remarks, image.truth, study.run_cache, study.trained_on) == ((), (), None, None, "")
    assert image.facts["Size"] == "48 x 64 (rows x columns)" and image.facts["Modality"] == "DX"
    assert "Doe" not in repr(study)
    # 48 x 64 shrunk by half: each pixel is the mean of four.
    halves = read_xray(path).reshape(24, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(study.read(image, SIDE).pixels - halves).max() <= 0.5


def test_several_files_are_one_study_and_the_same_file_counts_once(tmp_path, copies):
    (tmp_path / "b").mkdir()
    paths = [
        write(tmp_path / "a.dcm", study_id="7"),
        write(tmp_path / "b" / "a.dcm", GREY[::-1], study_id="7"),
        png(tmp_path / "a-2.png"),
        png(tmp_path / "again.png"),
    ]
    study = open_uploads(paths, copies, SIDE)
    assert study.study_id == "7"
    assert [image.image_id for image in study.images] == ["a", "a-2", "a-2-2"]
    assert [image.is_dicom for image in study.images] == [True, True, False]
    assert study.remarks == ("again.png is the same file as a-2.png and is used only once.",)
    assert len({image.key for image in study.images}) == 3
    assert open_uploads(paths[2:], copies, SIDE).images[0].key == study.images[2].key


def test_headers_with_several_studies_or_patients_are_reported_without_the_names(tmp_path, copies):
    paths = [write(tmp_path / f"{n}.dcm", GREY + n, study_id=f"study{n}", patient_id=f"Doe{n}") for n in range(2)]
    study = open_uploads(paths, copies, SIDE)
    assert study.study_id == "0"
    assert [remark.split(";")[0] for remark in study.remarks] == [
        "The headers of these files state several patients",
        "The headers of these files state several studies",
    ]
    assert "Doe" not in repr(study) and "study1" not in repr(study)


def test_the_readable_files_of_a_study_open_without_the_others(tmp_path, copies):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.dcm", "x")
    study = open_uploads([tmp_path / "x.zip", png(tmp_path / "x.png")], copies, SIDE)
    assert [image.image_id for image in study.images] == ["x"]
    (remark,) = study.remarks
    assert remark.startswith("Left out: x.zip is a ZIP archive") and remark.endswith(
        "Unpack it and choose the images in it."
    )
    (tmp_path / "empty.dcm").touch()
    text = refusal([tmp_path / "x.zip", tmp_path / "empty.dcm"], copies)
    assert "x.zip is a ZIP archive" in text and "empty.dcm is empty." in text


def test_missing_large_and_special_files_are_refused(tmp_path, copies):
    assert "No file was chosen" in refusal([], copies)
    assert f"at most {MAX_IMAGES}" in refusal([tmp_path / "x"] * (MAX_IMAGES + 1), copies)
    os.mkfifo(tmp_path / "pipe.dcm")
    with open(tmp_path / "large.dcm", "wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)  # a sparse file, which takes no disk space
    assert "folder" in refusal([tmp_path], copies) and "device" in refusal([tmp_path / "pipe.dcm"], copies)
    assert "larger than the 100 MB" in refusal([tmp_path / "large.dcm"], copies)
    for name in ("gone.dcm", "x" * 300 + ".dcm", "zero\0byte", os.fsdecode(b"\xff.png")):
        assert "cannot be opened" in refusal([tmp_path / name], copies)


def test_damaged_files_and_impossible_sizes_are_refused_in_a_sentence(tmp_path, copies):
    whole = write(tmp_path / "cut.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-1000])
    assert "cut.dcm is a damaged or incomplete DICOM file (the pixel data end" in refusal([tmp_path / "cut.dcm"], copies)
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF")):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-500])
        assert f"damaged or incomplete {kind} file" in refusal([path], copies)
    (tmp_path / "noise.dcm").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "not an image that can be read" in refusal([tmp_path / "noise.dcm"], copies)

    gif = bytearray(png(tmp_path / "huge.gif").read_bytes())
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    (tmp_path / "huge.gif").write_bytes(gif)
    huge = [tmp_path / "huge.gif", gigantic_png(tmp_path / "huge.png")]
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1):
        sides = {"Rows": 60_000, "Columns": 60_000}
        huge.append(write(tmp_path / f"{syntax}.dcm", syntax=syntax, extra=sides))
    for path in huge:
        assert "claims to have 60,000 x 60,000 pixels" in refusal([path], copies)
    write(tmp_path / "icon.dcm", GREY[:15])
    assert "has 15 x 64 pixels" in refusal([tmp_path / "icon.dcm"], copies)


def test_files_at_the_limits_are_accepted(tmp_path, copies, monkeypatch):
    path = write(tmp_path / "small.dcm", GREY[:16])
    monkeypatch.setattr("kitlib.page.uploads.MAX_UPLOAD_BYTES", path.stat().st_size)
    study = open_uploads([path] * MAX_IMAGES, copies, SIDE)
    assert (study.images[0].rows, len(study.remarks)) == (16, MAX_IMAGES - 1)
    monkeypatch.setattr("kitlib.page.uploads.MAX_UPLOAD_BYTES", path.stat().st_size - 1)
    assert "is larger than" in refusal([path], copies)


def test_only_the_newest_copies_are_kept(tmp_path, copies, monkeypatch):
    monkeypatch.setattr(kitlib.page.opened_study, "MAX_COPIES", 2)
    path, cache = png(tmp_path / "x.png"), XrayCache(copies.folder, 20)
    for seconds, key in enumerate(["oldest", "middle", "newest"]):
        copies.decode(key, path, 20)
        os.utime(cache.folder / f"{key}.safetensors", (seconds, seconds))
    assert [key in cache for key in ("oldest", "middle", "newest")] == [False, True, True]


@pytest.mark.parametrize(
    ("modality", "told"), [("US", "ultrasound"), ("CT", "computed tomography"), ("<Q>", "modality ILLEGIBLE")]
)
def test_other_modalities_are_refused_before_their_pixels_are_read(tmp_path, copies, modality, told):
    path = write(tmp_path / "x.dcm", extra={"Modality": modality, "PixelData": None})
    assert told in refusal([path], copies) and "CR or DX" in refusal([path], copies)


@pytest.mark.parametrize("modality", ["CR", "dx", "OT", "", None])
def test_xrays_and_files_without_a_modality_are_accepted(tmp_path, copies, modality):
    path = write(tmp_path / "x.dcm", extra={"Modality": modality})
    assert len(open_uploads([path], copies, SIDE).images) == 1


def test_colour_is_refused_in_dicom_and_remarked_in_pictures(tmp_path, copies):
    colour = np.zeros((48, 64, 3), np.uint8)
    colour[:, :, 0] = 200
    told = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": colour.tobytes(), "BitsStored": 8}
    write_xray(tmp_path / "c.dcm", colour[..., 0], transfer_syntax=ExplicitVRLittleEndian, photometric="RGB", extra=told)
    assert "in colour" in refusal([tmp_path / "c.dcm"], copies)
    Image.fromarray(colour).save(tmp_path / "c.png")
    (image,) = open_uploads([tmp_path / "c.png"], copies, SIDE).images
    assert image.remarks == ("The image is in colour; only its brightness is shown and used by the models.",)
    (image,) = open_uploads([png(tmp_path / "grey.png", "RGB")], copies, SIDE).images
    assert image.remarks == ()


def test_unusual_header_values_are_remarked(tmp_path, copies):
    odd = {"ViewPosition": "LL", "BodyPartExamined": "HIP", "WindowCenter": "2000", "WindowWidth": "0"}
    path = write(tmp_path / "x.dcm", extra=odd)
    path.write_bytes(path.read_bytes().replace(b"2000", b"Doe "))  # a name in place of a number
    (image,) = open_uploads([path], copies, SIDE).images
    lateral, body_part, window = image.remarks
    assert "lateral" in lateral and "HIP" in body_part
    assert window == (
        "The file has an unusual value: WindowCenter is …, not a number; it is ignored, and the image's own range is used."
    )


def test_an_illegible_body_part_is_not_remarked(tmp_path, copies):
    path = write(tmp_path / "x.dcm", extra={"BodyPartExamined": "<b>"})
    assert open_uploads([path], copies, SIDE).images[0].remarks == ()


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        ("00188a671292_image.dcm", "00188a671292_image"),
        ("1.2.840.113", "1.2.840.113"),  # a UID, which has no suffix
        ("<script>alert(1)</script>".replace("/", "") + ".dcm", "_script_alert_1_script_"),
        ("Röntgen Thorax, 3.dcm", "Rontgen_Thorax_3"),
        ("one\ntwo\r.dcm", "one_two_"),
        ("肺.dcm", "image"),
        ("...dcm", "image"),
        ("=1+1.dcm", "_1_1"),
        ("x" * 250 + ".dcm", "x" * 100),
    ],
)
def test_unsafe_file_names_become_plain_ids(tmp_path, copies, name, image_id):
    study = open_uploads([write(tmp_path / "plain").rename(tmp_path / name)], copies, SIDE)
    assert study.images[0].image_id == image_id


@pytest.mark.parametrize("study_id", ["1,2\r\nevil_study,x", "../..", "1.2 Doe^John", "1" * 65, ""])
def test_an_unsafe_study_id_is_replaced_by_the_image_id(tmp_path, copies, study_id):
    path = write(tmp_path / "x.dcm", study_id=study_id)
    assert open_uploads([path], copies, SIDE).study_id == "x"


def test_a_file_that_crashes_hangs_or_fills_memory_is_refused(tmp_path, copies, monkeypatch):
    path = write(tmp_path / "x.dcm")
    monkeypatch.setattr(kitlib.page.opened_study, "TIMEOUT_S", 1.0)
    for code, told in (
        ("bytearray(4 * 2**30)", "crashed the program"),
        ("import os; os.abort()", "crashed the program"),
        ("import time; time.sleep(60)", "took too long"),
    ):
        monkeypatch.setattr(copies, "run", lambda _, __, code=code: DecodedCopies.run(copies, exec, code))
        assert told in refusal([path], copies)
    monkeypatch.undo()
    assert open_uploads([path], copies, SIDE).images


def test_a_full_disk_is_reported(tmp_path, copies, monkeypatch):
    def full(*_):
        raise CacheError("/secret/place: No space left on device")

    monkeypatch.setattr(copies, "decode", full)
    text = refusal([write(tmp_path / "x.dcm")], copies)
    assert "disk is full" in text and "secret" not in text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=600),
    kept=st.floats(0, 1),
    whole=st.sampled_from(["dicom", "png", "jpg", "gif", "noise"]),
    damage=st.dictionaries(st.floats(0, 1), st.integers(0, 255), max_size=5),
    name=st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40),
)
def test_any_bytes_give_a_study_or_a_refusal(tmp_path, copies, content, kept, whole, damage, name):
    """Noise, truncated and damaged files; `kept` is the share of the file, `damage` maps relative positions to bytes."""
    path = tmp_path / "file"
    if whole == "noise":
        path.write_bytes(content)
    elif whole == "dicom":
        write(path)
    else:
        path = png(tmp_path / f"x.{whole}")
    raw = bytearray(path.read_bytes())
    raw = raw[: round(kept * len(raw))] if not damage else raw
    for place, byte in damage.items():
        if raw:
            raw[int(place * (len(raw) - 1))] = byte
    path.write_bytes(raw)
    with contextlib.suppress(OSError, ValueError):  # a name that the file system does not allow
        path = path.rename(tmp_path / name)
    try:
        study = open_uploads([path], copies, SIDE)
    except PageError as refused:
        assert str(refused).endswith(".") and str(refused).isprintable()
        return
    assert isinstance(study, OpenedStudy)
    for plain in (study.study_id, study.images[0].image_id):
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", plain)
    assert study.read(study.images[0], SIDE).pixels.dtype == np.uint8


@pytest.mark.real_data
def test_real_xrays_open_and_other_modalities_do_not(real_data, copies):
    """Of the 31 files in index.csv, the 28 CR, DX and OT files open; two MR files and a CT file are refused."""
    opened, refused = [], {}
    for path in sorted(Path(real_data / "dicom").rglob("*.dcm")):
        try:
            opened.append(open_uploads([path], copies, SIDE).images[0])
        except PageError as error:
            refused[path.name] = str(error)
    assert len(opened) == 28
    assert sorted(refused) == ["CT_no_preamble_no_meta.dcm", "MR_small_RLE.dcm", "MR_truncated_pixeldata.dcm"]
    assert all("magnetic resonance" in text for name, text in refused.items() if name.startswith("MR"))
    hips = [image for image in opened if any("HIP" in remark for remark in image.remarks)]
    assert {image.image_id[:6] for image in hips} == {"CR_hip"} and len(hips) == 2
