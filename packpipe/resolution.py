"""Resolution: the patch grid an image is resized to, from its size alone (floor 0).

Two laws:

* ``"native"``: the own size, each axis rounded to the nearest whole number of patches (half
  to even, one at least). Only an image over max_tokens is shrunk, by the budget law.
* ``"budget"``: at scale s an axis covers max(1, ⌈side·s/P⌉) patches; the largest s whose grid
  stays within max_tokens is taken, enlarging small images too.

The largest s is found exactly, in integers: the official search bisects s in [1e-6, 100] to
1e-5 and so can stop one step short of it, and never enlarges more than a hundredfold.

Source: SigLIP2 (NaFlex); NaViT 2.2.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

LAWS = ("native", "budget")


@njit(cache=True)
def _largest_side(side, other, max_tokens):  # type: ignore[no-untyped-def]
    """Return the largest k with k * ceil(other * k / side) <= max_tokens, or 0.

    k² * other / side <= max_tokens bounds k from above; from there down, one at a time.
    """
    k = min(max_tokens, int(math.sqrt(max_tokens * side / other)) + 1)
    while k and k * -(-other * k // side) > max_tokens:
        k -= 1
    return k


@njit(cache=True)
def _budget_grids(image_hw, max_tokens, out):  # type: ignore[no-untyped-def]
    """Fill out with the grid of every image at the largest scale within max_tokens.

    The scale is limited where one axis has just reached k patches, that is at k·P/side: the
    larger of the two axes' limits is the answer, and there the other axis has ⌈other·k/side⌉.
    """
    for i in range(image_hw.shape[0]):
        height, width = image_hw[i, 0], image_hw[i, 1]
        rows = _largest_side(height, width, max_tokens)
        columns = _largest_side(width, height, max_tokens)
        if rows * width >= columns * height:
            out[i, 0], out[i, 1] = rows, -(-width * rows // height)
        else:
            out[i, 0], out[i, 1] = -(-height * columns // width), columns


def native_grids(image_hw: NDArray[np.integer], patch_size: int) -> NDArray[np.int64]:
    """Return int64[images, 2], the grids nearest the images' own sizes, however large."""
    return np.maximum(1, np.rint(image_hw / patch_size).astype(np.int64))


def patch_grids(
    image_hw: NDArray[np.integer], patch_size: int, max_tokens: int, law: str
) -> NDArray[np.int16]:
    """Return int16[images, 2], the (rows, columns) of patches of each image: one at least,
    max_tokens at most.

    Args:
        image_hw: int[images, 2], upright (height, width) in pixels, 1 or more.
        patch_size: pixels a side of a patch.
        max_tokens: most patches an image may have, below 2**15.
        law: ``"native"`` or ``"budget"``.

    >>> patch_grids(np.array([[1080, 1920], [3, 39]]), 16, 256, "budget").tolist()
    [[12, 21], [4, 52]]
    """
    sizes = np.ascontiguousarray(image_hw, np.int64)
    if law == "native":
        grids = native_grids(sizes, patch_size)
        resized = grids[:, 0] * grids[:, 1] > max_tokens
    else:
        grids = np.empty_like(sizes)
        resized = np.ones(len(sizes), np.bool_)
    limited = np.empty((int(resized.sum()), 2), np.int64)
    _budget_grids(sizes[resized], max_tokens, limited)
    grids[resized] = limited
    return grids.astype(np.int16)
