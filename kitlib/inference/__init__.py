"""Prediction with trained bundles, lung segmentation, and a complete submission under a deadline.

Imports no training library, because a submission kernel includes this room but not training.
"""
