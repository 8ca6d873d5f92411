"""Training recipes: the fields of each kind with defaults and valid ranges, and the published recipes by name.

Does not belong here: code that trains or predicts.
"""
