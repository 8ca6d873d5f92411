"""The leaderboard: lists all runs in given folders and their subfolders, checks the runs, and ranks their models.

Does not belong here: training and prediction.
"""
