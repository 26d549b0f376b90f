"""Decodes JPEGs with libjpeg-turbo through simplejpeg, with the bytes that Pillow would give.

Taken by ``pixels="turbo"`` for what it decodes alike: grey, YCbCr and RGB of 8 bits, baseline or
progressive, with a plain header (`headers.jpeg_head`), so that Pillow need not open it. Others,
such as CMYK and lossless files, are left to Pillow, and so is a file of which libjpeg warns:
whether it is damaged is then decided as it always is (`scans`).
"""

from __future__ import annotations

from typing import Any

import simplejpeg
from numpy.typing import NDArray

from packpipe.images.headers import JpegHead
from packpipe.images.scans import Scans

_COLOURS = {1: "GRAY", 3: "RGB"}  # by the number of layers
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all of Huffman's codes


def parts_of(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return n of the 1/n at which Pillow's `draft` decodes a JPEG that needs the least size.

    Args:
        size: (width, height) of the image.
        least: (width, height) that it is to have at least.
    """
    most = min(whole // max(few, 1) for whole, few in zip(size, least, strict=True))
    return next(parts for parts in (8, 4, 2, 1) if most >= parts or parts == 1)


def is_taken(head: JpegHead, scans: Scans) -> bool:
    """Return whether `decoded` decodes such a file, the markers of which say no damage."""
    return head.layers in _COLOURS and scans.frame in _FRAMES and scans.damage is None


def decoded(content: bytes, head: JpegHead, parts: int) -> NDArray[Any] | None:
    """Return a JPEG's pixels at 1/parts of its size; None if libjpeg warns of it.

    Args:
        content: the file.
        head: what it says of itself.
        parts: 1, 2, 4 or 8.

    Returns:
        uint8[height, width] of grey or uint8[height, width, 3], rounded up as libjpeg does.
    """
    if (
        parts > 1 and min(head.size) < 8
    ):  # simplejpeg has other fractions, too, of the same few pixels
        return None
    width, height = (-(-side // parts) for side in head.size)
    least = {} if parts == 1 else {"min_width": width, "min_height": height}
    try:
        pixels: NDArray[Any] = simplejpeg.decode_jpeg(content, _COLOURS[head.layers], **least)
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return pixels[..., 0] if head.layers == 1 else pixels
