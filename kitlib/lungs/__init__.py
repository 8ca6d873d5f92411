"""Where the lungs are in an image: finders, frames, crops, and how they change what a model is shown.

Does not belong here: networks and training; the segmenter is in models, training and inference.
"""
