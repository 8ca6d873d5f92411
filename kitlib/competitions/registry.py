"""The competitions that the kit can score and validate, by name.

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
    """Return the competition of this name. Raises SettingsError, which lists the names, if there is none."""
    if name not in COMPETITIONS:
        raise SettingsError(f"unknown competition {name!r}; available: {', '.join(COMPETITIONS)}")
    return COMPETITIONS[name]
