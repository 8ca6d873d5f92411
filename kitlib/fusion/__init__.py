"""Combines the predictions of several models: box fusion, means, votes, FLANNEL, stacking, tuning, the ensemble bundle.

Pure functions of tables. Reads no images and holds no networks except FLANNEL's 2,005 weights.
"""
