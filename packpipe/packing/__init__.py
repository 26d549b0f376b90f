"""Decides which examples share a pack of seq_len tokens, from their lengths alone.

Takes and returns integers. The work is done by numba kernels, behind functions that check their
arguments. Nothing here depends on images.
"""
