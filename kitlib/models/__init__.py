"""Networks, their losses and predictions for a batch, and their starting weights.

Does not belong here: data loading, optimisers, training loops.
"""
