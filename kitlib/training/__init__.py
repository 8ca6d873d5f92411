"""Training: data sets and augmentation, the training loop, one driver for all model families, and pseudo-labels.

Does not belong here: networks and reports.
"""
