"""Where the lungs are in an image: finders, frames and crops, and how these change a model's input.

Does not belong here: networks and training; the segmenter is in models, training and inference.
"""
