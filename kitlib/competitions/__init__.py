"""Chest X-ray competitions, one file each: classes, ground truth, submission rows, metric, limits; and a registry by name.

Does not belong here: images, models, and metrics that several competitions share, which are in kitlib.scoring.
"""
