"""The competitions that the kit knows, by name.

A sixth is added as a file that makes a Competition, and a line here.
"""

from kitlib.competitions.contract import Competition
from kitlib.competitions.ranzcr_clip import RANZCR_CLIP
from kitlib.competitions.rsna_pneumonia import RSNA_PNEUMONIA
from kitlib.competitions.siim_acr import SIIM_ACR
from kitlib.competitions.siim_covid19 import SIIM_COVID19
from kitlib.competitions.vinbigdata import VINBIGDATA
from kitlib.errors import SettingsError

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

    `data` is the name or slug of a competition, whose data are the input of its slug, or another input or path. `rules` is
    the name of the competition; if it is empty, `data` says it, and other inputs are data of siim-covid19. Raises
    SettingsError for an unknown name in `rules`, and if `data` is another competition.
    """
    known = [each for each in COMPETITIONS.values() if data in (each.name, each.slug)]
    if rules and known and find_competition(rules) is not known[0]:
        raise SettingsError(f"rules is {rules}, but the data are those of {known[0].name}; leave rules empty")
    competition = find_competition(rules) if rules else known[0] if known else SIIM_COVID19
    return competition, known[0].slug if known else data


def find_data(dataset: str, folder: str = "") -> tuple[str, str]:
    """Return the reader of a data set, a key of kitlib.datasets.registry.READERS, and the input folder of its files.

    `dataset` is a reader, or the name or slug of a competition. An empty `folder` is the slug of that competition, or of the
    one whose training data the reader reads; a competition's name is its slug. Raises SettingsError if `folder` is empty and
    there is no such competition.
    """
    folder = COMPETITIONS[folder].slug if folder in COMPETITIONS else folder
    known = next((each for each in COMPETITIONS.values() if dataset in (each.name, each.slug, each.dataset)), None)
    if known is None and not folder:
        names = ", ".join(COMPETITIONS)
        raise SettingsError(f"{dataset!r} is no competition, so its folder must be given; the competitions are {names}")
    return (known.dataset, folder or known.slug) if known else (dataset, folder)
