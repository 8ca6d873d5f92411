"""Recipes: the fields of each kind of training with defaults and valid ranges, and the published recipes by name.

Does not belong here: code that trains or predicts.
"""
