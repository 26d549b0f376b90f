"""How a stored image is turned to be upright: its EXIF orientation, found without decoding."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from packpipe.images.bad_images import rejecting
from packpipe.images.headers import exif_orientation, late_exif

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> tuple[int, bool]:
    """Return (EXIF orientation 1..8, whether the EXIF is broken), without loading pixels."""
    # These are upright when they are opened, their size included; but for a JPEG in JPEG XL that a
    # caller has opened with `pillow_jxl`.
    if image.format in ("TIFF", "HEIF", "JXL") and not getattr(image, "jpeg", False):
        return 1, False
    exif = image.info.get("exif")
    if exif is None and isinstance(image, PngImageFile) and image.tile:
        file: Any = image.fp
        with rejecting(getattr(file, "raw", file)):
            place = file.tell()
            exif = late_exif(reader_of(file))
            file.seek(place)
    try:
        # ImageMagick writes EXIF into PNG files as text: three lines of header, then hexadecimal.
        if exif is None and "Raw profile type exif" in image.info:
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        value = None if exif is None else exif_orientation(exif)
        if value is None:
            # From XMP. PngImageFile.getexif would decode the image in search of a late chunk.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (struct.error, ValueError, SyntaxError, KeyError, TypeError, OSError, EOFError):
        return 1, True
    if value in range(1, 9):
        return int(value), False
    return 1, True


def reader_of(source: Any) -> Callable[[int, int], bytes]:
    """Return a function that reads so many bytes from a place on, of a file or of its bytes."""
    if not hasattr(source, "seek"):
        return lambda at, size: bytes(source[at : at + size])

    def read(at: int, size: int) -> bytes:
        source.seek(at)
        found: bytes = source.read(size)
        return found

    return read
