"""Recipes: the fields of each kind of training with their defaults and limits, and the published ones by name.

No code that trains or predicts.
"""
