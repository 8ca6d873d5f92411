"""Finds the lungs in an image, and crops, masks and draws X-rays on a model's canvas accordingly.

Contains no network and no training; the segmenter is in models, training and inference.
"""
