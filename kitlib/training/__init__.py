"""Training: data sets and augmentation, the training loop, one driver for all model families, pseudo-labels.

Networks are in kitlib.models, reports in kitlib.reports.
"""
