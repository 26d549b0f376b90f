"""Decodes JPEG, PNG and WebP faster than Pillow does, with the bytes that Pillow would give.

Taken by ``pixels="turbo"`` for what is decoded alike, without opening it with Pillow. Of JPEGs,
with libjpeg-turbo through simplejpeg: grey, YCbCr and RGB of 8 bits, baseline or progressive, with
a plain header (`headers.jpeg_head`). Of PNG and WebP, with libspng and libwebp through imagecodecs:
grey and RGB of 8 bits, and nothing that changes them (`headers.bare_hw`). Others, such as CMYK,
lossless JPEGs and pictures with alpha, are left to Pillow, and so is a file that one of these
libraries refuses or warns of: whether it is damaged is then decided as it always is (`scans`).

One verdict is another: libspng stops at the last pixel. Where the data of a PNG file are cut or
wrong in the last five bytes, behind all pixels, it may give the pixels of a file that Pillow calls
truncated or broken.
"""

from __future__ import annotations

import os
from typing import Any

import simplejpeg
from imagecodecs import spng_decode, webp_decode
from numpy.typing import NDArray

from packpipe.images.bad_images import rejecting
from packpipe.images.colour import Conversion, HighDynamicRange, conversion_by
from packpipe.images.edges import whole_parts
from packpipe.images.geometry import scaled
from packpipe.images.headers import (
    HEAD_BYTES,
    JPEG,
    PNG,
    JpegHead,
    bare_hw,
    jpeg_head,
    quick_probe,
    upright_hw,
)
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.opening import is_fit
from packpipe.images.pillow_settings import PILLOWS_LIMIT, check_limit
from packpipe.images.regular_files import open_file
from packpipe.images.rules import PixelRules
from packpipe.images.scans import scans_of
from packpipe.images.stored import Planned, Stored, least_for

_COLOURS = {1: "GRAY", 3: "RGB"}  # by the number of layers
_STARTS = (JPEG, PNG[:4], b"RIFF")  # of files that may be decoded here


def stored(data: ImageData, planned: Planned, rules: PixelRules) -> Stored | None:
    """Return an image, decoded; None of others, which Pillow decodes or rejects."""
    check_limit(rules.max_pixels)
    content = _content_of(data, rules)
    if content is None:
        return None
    if content.startswith(JPEG):
        return _jpeg(content, planned, rules)
    if bare_hw(content) != planned.image_hw or not is_fit(planned.image_hw, rules.max_pixels):
        return None
    pixels = picture(content, planned.image_hw)
    if pixels is None:
        return None
    box, _ = planned.stored(1)
    return Stored(pixels, box, 1, Conversion(None, False))


def _jpeg(content: bytes, planned: Planned, rules: PixelRules) -> Stored | None:
    head = jpeg_head(content)
    if head is None or head.layers not in _COLOURS or 0 in head.size:
        return None
    size = head.size
    is_planned = upright_hw(*size, head.orientation) == planned.image_hw
    if not is_planned or not is_fit(size, rules.max_pixels):
        return None
    if rules.damaged_scans != "keep" and scans_of(content, head).damage is not None:
        return None
    conversion, parts = Conversion(None, False), 1
    if rules.profiles != "ignore":
        try:
            conversion = conversion_by(head.profiles, "L" if head.layers == 1 else "RGB")
        except HighDynamicRange:
            return None
    box, target = planned.stored(head.orientation)
    if rules.reducing_gap is not None:
        parts = parts_of(size, least_for(box, size, target, rules.reducing_gap))
    pixels = decoded(content, head, parts)
    if pixels is not None and parts > 1 and rules.jpeg_edges == "clean":
        finer = whole_parts(pixels, size, parts)
        if finer != parts and size[0] * size[1] <= PILLOWS_LIMIT * finer**2:
            parts, pixels = finer, decoded(content, head, finer)
    if pixels is None:
        return None
    whole = size[0] / parts, size[1] / parts
    return Stored(pixels, scaled(box, size, whole), head.orientation, conversion)


def _content_of(data: ImageData, rules: PixelRules) -> bytes | None:
    """Return the bytes of a JPEG file, or of a PNG or WebP file with a plain header, else None."""
    if isinstance(data, str | Confined):
        with rejecting(data), open_file(data) as file:
            head, size = file.read(HEAD_BYTES) or b"", os.fstat(file.fileno()).st_size
            if not head.startswith(JPEG):
                found = quick_probe(head, size)
                if found is None or not is_fit(found, rules.max_pixels):
                    return None
                # A longer file holds more than pixels of RGB, perhaps more than there is memory.
                if size > 4 * found[0] * found[1] + HEAD_BYTES:
                    return None
            file.seek(0)  # what is added to the first bytes would be copied
            return file.read()
    if isinstance(data, bytes | memoryview) and bytes(data[:4]).startswith(_STARTS):
        return bytes(data)
    return None


def parts_of(size: tuple[int, int], least: tuple[int, int]) -> int:
    """Return n of the 1/n at which Pillow's `draft` decodes a JPEG that needs the least size.

    Args:
        size: (width, height) of the image.
        least: (width, height) that it is to have at least.
    """
    most = min(whole // max(few, 1) for whole, few in zip(size, least, strict=True))
    return next(parts for parts in (8, 4, 2, 1) if most >= parts or parts == 1)


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


def picture(content: bytes, image_hw: tuple[int, int]) -> NDArray[Any] | None:
    """Return the pixels of a PNG or WebP file of which `headers.bare_hw` gives image_hw.

    Returns:
        uint8[height, width] of grey or uint8[height, width, 3]; None if it cannot be decoded.
    """
    decode = spng_decode if content.startswith(PNG) else webp_decode
    try:
        pixels: NDArray[Any] = decode(content)
    except (RuntimeError, ValueError, ImportError):
        # An error of either library is a RuntimeError; imagecodecs may be built without one.
        return None
    return pixels if pixels.shape in (image_hw, (*image_hw, 3)) else None
