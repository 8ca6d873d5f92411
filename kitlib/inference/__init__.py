"""From trained bundles to predictions, lung masks, and a whole submission under a deadline.

Does not belong here: training libraries, because a submission kernel carries this room and not training.
"""
