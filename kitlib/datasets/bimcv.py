"""Reads BIMCV-COVID19+ and BIMCV-COVID19- (de la Iglesia Vaya et al. 2020): X-rays with the labels of their reports."""

import ast
import re
from pathlib import Path

import pandas as pd

from kitlib.datasets.base import Dataset, Faults
from kitlib.datasets.diagnoses import SUFFIXES, ages, diagnosis_dataset
from kitlib.errors import DatasetError

NAME = re.compile(r"sub-(S\d+)_ses-(E\d+)_.*?(?:vp-([a-z]+)_)?(?:cr|dx)", re.IGNORECASE)
# How folders call the two sets: covid19_posi or BIMCV-COVID19+, covid19_neg or BIMCV-COVID19-.
POSITIVE, NEGATIVE = re.compile(r"posi|\+", re.IGNORECASE), re.compile(r"neg|-$", re.IGNORECASE)
# By whole words: "Mujer" begins as "male" does.
UNTOLD = dict.fromkeys(("", "none", "nan"), "")
SEXES = {"m": "M", "male": "M", "hombre": "M", "f": "F", "female": "F", "mujer": "F"} | UNTOLD
FRONTAL = ("ap", "pa")
KNOWN = ("COVID-19", "pneumonia", "normal", "other")
LABELS, PARTICIPANTS = "derivatives/labels/*.tsv", "participants.tsv"
COLUMNS = ("ReportID", "Labels")
GOT = "https://bimcv.cipf.es/bimcv-projects/bimcv-covid19, see inputs/README.md"


def read_bimcv(folder: str | Path, progress: bool = True) -> Dataset:
    """The frontal images sub-*/ses-*/mod-rx/*.png below `folder`, of the positive set, the negative one, or both.

    A report (`derivatives/labels/*.tsv`, columns ReportID, which is the session, and Labels, a list) says what an image
    shows: "COVID 19" is COVID-19, alone "normal" is normal, "pneumonia" without either is pneumonia, anything else other.
    Of the positive set (the nearest folder that says so has `posi` or `+` in its name) only reports of COVID 19 count, for
    its patients were also X-rayed before and after; of the negative one (`neg` in the name, or `-` at its end) such a
    report contradicts the test. Both are left out and counted, as are images without a report, of no or another view than
    `vp-ap` and `vp-pa`, and unreadable ones. Sex and age are from `participants.tsv`, where it is. Raises DatasetError where
    no image or no table of labels is there, and for an image of which no folder says the set.
    """
    folder, faults = Path(folder), Faults()
    rows = []
    for path in sorted(folder.rglob("mod-rx/*")):
        match = NAME.match(path.stem)
        if path.suffix.lower() in SUFFIXES and match:
            positive = _is_positive(path, folder)
            rows.append((path.stem, match[1].upper(), match[2].upper(), (match[3] or "").lower(), str(path), positive))
        elif path.suffix.lower() in SUFFIXES:
            faults.add(str(path.relative_to(folder)), path.stem, "is not called sub-S1_ses-E1_..._cr or _dx; left out")
    if not rows:
        raise DatasetError(f"{folder} holds no image sub-*/ses-*/mod-rx/*.png: unpack the archives there, {GOT}")
    table = pd.DataFrame(rows, columns=["image_id", "subject", "session", "view", "path", "positive"])
    reports = _reports(folder, faults)
    table = _without(table, table.image_id.duplicated(), "occur again; the first one is used", faults)
    table = _without(table, ~table["view"].isin(FRONTAL), "are called neither vp-ap nor vp-pa; left out", faults)
    table = _without(table, ~table.session.isin(reports), "have no report; left out", faults)
    table = table.assign(diagnosis=table.session.map(reports))
    another = table.positive & (table.diagnosis != "COVID-19")
    table = _without(table, another, "of the positive set have another report; left out", faults)
    contradicted = ~table.positive & (table.diagnosis == "COVID-19")
    table = _without(table, contradicted, "of the negative set have a report of COVID 19; left out", faults)
    people = _participants(folder, faults)
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
        folder,
        faults,
        KNOWN,
        GOT,
        progress=progress,
    )


def _is_positive(path: Path, folder: Path) -> bool:
    for name in reversed(path.relative_to(folder.parent).parts[:-1]):
        positive, negative = bool(POSITIVE.search(name)), bool(NEGATIVE.search(name))
        if positive != negative:
            return positive
    raise DatasetError(
        f"{path}: no folder says whether it is of the positive set or the negative one; call the sets' folders covid19_posi "
        "or BIMCV-COVID19+, and covid19_neg or BIMCV-COVID19-"
    )


def _without(table: pd.DataFrame, wrong: pd.Series, why: str, faults: Faults) -> pd.DataFrame:
    faults.count("mod-rx", table.image_id[wrong], why)
    return table[~wrong]


def _reports(folder: Path, faults: Faults) -> dict[str, str]:
    """Session -> diagnosis, of all tables of labels."""
    told = {}
    for path in sorted(folder.rglob(LABELS)):
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        if not set(COLUMNS) <= set(table):
            continue
        for report, cell in zip(table.ReportID, table.Labels, strict=True):
            try:
                labels = {str(label).strip().lower() for label in ast.literal_eval(cell)}
            except (ValueError, SyntaxError, TypeError):
                faults.add(path.name, report, "the labels are no list; the report is not used")
                continue
            told[report.removeprefix("ses-").upper()] = _diagnosis(labels)
    if not told:
        raise DatasetError(f"{folder} has no {LABELS} with the columns {', '.join(COLUMNS)}: fetch the metadata, {GOT}")
    return told


def _diagnosis(labels: set[str]) -> str:
    if "covid 19" in labels:
        return "COVID-19"
    if labels == {"normal"}:
        return "normal"
    return "pneumonia" if "pneumonia" in labels else "other"


def _participants(folder: Path, faults: Faults) -> pd.DataFrame:
    """Sex and age by subject; empty where no table is there."""
    tables = [pd.DataFrame({"sex": [], "age": []})]
    for path in sorted(folder.rglob(PARTICIPANTS)):
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        if {"participant", "age", "gender"} <= set(table):
            # A participant with several sessions has a list of ages; they differ by a year at most.
            first = table.age.str.extract(r"(\d+)", expand=False).fillna("")
            years = ages(first, table.participant, faults, path.name)
            told = table.gender.str.strip().str.lower()
            faults.count(path.name, table.participant[~told.isin(SEXES)], "have a gender of another word; not used")
            sex = told.map(SEXES).fillna("").tolist()
            subject = table.participant.str.removeprefix("sub-").str.upper()
            tables.append(pd.DataFrame({"sex": sex, "age": years.to_numpy()}, index=subject))
    people = pd.concat(tables)
    return people[~people.index.duplicated()]
