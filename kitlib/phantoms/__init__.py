"""Phantoms: synthetic X-rays in the file layouts of the public data sets.

Does not belong here: code that is needed for real data.
"""
