"""Reads the published data sets, one reader each, into the same tables (kitlib.tables); makes folds and data sheets of them.

Pixels are read only where a reader needs them. Nothing in this package depends on a model.
"""
