"""Files that somebody chose become one study; what cannot be shown is refused in sentences that say what to do."""

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kitlib.errors import CacheError, PageError, UnreadableXray
from kitlib.page.file_facts import CHOOSE_IMAGE, ILLEGIBLE, FileFacts, foreign, printable, promised_kind, read_facts
from kitlib.page.opened_study import DecodedCopies, OpenedImage, OpenedStudy
from kitlib.xrays.header import MAX_SAMPLES
from kitlib.xrays.worker import Outcome

MAX_UPLOAD_BYTES = 100_000_000
MOST_IMAGES = 16  # of one study
LEAST_SIDE = 16  # pixels: a smaller picture is an icon

# Computed, digital, digitised film, fluoroscopy; and what says nothing of the image: other, secondary capture, none.
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
    """One study of the files `paths`, decoded to at most `longest_side` pixels a side in the processes of `copies`.

    An image is named by its file, the study by StudyInstanceUID where the DICOM files have one and agree, and by its first
    image elsewhere; both are made of letters, digits, `.`, `_` and `-`. A file that cannot be shown is left out, and the
    study's remarks say why. Raises PageError where none is left.
    """
    if not paths:
        raise PageError(f"No file was chosen. {CHOOSE_IMAGE}")
    if len(paths) > MOST_IMAGES:
        raise PageError(f"{len(paths)} files were chosen, and a study has at most {MOST_IMAGES} here. Choose fewer.")
    accepted: dict[str, _Accepted] = {}
    remarks, refusals = [], []
    for path in map(Path, paths):
        try:
            key = _digest_of_sensible(path)
            if key in accepted:
                remarks.append(f"{_name(path)} is the same file as {_name(accepted[key].path)} and counts once.")
            else:
                accepted[key] = _accept(path, key, copies, longest_side)
        except PageError as refused:
            refusals.append(str(refused))
    if not accepted:
        raise PageError(" ".join(refusals))

    images, taken = [], set[str]()
    for key, one in accepted.items():
        image_id = _free_id(one.path, taken)
        taken.add(image_id)
        images.append(_image(image_id, key, one))
    study_id, disagreements = _study_id([one.facts for one in accepted.values()], images[0].image_id)
    left_out = [f"Left out: {refusal}" for refusal in refusals]
    return OpenedStudy(study_id, tuple(images), copies, remarks=(*left_out, *remarks, *disagreements))


def _digest_of_sensible(path: Path) -> str:
    """32 hexadecimal digits of the file's bytes, once it is a file of a size that an X-ray can have."""
    name = _name(path)
    try:
        str(path).encode()  # tables hold whole letters alone
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise PageError(f"{name} is a folder or a device and no file. {CHOOSE_IMAGE}")
        if not status.st_size:
            raise PageError(f"{name} is empty. Copy or export it again.")
        if status.st_size > MAX_UPLOAD_BYTES:
            most = f"{MAX_UPLOAD_BYTES / 1e6:,.0f} MB"
            raise PageError(f"{name} is larger than the {most} that a file may have here. Choose a single X-ray.")
        if told := foreign(path):
            raise PageError(f"{name} is {told[0]} and no image that can be read here. {told[1]}")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except PageError:
        raise
    except (OSError, ValueError):  # gone; a name with a zero byte, or one that is no UTF-8
        raise PageError(f"{name} cannot be opened. Give it a shorter, plainer name and choose it again.") from None


def _accept(path: Path, key: str, copies: DecodedCopies, longest_side: int) -> _Accepted:
    name, kind = _name(path), ""
    try:
        kind = promised_kind(path)
        facts = copies.ask(read_facts, path)
        if facts.modality not in XRAY_MODALITIES:
            raise PageError(_another_modality(name, facts.modality))
        if facts.kind == "DICOM" and facts.coloured:
            raise PageError(
                f"{name} is a DICOM file in colour, as ultrasound and photographs are, and X-rays are grey. "
                "If it is an X-ray with coloured marks, export it in grey, or as PNG."
            )
        outcome = copies.decode(key, path, longest_side)
    except UnreadableXray as error:
        raise PageError(_unreadable(path, kind, error.reason)) from None
    except CacheError:
        raise PageError(
            f"{name} cannot be opened because this computer's disk is full or cannot be written. "
            "Free some space, or tell whoever runs this page."
        ) from None
    except OSError:
        raise PageError(f"{name} is gone. Choose it again.") from None
    if outcome.status == "failed":
        raise PageError(_unreadable(path, kind, outcome.reason))
    if min(outcome.rows, outcome.columns) < LEAST_SIDE:
        raise PageError(
            f"{name} has {outcome.rows} x {outcome.columns} pixels (rows x columns), too few for an X-ray: "
            f"at least {LEAST_SIDE} a side are wanted. Choose the original image."
        )
    return _Accepted(path, facts, outcome)


def _another_modality(name: str, modality: str) -> str:
    what = f"{OTHER_MODALITIES[modality]} (modality {modality})" if modality in OTHER_MODALITIES else f"modality {modality}"
    return f"{name} is a DICOM file of {what}, and the models know X-rays alone. Choose an X-ray (modality CR or DX)."


def _unreadable(path: Path, kind: str, reason: str) -> str:
    name = _name(path)
    promised = re.search(r"promises (\d+) x (\d+)", reason)
    if promised and (size := [int(side) for side in promised.groups()]) and size[0] * size[1] > MAX_SAMPLES // 3:
        return (
            f"{name} says that it has {size[0]:,} x {size[1]:,} pixels, more than any X-ray. "
            "It is damaged or made to do harm. Export it again."
        )
    if re.match(r"not (decoded|read) in", reason):
        return f"{name} took too long to read and was given up. Export it again, or save it as PNG."
    if "crashed" in reason or reason == "out of memory":
        return f"{name} brought its reader down, as damaged files do; nothing else was harmed. Export it again."
    if not kind:
        return f"{name} is no image that can be read here: neither DICOM nor PNG, JPEG or GIF. {CHOOSE_IMAGE}"
    told = _unquoted(reason.replace(str(path), "the file"))
    return f"{name} is a damaged or incomplete {kind} file ({told}). Copy or export it again."


def _unquoted(told: str) -> str:
    """What a reader says, without what it quotes of the file: that may be a patient's name in a wrong place."""
    return printable(re.sub(r"""(?<![A-Za-z])b?(['"]).*\1(?![A-Za-z])""", "…", told), 160)


def _image(image_id: str, key: str, one: _Accepted) -> OpenedImage:
    rows, columns = one.outcome.rows, one.outcome.columns
    return OpenedImage(
        image_id,
        key,
        one.path,
        rows,
        columns,
        is_dicom=one.facts.kind == "DICOM",
        facts={**one.facts.shown, "Size": f"{rows} x {columns} (rows x columns)"},
        remarks=tuple(_remarks(one)),
    )


def _remarks(one: _Accepted) -> Iterator[str]:
    if one.facts.coloured:
        yield "The image is in colour; its brightness is what is shown and read."
    if one.facts.view in LATERAL:
        yield "The file says that this is a lateral view; the models know frontal views alone."
    body_part = one.facts.body_part
    if body_part and body_part != ILLEGIBLE and not any(part in body_part for part in CHEST):
        yield f"The file says that this is not a chest but {body_part}; the models know chests alone."
    for warning in one.outcome.warnings:
        yield f"Something in the file is odd: {_unquoted(warning)}."


def _study_id(files: list[FileFacts], first_image: str) -> tuple[str, list[str]]:
    """The study's id, and what to say where the headers do not agree; without the values, which belong to patients."""
    studies, patients = ({getattr(each, name) for each in files} - {""} for name in ("study_id", "patient_id"))
    remarks = [
        f"The files' headers name several {what}; they are answered as one study all the same."
        for what, ids in (("patients", patients), ("studies", studies))
        if len(ids) > 1
    ]
    agreed = studies.pop() if len(studies) == 1 else ""
    # A UID has at most 64 letters; past a damaged length stand the next elements, the patient's too.
    return agreed if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{,63}", agreed) else first_image, remarks


def _name(path: Path) -> str:
    return printable(path.name, 60) or "The file"


def _free_id(path: Path, taken: set[str]) -> str:
    # The last part of a UID is no suffix.
    plain = _plain_id(path.name if path.suffix[1:].isdigit() else path.stem) or "image"
    number = 2
    image_id = plain
    while image_id in taken:
        image_id, number = f"{plain}-{number}", number + 1
    return image_id


def _plain_id(text: str) -> str:
    """At most 100 letters that need no care in a CSV file or a page; accents go, the rest becomes `_`; "" for no letter."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", bare).lstrip(".")[:100]
    return plain if re.search(r"[A-Za-z0-9]", plain) else ""
