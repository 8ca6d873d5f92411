"""Synthetic X-rays, written in the layout of each public data set.

Nothing that real data would need.
"""
