"""Networks, with their losses, their predictions for a batch, and their starting weights.

Does not belong here: data loading, optimisers, training loops.
"""
