"""Uses trained models: to predict any image files, to find lungs, or to write a complete submission before a deadline.

Does not belong here: code that imports training libraries. A submission kernel contains this folder, not kitlib.training.
"""
