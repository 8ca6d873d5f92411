"""Predictions of several models to one answer: boxes, votes, means, FLANNEL, stacking, tuning, the ensemble bundle.

Pure functions of tables; no images and no networks but FLANNEL's 2,005 weights.
"""
