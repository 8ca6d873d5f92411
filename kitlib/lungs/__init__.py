"""Where the lungs are in an image: finders, frames, crops, and what a model's canvas shows of them.

No networks and no training: the segmenter is in models, training and inference.
"""
