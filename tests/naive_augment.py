"""Slow, obvious twins of augmentation: pictures turned whole, colours pixel by pixel.

Nothing here imports packpipe. The colours are those of torchvision's documentation, written down
from it (`adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `rgb_to_grayscale`,
`solarize`), on levels of 0..1; contrast takes its pivot as an argument, where torchvision takes
the mean of the image in grey.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Token = tuple[tuple[int, int], NDArray[np.uint8]]  # ((y, x), pixels[P, P, 3])


def uniform(seed: int, epoch: int, index: int, stream: int) -> float:
    """A number in [0, 1) by NumPy's own Philox."""
    key, counter = (
        np.array(values, np.uint64) for values in ((seed, epoch), (0, stream, index, 0))
    )
    word = np.random.Philox(key=key, counter=counter).random_raw()
    return (word >> 11) * 2.0**-53


def turned(
    tokens: Sequence[Token], grid: tuple[int, int], flip: bool, vertical: bool, turns: int
) -> tuple[list[Token], tuple[int, int]]:
    """The tokens of the flipped and turned picture in raster order, and its grid.

    A picture is made of the tokens, with another that says which of its patches there are; both
    are turned, and cut into patches again.
    """
    side = tokens[0][1].shape[0]
    pixels = np.zeros((grid[0] * side, grid[1] * side, 3), np.uint8)
    there = np.zeros(grid, bool)
    for (y, x), patch in tokens:
        pixels[y * side : (y + 1) * side, x * side : (x + 1) * side] = patch
        there[y, x] = True
    for _ in range(flip):
        pixels, there = pixels[:, ::-1], there[:, ::-1]
    for _ in range(vertical):
        pixels, there = pixels[::-1], there[::-1]
    for _ in range(turns):
        pixels, there = np.rot90(pixels), np.rot90(there)
    found = [
        ((y, x), pixels[y * side : (y + 1) * side, x * side : (x + 1) * side])
        for y in range(there.shape[0])
        for x in range(there.shape[1])
        if there[y, x]
    ]
    return found, there.shape


def meeting(
    sides: Sequence[Sequence[tuple[int, int]]],
    grids: Sequence[tuple[int, int]],
    box: tuple[int, int, int, int],
) -> list[tuple[int, int]]:
    """Which tokens of a pair meet, by their numbers in each image's list.

    Args:
        sides: the (y, x) of both images' tokens.
        grids: rows and columns of both.
        box: (top, left, height, width) within what is common to both, centre on centre.
    """
    found = []
    common = [min(grids[0][axis], grids[1][axis]) for axis in range(2)]
    for here, (y, x) in enumerate(sides[0]):
        # Over the common part: as many lines stick out before it as after, or one fewer.
        down = y - (grids[0][0] - common[0]) // 2
        across = x - (grids[0][1] - common[1]) // 2
        top, left, height, width = box
        if top <= down < top + height and left <= across < left + width:
            there = down + (grids[1][0] - common[0]) // 2, across + (grids[1][1] - common[1]) // 2
            if there in sides[1]:
                found.append((here, sides[1].index(there)))
    return found


def grey(pixel: Sequence[float]) -> list[float]:
    red, green, blue = pixel
    return [0.2989 * red + 0.587 * green + 0.114 * blue] * 3


def blend(one: Sequence[float], other: Sequence[float], ratio: float) -> list[float]:
    mixed = [ratio * a + (1 - ratio) * b for a, b in zip(one, other, strict=True)]
    return [min(max(level, 0.0), 1.0) for level in mixed]


def coloured(
    pixel: Sequence[float],
    *,
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    is_grey: bool = False,
    is_solarized: bool = False,
    pivot: float = 0.5,
) -> list[float]:
    """A pixel of levels 0..1 after one change after the other, each clamped as torchvision's."""
    if is_solarized:
        pixel = [1 - level if level >= 128 / 255 else level for level in pixel]
    if is_grey:
        pixel = grey(pixel)
    pixel = blend(pixel, grey(pixel), saturation)
    pixel = blend(pixel, [0.0] * 3, brightness)
    return blend(pixel, [pivot] * 3, contrast)
