"""Where a box of an upright image lies in what a file stores, and in what is decoded of that."""

from __future__ import annotations

import math
from typing import TypeAlias

from PIL import Image

Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom


def stored_box(box: tuple[int, int, int, int], image_hw: tuple[int, int], orientation: int) -> Box:
    """Return where a box (top, left, height, width) of the upright image is in the stored one."""
    top, left, height, width = box
    upright = left, top, left + width, top + height
    # Two orientations are quarter turns, each the other's inverse; the rest are their own.
    return turned(upright, image_hw[::-1], {6: 8, 8: 6}.get(orientation, orientation))


def least_size(least: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that an image of a size needs for its box to have the least."""
    left, top, right, bottom = box
    inner = right - left, bottom - top
    across, down = (
        math.ceil(few * whole / side) for few, whole, side in zip(least, size, inner, strict=True)
    )
    return across, down


def scaled(box: Box, size: tuple[int, int], new_size: tuple[float, float]) -> Box:
    """Return where a box in an image of (width, height) is after resizing that to a new size."""
    left, top, right, bottom = box
    (width, height), (new_width, new_height) = size, new_size
    # Multiplied first: the ends of a whole image, and of one that keeps its size, are then exact.
    across = left * new_width / width, right * new_width / width
    down = top * new_height / height, bottom * new_height / height
    return across[0], down[0], across[1], down[1]


def cut(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """Return an image without the pixels that lie outside of a box, and where the box is then."""
    left, top, right, bottom = box
    kept = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if kept == (0, 0, *image.size):
        return image, box
    return image.crop(kept), (left - kept[0], top - kept[1], right - kept[0], bottom - kept[1])


def turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where a box in an image of (width, height) is after turning the image upright."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)
