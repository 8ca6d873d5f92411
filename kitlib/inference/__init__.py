"""Trained bundles to answers: prediction, lung masks, and a whole submission under a deadline.

No training library is imported here: a kernel that submits carries this room and not training.
"""
