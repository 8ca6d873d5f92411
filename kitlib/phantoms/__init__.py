"""Phantoms: synthetic X-rays, written in the file layout of each public data set.

Does not belong here: anything that real data needs.
"""
