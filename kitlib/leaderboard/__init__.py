"""Which run is best: every run below a folder, listed, checked and ranked.

No training, no prediction.
"""
