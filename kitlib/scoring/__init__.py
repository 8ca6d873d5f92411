"""Metrics, SIIM-COVID's score, and reading, writing and validation of submission files.

Does not belong here: models, and fitting of ensembles.
"""
