"""Finds JPEGs that were decoded at a fraction and end in padding, and decodes them at a finer one.

A JPEG file holds whole blocks, and what lies beyond the edge of its image is the encoder's choice:
most repeat the last pixels; some write grey or black, or leave what was there before they cut. Of
601 pixels decoded at 1/8, the 76th is the mean of one pixel and seven of padding.

Where a side is no whole number of the decoded pixels, its last line is looked at. If the step to it
from the line before is larger than the step before that, by more than `_LEVELS` levels in the mean,
the image is decoded at the largest fraction of which the side is a whole number. Other images keep
their pixels, also where the padding looks like the image. Of 571 photographs at caps of 128² pixels
13 are decoded anew; with the looking that takes 5 % longer (``benchmarks/references.py``).
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

_LEVELS = 8


def whole_parts(pixels: Image.Image | NDArray[np.uint8], size: tuple[int, int], parts: int) -> int:
    """Return n of the 1/n at which a JPEG is to be decoded so that its edges are free of padding.

    Args:
        pixels: decoded at 1/parts, in any mode of bytes, or as an array.
        size: (width, height) of the whole image.
        parts: 1, 2, 4 or 8.
    """
    for axis, side in enumerate(size):
        if side % parts and _ends_with_a_step(pixels, axis):
            while side % parts:
                parts //= 2
    return parts


def decoded_at(content: bytes, parts: int) -> Image.Image:
    """Return the image of a JPEG file, to be loaded at 1/parts of its size."""
    image = JpegImageFile(BytesIO(content))
    if parts > 1:
        image.draft(None, (image.width // parts, image.height // parts))
    return image


def _ends_with_a_step(pixels: Image.Image | NDArray[np.uint8], axis: int) -> bool:
    """Return whether the last column (axis 0) or row (1) is unlike the one before it."""
    if isinstance(pixels, np.ndarray):
        lines = pixels[:, -3:] if axis == 0 else pixels[-3:]
    else:
        width, height = pixels.size
        last = (max(width - 3, 0), 0) if axis == 0 else (0, max(height - 3, 0))
        lines = np.asarray(pixels.crop((*last, width, height)))
    if lines.shape[1 - axis] < 3:
        return True  # nothing to compare it with, and little to decode
    levels = lines.astype(np.int16)
    first, second, third = (levels[:, at] if axis == 0 else levels[at] for at in range(3))
    # Sums: np.diff and means would take twice as long.
    steps = int(np.abs(third - second).sum()) - int(np.abs(second - first).sum())
    return steps > _LEVELS * third.size
