"""Makes plans from options and sizes: each image's resolution, kept tokens and pack.

A plan is made before any pixel is read and is a pure function of (sizes, options, seed, epoch).
"""
