"""The library behind the notebooks: chest X-rays from DICOM files to a competition's submission.

The modules directly in kitlib define what the whole library uses, such as tables, settings and errors. Everything else is
in sub-packages called rooms, each named for its task. In the following list, a room imports only from the rooms before it
(checked by `tests/test_rooms.py`): recipes, xrays, datasets, scoring, competitions, phantoms, lungs, fusion, models, runs,
inference, training, reports, kernels, plans, leaderboard, page.

Five functions can be imported from kitlib itself: read_xray, predict, train_classifier, draw_boxes and score. The module of
a function is imported when the function is first used, so that `import kitlib` stays fast.
"""

import importlib

__version__ = "0.1.0"

_CALLS = {
    "read_xray": ("kitlib.xrays.image_file", "read_xray"),
    "draw_boxes": ("kitlib.xrays.drawn_boxes", "draw_boxes"),
    "score": ("kitlib.scoring.score", "score_files"),
    "predict": ("kitlib.inference.predict_files", "predict"),
    "train_classifier": ("kitlib.plans.train_classifier", "train_classifier"),
}


def __getattr__(name: str) -> object:
    """Import and return one of kitlib's public functions, such as `predict`. Raises AttributeError for any other name."""
    if name not in _CALLS:
        raise AttributeError(f"module 'kitlib' has no attribute {name!r}; it has the functions {', '.join(_CALLS)}")
    module, attribute = _CALLS[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_CALLS])
