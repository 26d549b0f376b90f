"""Lengths to packs: which examples share a row of seq_len tokens.

Integers in, integers out; kernels of numba behind checked fronts. Knows nothing of images.
"""
