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
    """Return the competition that a notebook's parameters choose, and the input or path of its data.

    `data` is the name or Kaggle slug of a competition, or another input or path; the second result is `choose_folder(data)`.
    If `rules` is not empty, it is the competition's name or slug. If `rules` is empty and `data` is a name, a slug or a path
    whose last folder is a slug, `data` decides. Otherwise, the header of the sample submission in `data` decides. If no
    sample can be read, the competition is siim-covid19, and a warning is logged. Raises SettingsError if `rules` is unknown,
    if `rules` and `data` are names or slugs of different competitions, or if no competition has the sample's header.
    """
    known = next((each for each in COMPETITIONS.values() if data in (each.name, each.slug)), None)
    known = known or next((each for each in COMPETITIONS.values() if not rules and Path(data).name == each.slug), None)
    if rules and known and find_competition(rules) is not known:
        raise SettingsError(f"rules is {rules!r}, but {data!r} is the data of {known.name!r}; leave rules empty")
    competition = known or (find_competition(rules) if rules else _competition_of_sample(data))
    return competition, choose_folder(data)


def choose_folder(data: str) -> str:
    """Return the competition's Kaggle slug if `data` is its name and no input has this name; otherwise return `data`."""
    if data not in COMPETITIONS:
        return data
    try:
        find_input(data)
    except InputNotFound:
        return COMPETITIONS[data].slug
    return data


def _competition_of_sample(data: str) -> Competition:
    """Return the competition whose header is that of the sample submission in `data`, an input or folder.

    If no sample can be read, returns SIIM_COVID19 and logs a warning. If no competition has the header, returns SIIM_COVID19
    if the ids end in _study or _image, and otherwise raises SettingsError.
    """
    try:
        sample = find_sample(find_input(data))
        header = tuple(read_text_table(sample).columns)
    except (InputNotFound, SubmissionError, TableError) as error:
        logger.warning("using the rules of %s, because %r has no readable sample: %s", SIIM_COVID19.name, data, error)
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

    `dataset` is the name of a data set, or the name or Kaggle slug of a competition, which stands for the data set with its
    training data. If `folder` is given, the second result is `choose_folder(folder)`. If `folder` is empty, the second
    result is the slug of the competition with this training data. Raises SettingsError if there is no such competition.
    """
    known = next((each for each in COMPETITIONS.values() if dataset in (each.name, each.slug, each.dataset)), None)
    if known is None and not folder:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(f"{dataset!r} is not a competition, so also give the folder of its files; competitions: {names}")
    return (known.dataset, choose_folder(folder) or known.slug) if known else (dataset, choose_folder(folder))
