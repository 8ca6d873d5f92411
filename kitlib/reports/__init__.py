"""Tables, figures, intervals, probes and heat maps of finished runs.

Nothing that changes a run.
"""
