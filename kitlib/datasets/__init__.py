"""Readers of data sets, which all return the tables of kitlib.tables; folds, checks for leaks, and the data sheet.

Does not belong here: models; decoding pixels, beyond what a reader has to inspect.
"""
