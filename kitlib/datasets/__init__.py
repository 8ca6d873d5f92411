"""Data set readers, which all return the same tables (kitlib.tables), and folds, leak checks and the data sheet.

Does not belong here: pixels beyond what a reader has to inspect; models.
"""
