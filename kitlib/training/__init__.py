"""Training: examples and augmentation, the loop, one driver for all model families, and pseudo-labels.

Does not belong here: networks and reports.
"""
