"""Converts pixels to tokens and back.

A token is a patch of P·P pixels, stored by row, column and channel, the channel fastest. The
tokens of an image are in raster order of its patch grid.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def patchify(
    pixels: NDArray[np.uint8], out: NDArray[np.uint8], kept: NDArray[np.integer] | None = None
) -> None:
    """Write the patches of an image, all or some, into out; without a copy in between if all.

    Args:
        pixels: uint8[rows·P, columns·P, 3].
        out: uint8[tokens, P·P·3], contiguous, written; its width gives P.
        kept: int[tokens], which patches in raster order; None for all, rows·columns.
    """
    patch_size = side_of(out.shape[1])
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    grid = pixels.reshape(rows, patch_size, columns, patch_size, 3)
    # `out` is contiguous, so reshape gives a view of it: the assignments below write into the row.
    if kept is None:
        tokens = out.reshape(rows, columns, patch_size, patch_size, 3)
        tokens.transpose(0, 2, 1, 3, 4)[...] = grid
    else:
        # Integer arrays around a slice: NumPy puts their axis first, so it is [tokens, P, P, 3].
        out.reshape(-1, patch_size, patch_size, 3)[...] = grid[kept // columns, :, kept % columns]


def unpatchify(
    patches: NDArray[np.uint8], coords: NDArray[np.integer], grid_hw: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return uint8[rows·P, columns·P, 3]: every patch at its coordinates, black elsewhere.

    Prefix tokens, whose y is -1, are no patches of it.

    Args:
        patches: uint8[tokens, P·P·3], in any order.
        coords: int[tokens, 2], each token's (y, x) in the patch grid.
        grid_hw: (rows, columns) of the full grid.
    """
    patch_size = side_of(patches.shape[1])
    rows, columns = grid_hw
    pixels = np.zeros((rows, patch_size, columns, patch_size, 3), np.uint8)
    real = coords[:, 0] >= 0
    tokens = patches[real].reshape(-1, patch_size, patch_size, 3)
    pixels.transpose(0, 2, 1, 3, 4)[tuple(coords[real].T)] = tokens
    return pixels.reshape(rows * patch_size, columns * patch_size, 3)


def side_of(patch_bytes: int) -> int:
    """Return P, the side in pixels of a patch of P·P·3 bytes."""
    return math.isqrt(patch_bytes // 3)
