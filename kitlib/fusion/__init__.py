"""Fusion of several models' predictions: boxes, votes, means, FLANNEL, stacking, tuning, and the ensemble bundle.

Pure functions of tables. Does not belong here: images; networks other than FLANNEL's 2,005 weights.
"""
