"""Options and sizes to a plan: each image's resolution, kept tokens and pack.

Made before a pixel is read, a pure function of (sizes, options, seed, epoch).
"""
