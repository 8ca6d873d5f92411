"""Reads BIMCV-COVID19+ and BIMCV-COVID19- (de la Iglesia Vaya et al. 2020): X-rays labelled by their radiology reports."""

import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset
from kitlib.datasets.data_folder import DataFolder, read_csv
from kitlib.datasets.diagnoses import diagnosis_dataset, parse_ages
from kitlib.datasets.faults import Faults
from kitlib.errors import DatasetError
from kitlib.xrays.json_header import json_header_path, read_json_header

NAME = re.compile(r"sub-(S\d+)_ses-(E\d+)_.*?(?:vp-([a-z]+)_)?(?:cr|dx)", re.IGNORECASE)
# Folder names of the two sets: covid19_posi or BIMCV-COVID19+, covid19_neg or BIMCV-COVID19-.
POSITIVE, NEGATIVE = re.compile(r"posi(tive)?(?![a-z])|\+", re.I), re.compile(r"neg(ative)?(?![a-z])|-$", re.I)
# Whole words are compared, because "Mujer" (female) starts with the same letter as "male".
UNKNOWN_SEX = dict.fromkeys(("", "none", "nan"), "")
SEXES = {"m": "M", "male": "M", "hombre": "M", "f": "F", "female": "F", "mujer": "F"} | UNKNOWN_SEX
FRONTAL = ("ap", "pa")
QUOTED = re.compile("'([^']*)'" + '|"([^"]*)"')  # a label in single or double quotes
KNOWN_DIAGNOSES = ("COVID-19", "pneumonia", "normal", "other")
LABELS, PARTICIPANTS = "derivatives/labels/*.tsv", "participants.tsv"
TABLES = (".tsv", ".csv", ".json", ".jsonl")
COLUMNS = ("ReportID", "Labels")
HOW_TO_GET = "https://bimcv.cipf.es/bimcv-projects/bimcv-covid19, see inputs/README.md"


def read_bimcv(folder: str | Path | DataFolder, progress: bool = True) -> Dataset:
    """Read frontal X-rays of the positive set, the negative set or both: files sub-*_ses-*_cr.png or *_dx.png in `folder`.

    The diagnosis comes from the report of the image's session, a row of `derivatives/labels/*.tsv`. The column ReportID has
    the session, the column Labels a list. The diagnosis is "COVID-19" if the list contains "COVID 19", "normal" if "normal"
    is the only label, "pneumonia" if the list contains "pneumonia", otherwise "other".

    The set of an image is stated by the name of a folder that contains the image: `posi` or `+` means the positive set;
    `neg`, or `-` at the end, the negative set. If several folders state a set, the innermost one decides; if none does, the
    names of the tables decide. From the positive set, only images with a report of COVID 19 are used, because the patients
    were also X-rayed before and after the disease. From the negative set, images with a report of COVID 19 are left out,
    because the report contradicts the negative test.

    Also left out and recorded in `Dataset.faults`: images without a report, images named neither `vp-ap` nor `vp-pa`, and
    unreadable images. Sex and age come from `participants.tsv`, if present. A 16-bit PNG contains the stored values of a
    DICOM file, which are decoded with the DICOM header in the JSON file of the same name. An invalid header is ignored and
    recorded in `Dataset.faults`. Raises DatasetError if there is no image or no table of labels, or if neither the folders
    nor the tables state the set of an image.
    """
    source = DataFolder.of(folder)
    folder, faults = source.folder, source.faults
    rows, unnamed = [], []
    for stem, path in source.find_images().items():
        match = NAME.match(stem)
        if match:
            positive = _is_positive(path, source)
            rows.append((stem, match[1].upper(), match[2].upper(), (match[3] or "").lower(), str(path), positive))
        else:
            unnamed.append(source.name(path))
    faults.add_summary("the folder", unnamed, "have no name such as sub-S1_ses-E1_..._cr or _dx; left out", "other images")
    if not rows:
        raise DatasetError(
            f"{folder} has {len(source.paths)} files, but no image such as sub-S1/ses-E1/mod-rx/sub-S1_ses-E1_..._cr.png; "
            f"unpack the archives of the images there: {HOW_TO_GET}"
        )
    table = pd.DataFrame(rows, columns=["image_id", "subject", "session", "view", "path", "positive"])
    reports = _read_reports(source)
    table = _drop_rows(table, ~table["view"].isin(FRONTAL), "are named neither vp-ap nor vp-pa; left out", faults)
    table = _drop_rows(table, ~table.session.isin(reports), "have no report; left out", faults)
    table = table.assign(diagnosis=table.session.map(reports))
    has_other_report = table.positive & (table.diagnosis != "COVID-19")
    table = _drop_rows(table, has_other_report, "are from the positive set without a report of COVID 19; left out", faults)
    is_contradicted = ~table.positive & (table.diagnosis == "COVID-19")
    table = _drop_rows(table, is_contradicted, "are from the negative set with a report of COVID 19; left out", faults)
    has_broken_header = [_has_broken_header(path) for path in table.path]
    faults.add_summary("mod-rx", table.image_id[has_broken_header], "have an invalid JSON header; decoded without it")
    people = _read_participants(source)
    return diagnosis_dataset(
        pd.DataFrame(
            {
                "image_id": table.image_id,
                "patient_id": "bimcv-" + table.subject,
                "path": table.path,
                "source": "bimcv",
                "view": table["view"].str.upper(),
                "diagnosis": table.diagnosis,
                "sex": table.subject.map(people.sex).fillna(""),
                "age": table.subject.map(people.age),
            }
        ),
        source,
        KNOWN_DIAGNOSES,
        HOW_TO_GET,
        progress=progress,
    )


def _is_positive(path: Path, source: DataFolder) -> bool:
    """Return True for an image of the positive set, False for an image of the negative set (the rule is in `read_bimcv`).

    Raises DatasetError if no folder states a set, and the names of the tables state no set or both sets.
    """
    for name in (*reversed(source.folders(path)), source.folder.name):
        if (is_positive := _stated_set(name)) is not None:
            return is_positive
    stated_by_tables = {_stated_set(table.stem) for table in source.paths if table.suffix.lower() in TABLES} - {None}
    if len(stated_by_tables) == 1:
        return bool(stated_by_tables.pop())
    raise DatasetError(
        f"{path}: neither its folders nor the names of the tables say whether this image is from the positive or the "
        "negative set. Give the folder of the positive set a name like covid19_posi or BIMCV-COVID19+, and the folder of "
        "the negative set a name like covid19_neg or BIMCV-COVID19-"
    )


def _stated_set(name: str) -> bool | None:
    """Return True if `name` states the positive set, False if it states the negative set, None if neither or both."""
    positive, negative = bool(POSITIVE.search(name)), bool(NEGATIVE.search(name))
    return positive if positive != negative else None


def _has_broken_header(path: str) -> bool:
    try:
        if header := json_header_path(path):
            read_json_header(header)
    except ValueError:
        return True
    return False


def _drop_rows(table: pd.DataFrame, wrong: pd.Series, problem: str, faults: Faults) -> pd.DataFrame:
    faults.add_summary("mod-rx", table.image_id[wrong], problem)
    return table[~wrong]


def _read_reports(source: DataFolder) -> dict[str, str]:
    """Return a dict from session id to diagnosis, from all label tables. Raises DatasetError if no diagnosis can be read."""
    diagnoses = {}
    for path in source.find((".tsv",)):
        table = read_csv(path, (), separator="\t")
        if not set(COLUMNS) <= set(table):
            continue
        for report, cell in zip(table.ReportID, table.Labels, strict=True):
            # Separated by commas, tabs (cxr_covid) or blanks (NumPy); Python would join the strings 'a'\t'b' into one.
            labels = {(single or double).strip().lower() for single, double in QUOTED.findall(cell)}
            if not re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL) or QUOTED.sub("", cell).strip("[], \t\n"):
                source.faults.add(path.name, report, "the labels are not a list; the report is not used")
                continue
            diagnoses[report.removeprefix("ses-").upper()] = _diagnosis(labels)
    if not diagnoses:
        raise DatasetError(
            f"no table {source.folder}/{LABELS} has the columns {', '.join(COLUMNS)} and valid labels; fetch the metadata "
            f"there: {HOW_TO_GET}"
        )
    return diagnoses


def _diagnosis(labels: set[str]) -> str:
    if "covid 19" in labels:
        return "COVID-19"
    if labels == {"normal"}:
        return "normal"
    return "pneumonia" if "pneumonia" in labels else "other"


def _read_participants(source: DataFolder) -> pd.DataFrame:
    """Return the sex and age of each patient, a table with the subject id as index; empty without a participants.tsv."""
    faults = source.faults
    tables = [pd.DataFrame({"sex": [], "age": []})]
    for path in source.find((".tsv",), lambda path: path.name.lower() == PARTICIPANTS):
        table = read_csv(path, (), separator="\t")
        if {"participant", "age", "gender"} <= set(table):
            # A participant with several sessions has a list of ages, which differ by a year at most.
            first_age = table.age.str.extract(r"(\d+)", expand=False).fillna("")
            years = parse_ages(first_age, table.participant, faults, path.name)
            gender = table.gender.str.strip().str.lower()
            faults.add_summary(
                path.name,
                table.participant[~gender.isin(SEXES)],
                "have an unknown value of gender; the sex is unknown",
            )
            sex = gender.map(SEXES).fillna("").tolist()
            subject = table.participant.str.removeprefix("sub-").str.upper()
            tables.append(pd.DataFrame({"sex": sex, "age": years.to_numpy()}, index=subject))
    people = pd.concat(tables)
    return people[~people.index.duplicated()]
