"""Flips and quarter turns of packed images, exact to the byte.

A picture is mirrored or turned by moving its patches within the grid, and the pixels within each
patch alike; with dropped tokens, too. There are eight ways a picture can lie: mirrored left to
right or not, then turned by 0 to 3 quarters to the left. A flip top to bottom is the mirrored
picture turned by two quarters.

Tokens come out in raster order, as they went in: a row holds what patches of the flipped pixels
would be. So nothing that relies on their order notices (pooling by the first token, masks
and sums that are compared to the last bit, formats without coordinates).

Cost: each patch that moves is copied twice, within the cache.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from packpipe.images.patches import side_of


def ways_of(
    flip: NDArray[np.bool_], vertical_flip: NDArray[np.bool_], turns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return int64[n], how each picture lies: 4 if it is mirrored, plus its quarter turns.

    >>> ways_of(np.array([True]), np.array([True]), np.array([1])).tolist()
    [3]
    """
    mirrored = flip ^ vertical_flip
    ways: NDArray[np.int64] = 4 * mirrored + (turns + 2 * vertical_flip) % 4
    return ways


def turned_grids(ways: NDArray[np.int64], grid_hw: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return int16[n, 2], the grids after turning: (columns, rows) after one or three quarters."""
    return np.where((ways % 2 == 1)[:, None], grid_hw[:, ::-1], grid_hw)


def turned_coords(
    ways: NDArray[np.int64], grid_hw: NDArray[np.integer], coords: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return int64[tokens, 2], where each token of a grid goes.

    Args:
        ways: int64[tokens], how the token's picture is to lie.
        grid_hw: int[tokens, 2], the picture's grid before.
        coords: int[tokens, 2], the token's (y, x) before.
    """
    last = grid_hw.astype(np.int64) - 1
    y, x = coords.astype(np.int64).T
    # Mirrored before it is turned, the order in which ways are numbered.
    x = np.where(ways >= 4, last[:, 1] - x, x)
    turns = ways % 4
    down = np.choose(turns, [y, last[:, 1] - x, last[:, 0] - y, x])
    across = np.choose(turns, [x, y, last[:, 1] - x, last[:, 0] - y])
    return np.stack([down, across], 1)


def move_patches(
    patches: NDArray[np.uint8],
    ways: NDArray[np.int64],
    starts: NDArray[np.int64],
    lens: NDArray[np.integer],
    sources: NDArray[np.int64],
) -> None:
    """Move the patches of pictures in place, and turn their pixels.

    Args:
        patches: uint8[tokens, P·P·3], contiguous, changed.
        ways: int64[n], how each picture is to lie; one that stays as it is costs nothing.
        starts: int64[n], the first token of each.
        lens: int[n], its tokens.
        sources: int64[tokens], which token comes here, of the same picture.
    """
    pixels = _places(side_of(patches.shape[1]))
    spare = np.empty((max(lens, default=0), patches.shape[1]), np.uint8)
    _move(patches, ways, starts, np.asarray(lens, np.int64), sources, pixels, spare)


def turned_cells(cells: NDArray[np.integer], ways: NDArray[np.int64]) -> NDArray[np.integer]:
    """Return the cells of tokens, turned within each as its pixels are.

    Args:
        cells: [tokens, n·n], by row and column.
        ways: int64[tokens], how the token's picture is to lie.
    """
    found: NDArray[np.integer] = np.take_along_axis(
        cells, _places(math.isqrt(cells.shape[1]))[ways], axis=1
    )
    return found


def _places(side: int) -> NDArray[np.int64]:
    """Return int64[8, side²], which place of a square each one comes from, by way."""
    numbers = np.arange(side * side).reshape(side, side)
    return np.stack(
        [np.rot90(numbers[:, ::-1] if way >= 4 else numbers, way % 4).ravel() for way in range(8)]
    )


@njit(cache=True, nogil=True)
def _move(patches, ways, starts, lens, sources, pixels, spare):  # type: ignore[no-untyped-def]
    """Fill each picture's tokens from a copy of them; O(bytes of the pictures that move).

    Invariant: before a picture is filled, spare holds its tokens as they were.
    """
    for picture in range(len(ways)):
        if ways[picture] == 0:
            continue
        first = starts[picture]
        from_pixels = pixels[ways[picture]]
        # Byte by byte: whole tokens made compiling this kernel five times as slow.
        for token in range(lens[picture]):
            for byte in range(patches.shape[1]):
                spare[token, byte] = patches[first + token, byte]
        for token in range(first, first + lens[picture]):
            source, out = spare[sources[token] - first], patches[token]
            for pixel in range(from_pixels.shape[0]):
                out[3 * pixel] = source[3 * from_pixels[pixel]]
                out[3 * pixel + 1] = source[3 * from_pixels[pixel] + 1]
                out[3 * pixel + 2] = source[3 * from_pixels[pixel] + 2]
