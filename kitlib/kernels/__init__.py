"""Kaggle kernels: build the notebook and its datasets, collect wheels, rehearse offline, push.

Notebooks import nothing from this package; only the source of `start.py` is copied into a kernel's first cell.
"""
