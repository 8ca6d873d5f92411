"""Tables, figures, confidence intervals and heat maps that describe finished runs.

Does not belong here: anything that changes a run.
"""
