"""Networks, what turns a batch into losses or answers, and the weights they start from.

No data loading, no optimisers, no loops.
"""
