"""Kaggle kernels: build, wheels, rehearse, push.

Nothing that a notebook imports, except the few lines that start a kernel.
"""
