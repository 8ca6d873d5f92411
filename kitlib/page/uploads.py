"""Turns uploaded files into one study, and rejects unusable files with sentences that say what to do."""

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kitlib.errors import CacheError, PageError, UnreadableXray
from kitlib.page.file_facts import (
    CHOOSE_IMAGE,
    ILLEGIBLE,
    FileFacts,
    kind_by_signature,
    printable,
    read_facts,
    recognise_foreign,
)
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.xrays.header import MAX_SAMPLES
from kitlib.xrays.worker import Outcome

MAX_UPLOAD_BYTES = 100_000_000
MAX_IMAGES = 16  # in one study
MIN_SIDE = 16  # pixels; smaller images are icons

# Computed and digital radiography, digitised film, fluoroscopy; and values that state no modality: other, secondary capture
# and an empty value.
XRAY_MODALITIES = ("CR", "DX", "DR", "RG", "RF", "OT", "SC", "")
OTHER_MODALITIES = {
    "US": "ultrasound",
    "CT": "computed tomography",
    "MR": "magnetic resonance",
    "NM": "nuclear medicine",
    "PT": "positron emission tomography",
    "XA": "angiography",
    "MG": "mammography",
    "ES": "endoscopy",
    "IO": "a tooth",
    "PX": "the jaw",
    "SR": "a report",
}
CHEST = ("CHEST", "THORAX", "TORAX", "LUNG")
LATERAL = ("LL", "RL", "LATERAL", "LAT")


@dataclass(frozen=True)
class _Accepted:
    path: Path
    facts: FileFacts
    outcome: Outcome


def open_uploads(paths: Sequence[str | Path], copies: DecodedCopies, longest_side: int) -> OpenedStudy:
    """Open the files in `paths` as one study, decoded to at most `longest_side` pixels a side in the processes of `copies`.

    The image_id is made from the file name. The study_id is the StudyInstanceUID that the DICOM files state; if none states
    one, or if they differ, it is the image_id of the first image. Both ids consist of letters, digits, `.`, `_` and `-`. A
    file that cannot be shown is left out, and the study's remarks say why. Raises PageError if no file can be shown.
    """
    if not paths:
        raise PageError(f"No file was chosen. {CHOOSE_IMAGE}")
    if len(paths) > MAX_IMAGES:
        raise PageError(
            f"{len(paths)} files were chosen, but a study can have at most {MAX_IMAGES} images. Choose fewer files."
        )
    accepted: dict[str, _Accepted] = {}
    remarks, refusals = [], []
    for path in map(Path, paths):
        try:
            key = _check_and_digest(path)
            if key in accepted:
                remarks.append(
                    f"{_display_name(path)} is the same file as {_display_name(accepted[key].path)} and is used only once."
                )
            else:
                accepted[key] = _accept(path, key, copies, longest_side)
        except PageError as refused:
            refusals.append(str(refused))
    if not accepted:
        raise PageError(" ".join(refusals))

    images, used_ids = [], set[str]()
    for key, upload in accepted.items():
        image_id = _free_id(upload.path, used_ids)
        used_ids.add(image_id)
        images.append(_open_image(image_id, key, upload))
    study_id, disagreements = _study_id([upload.facts for upload in accepted.values()], images[0].image_id)
    left_out = [f"Left out: {refusal}" for refusal in refusals]
    return OpenedStudy(study_id, tuple(images), copies, remarks=(*left_out, *remarks, *disagreements))


def _check_and_digest(path: Path) -> str:
    """Return a digest of the file's bytes, as 32 hexadecimal digits. Raises PageError if the file cannot be an X-ray."""
    name = _display_name(path)
    try:
        str(path).encode()  # raises ValueError for names with surrogates, which tables cannot store
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise PageError(f"{name} is a folder or a device, not a file. {CHOOSE_IMAGE}")
        if not status.st_size:
            raise PageError(f"{name} is empty. Copy or export it again.")
        if status.st_size > MAX_UPLOAD_BYTES:
            most = f"{MAX_UPLOAD_BYTES / 1e6:,.0f} MB"
            raise PageError(
                f"{name} is larger than the {most} that a file can have here. Choose a file with a single X-ray."
            )
        if foreign := recognise_foreign(path):
            raise PageError(f"{name} is {foreign[0]}, not an image that can be read here. {foreign[1]}")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except PageError:
        raise
    except (OSError, ValueError):  # deleted, or a name with a zero byte or not in UTF-8
        raise PageError(f"{name} cannot be opened. Give it a shorter and simpler name and choose it again.") from None


def _accept(path: Path, key: str, copies: DecodedCopies, longest_side: int) -> _Accepted:
    name, kind = _display_name(path), ""
    try:
        kind = kind_by_signature(path)
        facts = copies.run(read_facts, path)
        if facts.modality not in XRAY_MODALITIES:
            raise PageError(_wrong_modality_message(name, facts.modality))
        if facts.kind == "DICOM" and facts.coloured:
            raise PageError(
                f"{name} is a DICOM file in colour, like an ultrasound image or a photograph, but X-rays are grey. "
                "If it is an X-ray with coloured marks, export it in grey or as PNG."
            )
        outcome = copies.decode(key, path, longest_side)
    except UnreadableXray as error:
        raise PageError(_unreadable_message(path, kind, error.reason)) from None
    except CacheError:
        raise PageError(
            f"{name} cannot be opened because this computer's disk is full or write-protected. "
            "Free some space, or tell the person who runs this page."
        ) from None
    except OSError:
        raise PageError(f"{name} no longer exists. Choose it again.") from None
    if outcome.status == "failed":
        raise PageError(_unreadable_message(path, kind, outcome.reason))
    if min(outcome.rows, outcome.columns) < MIN_SIDE:
        raise PageError(
            f"{name} has {outcome.rows} x {outcome.columns} pixels (rows x columns), too few for an X-ray: "
            f"each side needs at least {MIN_SIDE}. Choose the original image."
        )
    return _Accepted(path, facts, outcome)


def _wrong_modality_message(name: str, modality: str) -> str:
    what = f"{OTHER_MODALITIES[modality]} (modality {modality})" if modality in OTHER_MODALITIES else f"modality {modality}"
    return f"{name} is a DICOM file of {what}, but the models support only X-rays. Choose an X-ray (modality CR or DX)."


def _unreadable_message(path: Path, kind: str, reason: str) -> str:
    name = _display_name(path)
    stated = re.search(r"states (\d+) x (\d+)", reason)
    if stated and (size := [int(side) for side in stated.groups()]) and size[0] * size[1] > MAX_SAMPLES // 3:
        return (
            f"{name} claims to have {size[0]:,} x {size[1]:,} pixels, more than any X-ray. "
            "It is damaged or malicious. Export it again."
        )
    if re.match(r"not (decoded|read) in", reason):
        return f"{name} took too long to read, so reading was stopped. Export it again or save it as PNG."
    if "crashed" in reason or reason == "out of memory":
        return (
            f"{name} crashed the program that reads it and is probably damaged. Nothing else was affected. Export it again."
        )
    if not kind:
        return f"{name} is not an image that can be read here: it is neither DICOM nor PNG, JPEG or GIF. {CHOOSE_IMAGE}"
    detail = _without_quotations(reason.replace(str(path), "the file"))
    return f"{name} is a damaged or incomplete {kind} file ({detail}). Copy or export it again."


def _without_quotations(message: str) -> str:
    """Return an error text without the parts that quote the file, because they may contain the patient's name."""
    return printable(re.sub(r"""(?<![A-Za-z])b?(['"]).*\1(?![A-Za-z])""", "…", message), 160)


def _open_image(image_id: str, key: str, upload: _Accepted) -> OpenedImage:
    rows, columns = upload.outcome.rows, upload.outcome.columns
    return OpenedImage(
        image_id,
        key,
        upload.path,
        rows,
        columns,
        is_dicom=upload.facts.kind == "DICOM",
        facts={**upload.facts.shown, "Size": f"{rows} x {columns} (rows x columns)"},
        remarks=tuple(_remarks(upload)),
    )


def _remarks(upload: _Accepted) -> Iterator[str]:
    if upload.facts.coloured:
        yield "The image is in colour; only its brightness is shown and used by the models."
    if upload.facts.view in LATERAL:
        yield "The file says that this is a lateral view; the models support only frontal views."
    body_part = upload.facts.body_part
    if body_part and body_part != ILLEGIBLE and not any(part in body_part for part in CHEST):
        yield f"The file says that the body part is {body_part}, not the chest; the models support only chest X-rays."
    for warning in upload.outcome.warnings:
        yield f"The file has an unusual value: {_without_quotations(warning)}."


def _study_id(files: list[FileFacts], first_image: str) -> tuple[str, list[str]]:
    """Return the study's id, and remarks if the headers state different studies or patients.

    The remarks leave out the differing values, which identify patients.
    """
    studies, patients = ({getattr(facts, name) for facts in files} - {""} for name in ("study_id", "patient_id"))
    remarks = [
        f"The headers of these files state several {what}; the files are still treated as one study."
        for what, ids in (("patients", patients), ("studies", studies))
        if len(ids) > 1
    ]
    agreed = studies.pop() if len(studies) == 1 else ""
    # A UID has at most 64 characters. With a damaged length, the value contains the next elements, even the patient's name.
    return agreed if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{,63}", agreed) else first_image, remarks


def _display_name(path: Path) -> str:
    return printable(path.name, 60) or "The file"


def _free_id(path: Path, used_ids: set[str]) -> str:
    # If the part after the last dot is a number, the name is a UID without a suffix.
    plain = _plain_id(path.name if path.suffix[1:].isdigit() else path.stem) or "image"
    number = 2
    image_id = plain
    while image_id in used_ids:
        image_id, number = f"{plain}-{number}", number + 1
    return image_id


def _plain_id(text: str) -> str:
    """Return `text` as an id of at most 100 characters that is safe in CSV and HTML, or "" if no letter or digit remains.

    Accents are removed, other characters are replaced with `_`.
    """
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", bare).lstrip(".")[:100]
    return plain if re.search(r"[A-Za-z0-9]", plain) else ""
