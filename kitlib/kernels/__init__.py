"""Kaggle kernels: build, collect wheels, rehearse, push, submit.

Notebooks import nothing from here except the few lines that start a kernel.
"""
