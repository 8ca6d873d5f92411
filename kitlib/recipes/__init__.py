"""Training recipes: their fields with defaults and valid values, and the published recipes, each with a name.

Does not belong here: code that trains or predicts.
"""
