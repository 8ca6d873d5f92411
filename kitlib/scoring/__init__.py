"""Metrics, competition scores, and the rows of a submission with their validator: pure functions of tables.

Does not belong here: models; fitting of ensembles.
"""
