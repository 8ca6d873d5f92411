"""Chest X-ray competitions, one file each: classes, ground truth, rows of a submission, metric, limits; and all by name.

Does not belong here: images, models, and metrics that several competitions share, which are in kitlib.scoring.
"""
