"""Examples and augmentation, the training loop, one driver for all model families, pseudo-labels.

No networks and no reports.
"""
