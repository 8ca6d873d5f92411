"""The competitions that the kit knows, by name.

To add one, write a file that creates a Competition, and add it to COMPETITIONS.
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
    """Find a competition by its name or Kaggle slug. Raises SettingsError, which lists the names, if it is unknown."""
    for competition in COMPETITIONS.values():
        if name in (competition.name, competition.slug):
            return competition
    raise SettingsError(f"unknown competition {name!r}; available: {', '.join(COMPETITIONS)}")


def choose_competition(data: str, rules: str = "") -> tuple[Competition, str]:
    """Return the competition that the parameters `data` and `rules` of a notebook stand for, and `choose_folder(data)`.

    `data` is the name or Kaggle slug of a competition, or another input or path. If `rules` is not empty, the competition is
    the one with this name or slug. If `rules` is empty and `data` is a name, a slug or a path that ends in a slug, `data`
    decides. Otherwise, the header of the sample submission in `data` decides; if no sample submission can be read, the
    competition is siim-covid19, and a warning is logged. Raises SettingsError if `rules` is unknown, if `rules` and `data`
    name different competitions, or if no competition has the sample submission's header.
    """
    known = next((each for each in COMPETITIONS.values() if data in (each.name, each.slug)), None)
    known = known or next((each for each in COMPETITIONS.values() if not rules and Path(data).name == each.slug), None)
    if rules and known and find_competition(rules) is not known:
        raise SettingsError(f"'rules' is {rules!r}, but 'data' ({data!r}) belongs to {known.name!r}; leave 'rules' empty")
    competition = known or (find_competition(rules) if rules else _competition_of_sample(data))
    return competition, choose_folder(data)


def choose_folder(data: str) -> str:
    """Return `data`; but if `data` is a competition's name and not an input's, return the competition's Kaggle slug."""
    if data not in COMPETITIONS:
        return data
    try:
        find_input(data)
    except InputNotFound:
        return COMPETITIONS[data].slug
    return data


def _competition_of_sample(data: str) -> Competition:
    """Return the competition that has the header of the sample submission in `data` (an input's name or a path).

    If no sample submission can be read, returns SIIM_COVID19 and logs a warning. If no competition has the header, returns
    SIIM_COVID19 for ids that end in _study or _image, and raises SettingsError for other ids.
    """
    try:
        sample = find_sample(find_input(data))
        header = tuple(read_text_table(sample).columns)
    except (InputNotFound, SubmissionError, TableError) as error:
        logger.warning("assuming %s, because no sample submission was read from %r: %s", SIIM_COVID19.name, data, error)
        return SIIM_COVID19
    if found := [each for each in COMPETITIONS.values() if each.header == header]:
        return found[0]
    try:
        SIIM_COVID19.read_sample(sample)  # accepts any header, or none
    except SubmissionError as error:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(
            f"{sample} has the header {','.join(header)[:80]}, which no known competition has; set `rules` to one of {names}"
        ) from error
    return SIIM_COVID19


def find_data(dataset: str, folder: str = "") -> tuple[str, str]:
    """Return a data set's name (a key of kitlib.datasets.registry.READERS) and the input folder that contains its files.

    `dataset` is the name of a data set, or the name or Kaggle slug of a competition, for the competition's training data. If
    `folder` is given, the input folder is `choose_folder(folder)`. Otherwise, it is the slug of the competition whose
    training data is the data set. Raises SettingsError if there is no such competition.
    """
    known = next((each for each in COMPETITIONS.values() if dataset in (each.name, each.slug, each.dataset)), None)
    if known is None and not folder:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(f"{dataset!r} is not a competition, so also give the folder of its files; competitions: {names}")
    return (known.dataset, choose_folder(folder) or known.slug) if known else (dataset, choose_folder(folder))
