"""Phantoms: synthetic chest X-rays, written in the folder layout of each public data set.

Code for real data does not depend on this package.
"""
