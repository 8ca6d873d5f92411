"""The competitions that the kit knows, by name.

A sixth is added as a file that makes a Competition, and a line here.
"""

import logging
from pathlib import Path

from kitlib.competitions.contract import Competition
from kitlib.competitions.csv_files import find_sample
from kitlib.competitions.ranzcr_clip import RANZCR_CLIP
from kitlib.competitions.rsna_pneumonia import RSNA_PNEUMONIA
from kitlib.competitions.siim_acr import SIIM_ACR
from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.errors import InputNotFound, SettingsError, SubmissionError, TableError
from kitlib.paths import find_input
from kitlib.tables import read_text_table

logger = logging.getLogger(__name__)

COMPETITIONS = {
    competition.name: competition for competition in (SIIM_COVID19, VINBIGDATA, RSNA_PNEUMONIA, RANZCR_CLIP, SIIM_ACR)
}


def find_competition(name: str) -> Competition:
    """Return the competition of this name or Kaggle slug. Raises SettingsError, which lists the names, if there is none."""
    for competition in COMPETITIONS.values():
        if name in (competition.name, competition.slug):
            return competition
    raise SettingsError(f"unknown competition {name!r}; available: {', '.join(COMPETITIONS)}")


def choose_competition(data: str, rules: str = "") -> tuple[Competition, str]:
    """Return a competition, and the name or path of the input with its data, from two parameters of a notebook.

    `data` is the slug or name of a competition, or another input or path. A name stands for the input of its slug, unless
    there is an input of this name. `rules` is the name of the competition; if it is empty, `data` says it, also a path whose
    last folder is a slug, or else the header of the sample submission in the data; data without a readable sample are those
    of siim-covid19, with a warning. Raises SettingsError for an unknown name in `rules`, if `data` is another competition,
    and for a sample of none.
    """
    known = next((each for each in COMPETITIONS.values() if data in (each.name, each.slug)), None)
    known = known or next((each for each in COMPETITIONS.values() if not rules and Path(data).name == each.slug), None)
    if rules and known and find_competition(rules) is not known:
        raise SettingsError(f"rules is {rules}, but the data are those of {known.name}; leave rules empty")
    competition = known or (find_competition(rules) if rules else _competition_of_sample(data))
    return competition, choose_folder(data)


def choose_folder(data: str) -> str:
    """Return the input or path that `data` names: the input of its slug for a competition, unless one is called `data`."""
    if data not in COMPETITIONS:
        return data
    try:
        find_input(data)
    except InputNotFound:
        return COMPETITIONS[data].slug
    return data


def _competition_of_sample(data: str) -> Competition:
    """Return the competition whose header the sample submission in the input or folder `data` has."""
    try:
        sample = find_sample(find_input(data))
        header = tuple(read_text_table(sample).columns)
    except (InputNotFound, SubmissionError, TableError) as error:
        logger.warning("the rules are those of %s, because %r has no readable sample: %s", SIIM_COVID19.name, data, error)
        return SIIM_COVID19
    if found := [each for each in COMPETITIONS.values() if each.header == header]:
        return found[0]
    try:
        SIIM_COVID19.read_sample(sample)  # reads any header, also none
    except SubmissionError as error:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(
            f"{sample} has the header {','.join(header)[:80]}, which is that of no known competition; set `rules` to one of "
            f"{names}"
        ) from error
    return SIIM_COVID19


def find_data(dataset: str, folder: str = "") -> tuple[str, str]:
    """Return the reader of a data set, a key of kitlib.datasets.registry.READERS, and the input folder of its files.

    `dataset` is a reader, or the name or slug of a competition. An empty `folder` is the slug of that competition, or of the
    one whose training data the reader reads; for a competition's name see `choose_folder`. Raises SettingsError if `folder`
    is empty and there is no such competition.
    """
    known = next((each for each in COMPETITIONS.values() if dataset in (each.name, each.slug, each.dataset)), None)
    if known is None and not folder:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(f"{dataset!r} is no competition, so its folder must be given; the competitions are {names}")
    return (known.dataset, choose_folder(folder) or known.slug) if known else (dataset, choose_folder(folder))
