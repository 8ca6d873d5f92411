"""Tables, figures, confidence intervals, probes and heat maps of finished runs.

Does not belong here: anything that changes a run.
"""
