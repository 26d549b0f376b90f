"""Decodes an image file, or pixels, to upright RGB pixels at a planned size.

Follows the plan and decides nothing. `probe` reads the header only, so sizes cost no decoding; it
uses Pillow only where `headers` gives no answer. `decode` gives exactly the planned size. Pillow's
globals are never changed.

The planned size is known before any pixel is decoded, so the work is done in the cheapest order:

1. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size while what is needed of it stays at least
   ``reducing_gap`` times as large as planned on both axes; unless it is lossless, since it cannot
   be then. At its edges none of a block beyond them is left (`edges`).
2. The mode becomes grey or RGB (`modes`), an animation its first frame.
3. What lies outside of the box, if there is one, is cut off. No pixel outside matters, but for
   those that a smaller decode has merged with some of the box's.
4. The EXIF orientation is applied.
5. One resize to the planned size; first, pixels are averaged by whole factors within the same gap.
6. Colours become sRGB (`colour`), on the pixels that are left, and transparent ones are then laid
   on the background.

Compared with decoding in full and resizing in one step, the gap changes pixels a little: tests
bound the difference and ``benchmarks/pixels.py`` shows it; ``reducing_gap=None`` gives none. If the
orientation cannot be read, the image counts as upright and is flagged. In PNG files EXIF counts
behind the pixels, too, but not XMP.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from io import FileIO
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from packpipe import checks
from packpipe.images.colour import Conversion, HighDynamicRange, conversion_of, to_srgb
from packpipe.images.edges import decoded_at, whole_parts
from packpipe.images.headers import (
    HEAD_BYTES,
    PNG,
    exif_orientation,
    late_exif,
    quick_probe,
    upright_hw,
)
from packpipe.images.layouts import mend
from packpipe.images.modes import NoRule, plain
from packpipe.images.opening import (
    _PILLOWS_LIMIT,
    LONGEST_SIDE,
    BadImage,
    Confined,
    ImageData,
    SizeChanged,
    _array_hw,
    _file,
    _opened,
    _reraise_faults,
    _said,
    check_settings,
    rejecting,
    rejecting_giants,
)
from packpipe.images.scans import Watched

# Why an image is a reject, by the error that says so.
_REASONS: dict[type[Exception], str] = {
    NoRule: "unsupported mode",
    HighDynamicRange: "high dynamic range",
    Image.DecompressionBombError: "too many pixels",
}

Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Probe(NamedTuple):
    """Result of `probe`: upright (height, width) in pixels, and whether the EXIF is broken."""

    image_hw: tuple[int, int]
    broken_exif: bool


class PixelRules(NamedTuple):
    """The options of `PackConfig` that decide how pixels are made, by the same names."""

    background: tuple[int, int, int]
    max_pixels: int
    reducing_gap: float | None
    downscale_filter: str
    upscale_filter: str
    profiles: str
    damaged_scans: str = "reject"
    value_range: tuple[float, float] | None = None
    jpeg_edges: str = "clean"


class Decoded(NamedTuple):
    """Result of `decode`.

    Attributes:
        pixels: uint8[height, width, 3].
        flag: what is amiss with the image, though it has pixels: ``"broken profile"``; or None.
    """

    pixels: NDArray[np.uint8]
    flag: str | None


def pixel_rules(options: Any) -> PixelRules:
    """Return the `PixelRules` among the attributes of a configuration.

    Raises:
        ValueError: they need a package that is not installed.
    """
    rules = PixelRules(*(getattr(options, name) for name in PixelRules._fields))
    if rules.damaged_scans == "strict" and find_spec("simplejpeg") is None:
        expected, remedy = "simplejpeg to be installed", 'pip install simplejpeg, or use "reject"'
        raise ValueError(checks.sentence("damaged_scans", "strict", expected, remedy))
    return rules


@rejecting_giants()
def probe(data: ImageData, *, max_pixels: int) -> Probe:
    """Return the upright size of an image from its header; nothing is decoded.

    Raises:
        BadImage: there is no such file, or it is empty, no image, or has more than max_pixels.
    """
    if isinstance(data, np.ndarray):
        height, width = _array_hw(data, max_pixels)
        return Probe((height, width), False)
    with ExitStack() as stack:
        source: ImageData | FileIO = data
        if not isinstance(data, Image.Image):
            if isinstance(data, str | Confined):
                with rejecting(data):
                    source = stack.enter_context(_file(data))
                    head, size = source.read(HEAD_BYTES), os.fstat(source.fileno()).st_size
                    if head is None:  # so FileIO says that there is nothing to read yet
                        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            else:
                head, size = data, len(data)
            image_hw = quick_probe(head, size)
            late = None
            if image_hw is not None and bytes(head[:8]) == PNG:
                with rejecting(data):
                    late = late_exif(_reader(source))
            # An image that is too large goes on to Pillow's path, which raises the error.
            is_fit = image_hw is not None and image_hw[0] * image_hw[1] <= max_pixels
            if image_hw is not None and is_fit and max(image_hw) <= LONGEST_SIDE and late is None:
                return Probe(image_hw, False)
        image = stack.enter_context(_opened(source, max_pixels))
        orientation, broken_exif = _orientation(image)
        return Probe(upright_hw(*image.size, orientation), broken_exif)


@rejecting_giants()
def decode(
    data: ImageData,
    *,
    image_hw: tuple[int, int],
    target_hw: tuple[int, int],
    rules: PixelRules,
    box: tuple[int, int, int, int] | None = None,
) -> Decoded:
    """Return the upright image, or a box of it, resized to target_hw, its colours in sRGB.

    Args:
        data: bytes, path or pixels.
        image_hw: upright size in pixels for which the plan was made.
        target_hw: (height, width) of the result in pixels.
        rules: how pixels are made.
        box: (top, left, height, width) in pixels of the upright image, within it; None for all.

    Raises:
        BadImage: the image cannot be decoded, its mode has no rule, or it has a high dynamic range;
            or it alone takes more memory than there is.
        SizeChanged: its size is not image_hw, so the source has changed since the plan was made.
        ValueError: settings of Pillow in this process would give other pixels.
    """
    check_settings()
    with _opened(data, rules.max_pixels) as image:
        orientation, _ = _orientation(image)
        size = image.size  # as the header says; loading may set another
        found = upright_hw(*size, orientation)
        if found != image_hw:
            raise SizeChanged(
                f"image_hw is {found}, expected {image_hw} as planned; "
                "plan again (stored rows: into another folder), the source has changed"
            )
        conversion = Conversion(None, False)
        try:
            mended = mend(image)
            if rules.profiles != "ignore":
                conversion = conversion_of(image, of_file=image is not data)
            scans = None if image is data else _watched(image)
            wanted = _stored_box(box or (0, 0, *image_hw), image_hw, orientation)
            drafted = None
            decoded_size: tuple[float, float] = size
            # A JPEG alone: other formats would give a thumbnail that their file holds. And not
            # for an image of the caller's, which draft would change.
            can_shrink = scans is not None and not scans.scans.is_lossless
            if rules.reducing_gap is not None and can_shrink:
                height, width = upright_hw(*target_hw[::-1], orientation)  # as it is stored
                least = (int(width * rules.reducing_gap), int(height * rules.reducing_gap))
                drafted = image.draft(None, _least_size(least, wanted, size))
                decoded_size = size if drafted is None else drafted[1][2:]
            expected = size if drafted is None else image.size
            background = rules.background if conversion.transform is None else None
            pixels = plain(mended, background, rules.value_range)
            if pixels.size != expected:
                raise ValueError(f"{pixels.size} pixels, expected {expected} as the header says")
            if scans is not None and rules.damaged_scans != "keep":
                damage = scans.damage(image, strict=rules.damaged_scans == "strict")
                if damage is not None:
                    raise BadImage("damaged scan", damage)
            if scans is not None and drafted is not None and rules.jpeg_edges == "clean":
                pixels, decoded_size = _whole(pixels, decoded_size, scans, size, background)
        except Exception as error:  # decoders raise whatever they like
            _reraise_faults(error)
            reason = _REASONS.get(type(error), "undecodable")
            raise BadImage(reason, _said(error, data)) from error
    area = _scaled(wanted, size, decoded_size)
    if box is not None:
        pixels, area = _cut(pixels, area)
    if orientation in _TRANSPOSE:
        area = _turned(area, pixels.size, orientation)
        pixels = pixels.transpose(_TRANSPOSE[orientation])
    # Turned before, so that width and height are those of the target.
    pixels = _resized(pixels, area, target_hw[::-1], rules)
    if conversion.transform is not None:
        pixels = to_srgb(pixels, conversion.transform, rules.background)
    flag = "broken profile" if conversion.broken else None
    return Decoded(np.asarray(pixels if pixels.mode == "RGB" else pixels.convert("RGB")), flag)


def _watched(image: Image.Image) -> Watched | None:
    """Have a JPEG image decoded from a file that watches; None for other images."""
    if not isinstance(image, JpegImageFile):
        return None
    file: Any = image.fp
    file.seek(0)
    image.fp = watched = Watched(file.read())
    return watched


def _stored_box(box: tuple[int, int, int, int], image_hw: tuple[int, int], orientation: int) -> Box:
    """Return where a box (top, left, height, width) of the upright image is in the stored one."""
    top, left, height, width = box
    upright = left, top, left + width, top + height
    # Two orientations are quarter turns, each the other's inverse; the rest are their own.
    return _turned(upright, image_hw[::-1], {6: 8, 8: 6}.get(orientation, orientation))


def _least_size(least: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) that an image of a size needs for its box to have the least."""
    left, top, right, bottom = box
    inner = right - left, bottom - top
    across, down = (
        math.ceil(few * whole / side) for few, whole, side in zip(least, size, inner, strict=True)
    )
    return across, down


def _scaled(box: Box, size: tuple[int, int], new_size: tuple[float, float]) -> Box:
    """Return where a box in an image of (width, height) is after resizing that to a new size."""
    left, top, right, bottom = box
    (width, height), (new_width, new_height) = size, new_size
    # Multiplied first: the ends of a whole image, and of one that keeps its size, are then exact.
    across = left * new_width / width, right * new_width / width
    down = top * new_height / height, bottom * new_height / height
    return across[0], down[0], across[1], down[1]


def _cut(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """Return an image without the pixels that lie outside of a box, and where the box is then."""
    left, top, right, bottom = box
    kept = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if kept == (0, 0, *image.size):
        return image, box
    return image.crop(kept), (left - kept[0], top - kept[1], right - kept[0], bottom - kept[1])


def _whole(
    pixels: Image.Image,
    decoded_size: tuple[float, float],
    scans: Watched,
    size: tuple[int, int],
    background: tuple[int, int, int] | None,
) -> tuple[Image.Image, tuple[float, float]]:
    """Return drafted pixels of an image of (width, height) free of padding, and their size."""
    drafted = round(size[0] / decoded_size[0])
    parts = whole_parts(pixels, size, drafted)
    if parts == drafted or size[0] * size[1] > _PILLOWS_LIMIT * parts**2:
        return pixels, decoded_size
    return plain(decoded_at(scans.content, parts), background), (size[0] / parts, size[1] / parts)


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where a box in an image of (width, height) is after turning the image upright."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)


def _resized(image: Image.Image, box: Box, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """Return the part of the image within box, resized to (width, height)."""
    if image.size == size and box == (0, 0, *size):
        return image
    across, down = (
        _filter(
            rules.upscale_filter if pixels > box[side + 2] - box[side] else rules.downscale_filter
        )
        for side, pixels in enumerate(size)
    )
    gap = rules.reducing_gap
    if across == down:
        return image.resize(size, across, box, gap)
    left, top, right, bottom = box
    if size[0] > right - left:  # down first: an image of one column must not be made wide at once
        low = image.resize((image.width, size[1]), down, (0, top, image.width, bottom), gap)
        return low.resize(size, across, (left, 0, right, size[1]), gap)
    narrow = image.resize((size[0], image.height), across, (left, 0, right, image.height), gap)
    return narrow.resize(size, down, (0, top, size[0], bottom), gap)


def _filter(name: str) -> Image.Resampling:
    return Image.Resampling[name.upper()]


def _reader(source: Any) -> Callable[[int, int], bytes]:
    """Return a function that reads so many bytes from a place on, of a file or of its bytes."""
    if not hasattr(source, "seek"):
        return lambda at, size: bytes(source[at : at + size])

    def read(at: int, size: int) -> bytes:
        source.seek(at)
        found: bytes = source.read(size)
        return found

    return read


def _orientation(image: Image.Image) -> tuple[int, bool]:
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
            exif = late_exif(_reader(file))
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
