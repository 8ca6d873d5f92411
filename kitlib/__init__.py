"""The library behind the notebooks: chest X-rays from DICOM files to a competition's submission.

The modules directly in kitlib define what all parts share, such as tables, settings and errors. Everything else is in
sub-packages called rooms, each named for its task. A room imports only from the rooms before it: recipes, xrays, datasets,
scoring, phantoms, lungs, fusion, models, runs, inference, training, reports, kernels, plans, leaderboard, page (checked by
`tests/test_rooms.py`).
"""

__version__ = "0.1.0"
