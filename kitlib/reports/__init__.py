"""Tables, figures, bootstrap intervals, probes and heat maps of finished runs.

Nothing in this package changes a run.
"""
