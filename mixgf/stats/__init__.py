"""Statistics on arrays: tests and intervals over donors, intervals of proportions and AUROC, effects beyond gene rank.

NumPy arrays in, NumPy arrays or `Interval`s out; no files, no AnnData.
"""
