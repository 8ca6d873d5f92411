"""Combines several models' predictions: box fusion, votes, means, FLANNEL, stacking, tuning, and ensemble bundles.

Its functions take and return tables and arrays. Does not belong here: images, and networks except FLANNEL's linear layer.
"""
