"""Finds the lungs in an image; crops the image to their frame and blackens the pixels outside them, as a model requires.

Does not belong here: networks and training; the segmenter is in models, training and inference.
"""
