"""The leaderboard: lists, checks and ranks all runs below a folder.

Does not belong here: training and prediction.
"""
