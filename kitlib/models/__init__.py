"""Networks, their losses and predictions for a batch, and their starting weights.

Contains no data loading, no optimisers and no training loops.
"""
