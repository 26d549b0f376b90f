"""Opens images of the known formats; checks their sizes before anything is allocated.

Files are not trusted: only regular files (`regular_files`) of the raster formats below are opened,
none of which runs another program. What is no image, or too large a one, raises `BadImage`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BytesIO, FileIO
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from packpipe.images.bad_images import BadImage, rejecting
from packpipe.images.boxes import check_items
from packpipe.images.extras import coded_hw, extra_kind, open_extra
from packpipe.images.headers import HEAD_BYTES, ICON, icon_hw, most_values
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.layouts import unread_samples
from packpipe.images.modes import NoRule, image_of
from packpipe.images.pillow_settings import check_limit, quiet
from packpipe.images.regular_files import Clipped, Counted, CountedBytes, open_file

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"),
    *("SGI", "QOI", "DDS", "DIB", "CUR", "DCX", "ICNS", "PSD"),
)

# Pillow decodes no row of 2**31 bits and more, and has 64 of them in a pixel at most.
LONGEST_SIDE = 2**24

# Those that say of what format a file is.
_START_BYTES = 64
# What Pillow says of TIFF files for whose samples it has no mode, or fewer letters than planes.
_UNREAD_SAMPLES = ("unknown pixel mode", "string index out of range")
# Files of boxes that Pillow reads, by the name of the first one and the next four bytes.
_BOXED = {
    **dict.fromkeys((b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"), "an AVIF file"),
    b"jP  \r\n\x87\n": "a JPEG 2000 file",
}
# Values of an entry of a TIFF file; Pillow makes four Python objects of each place of a strip.
_MOST_VALUES = 2**18


@cache
def known_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow knows; the first call imports its modules."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def opened(source: ImageData | FileIO, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the image with its header read; close afterwards what was opened here."""
    check_limit(max_pixels)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        with rejecting(source):
            image = _image(source, stack, max_pixels)
            width, height = image.size
            _check_hw(height, width, max_pixels)
            if width * height == 0:
                raise BadImage("empty", f"{height}x{width} pixels")
            if isinstance(image, TiffImageFile):  # a tile is decoded whole, even if larger than it
                rows, columns = (int(image.tag_v2.get(side, 0)) for side in (TILELENGTH, TILEWIDTH))
                _check_hw(rows, columns, max_pixels)
        yield image


def _image(source: ImageData | FileIO, stack: ExitStack, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        array_hw(source, max_pixels)
        return image_of(source)
    file: BinaryIO
    if isinstance(source, str | Confined):
        source = stack.enter_context(open_file(source))
    if isinstance(source, FileIO):
        file = stack.enter_context(Clipped(source))
    else:
        # Counting takes half as long again as opening, and few bytes are few reads.
        file = (BytesIO if len(source) <= HEAD_BYTES else CountedBytes)(source)
    file.seek(0)
    start = file.read(_START_BYTES)
    if not start:
        raise BadImage("empty", "the file holds no bytes")
    # Pillow decodes an icon as soon as it opens it, so its size is checked before.
    if start.startswith(ICON):
        _check_hw(*icon_hw(file), max_pixels)
    if extra_kind(start) == "HEIC":
        _check_hw(*coded_hw(file), max_pixels, "an image in the HEIC file has ")
    elif start[4:12] in _BOXED:
        check_items(_BOXED[start[4:12]], file)
    values = most_values(file)
    if values > _MOST_VALUES:
        expected = f"at most {_MOST_VALUES} strips, tiles or other values in an entry"
        raise BadImage("unreadable", f"{values}, expected {expected}")
    image = stack.enter_context(_of_known_format(file))
    if isinstance(file, Counted):
        file.reads_left = None
    return image


def _of_known_format(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image as `Image.open` does, but for the limit on pixels, which is a global."""
    file.seek(0)
    head = file.read(_START_BYTES)
    prefix, kind = head[:16], extra_kind(head)
    if kind is not None:
        return open_extra(kind, file)
    if prefix[:2] == b"PF" and prefix[2:3].isspace():
        raise NoRule("a PFM of three channels has no rule to become RGB")
    for name in known_formats():
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept is None or accept(prefix)
            if accepted and not isinstance(accepted, str):  # else it says why not
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            if str(error) in _UNREAD_SAMPLES and name == "TIFF":
                raise unread_samples(file) from error
    raise UnidentifiedImageError(file)


def array_hw(pixels: NDArray[Any], max_pixels: int) -> tuple[int, int]:
    """Return (height, width) of pixels; raises `BadImage` if there are none, or too many."""
    height, width = pixels.shape[:2] if pixels.ndim > 1 else (0, 0)
    _check_hw(height, width, max_pixels)
    if height * width == 0:
        raise BadImage("empty", f"an array of shape {list(pixels.shape)} holds no pixels")
    return height, width


def is_fit(size: tuple[int, int], max_pixels: int) -> bool:
    """Return whether an image of two sides, in pixels, is not too large."""
    return size[0] * size[1] <= max_pixels and max(size) <= LONGEST_SIDE


def _check_hw(height: int, width: int, max_pixels: int, of: str = "") -> None:
    most = f"{max_pixels}" if height * width > max_pixels else f"{LONGEST_SIDE} a side"
    if not is_fit((height, width), max_pixels):
        said = f"{of}{height}x{width} pixels, expected at most {most}"
        raise BadImage("too many pixels", said)
