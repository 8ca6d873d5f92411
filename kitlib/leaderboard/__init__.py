"""The leaderboard: lists all runs below some folders, checks them and ranks their models.

Does not belong here: training and prediction.
"""
