"""The library behind the notebooks: chest X-rays from DICOM files to a competition's submission.

A few plain modules hold vocabulary and contracts; everything else lies in rooms, folders named for what a person comes for.
A room imports only from rooms before it: recipes, xrays, datasets, scoring, phantoms, lungs, fusion, models, runs,
inference, training, reports, kernels, plans, leaderboard, page (`tests/test_rooms.py` holds them to it).
"""

__version__ = "0.1.0"
