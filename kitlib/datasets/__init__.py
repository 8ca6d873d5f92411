"""Readers: one a data set, all giving the same tables (kitlib.tables), and folds, leak checks and data sheet on top.

No pixels beyond what a reader must look at, and nothing of any model.
"""
