"""Kaggle kernels: build, collect wheels, rehearse, push, submit.

Does not belong here: anything that a notebook imports, except the few lines that start a kernel.
"""
