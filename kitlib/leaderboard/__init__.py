"""The leaderboard: every run below a folder, listed, checked and ranked.

Does not belong here: training and prediction.
"""
