"""Turns trained bundles into predictions, lung masks and complete submissions before a deadline.

Does not belong here: training libraries, because a submission kernel contains this folder but not kitlib.training.
"""
