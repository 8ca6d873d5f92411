"""Predicts with trained models: any files, lung masks, or a complete submission before a deadline.

Does not belong here: training libraries, because a submission kernel contains this folder but not kitlib.training.
"""
