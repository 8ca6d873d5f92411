"""Training: data sets, augmentation, the training loop, a driver that trains any model family, and pseudo-labels.

Does not belong here: code of networks or reports.
"""
