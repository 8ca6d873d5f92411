"""Reads data sets into the tables of kitlib.tables; makes folds, checks them for leaks, and makes the data sheet.

Does not belong here: models; decoding pixels, unless a data set cannot be read without it.
"""
