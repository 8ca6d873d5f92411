"""Metrics, competition scores, the rows of a submission and their validator: pure functions of tables.

No models, no fitting of ensembles.
"""
