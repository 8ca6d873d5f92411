"""Metrics, the competition score, reading, writing and validating submissions: pure functions of tables.

Contains no models and no training of ensembles.
"""
