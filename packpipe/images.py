"""Images: an encoded file, or pixels, to upright RGB pixels at a planned size (floor 1).

Obeys the plan and decides nothing. `probe` reads the header only, so sizes cost no decoding, and
asks Pillow where `headers` is not sure; `decode` gives exactly the planned grid. Pillow's globals
are never touched.

The planned size is known before a pixel is, so the work is done in the order that costs least:

1. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size while it stays at least ``reducing_gap`` times
   as large as planned on both axes.
2. The mode becomes grey or RGB (`modes`), an animation its first frame.
3. The EXIF orientation is applied.
4. One resize to the planned size; first, pixels are averaged by whole factors within the same gap.

Against decoding in full and resizing in one step, the gap changes pixels by a bound that tests
hold and ``benchmarks/pixels.py`` shows; ``reducing_gap=None`` gives exactly those. An orientation
that cannot be read is taken as upright and flagged; in PNG files it counts only where it stands
before the pixels, since finding a later one would mean decoding the image while probing.

Files are not trusted: only the raster formats below are opened, none of which runs another
program; only regular files are; and sizes are checked before anything is allocated.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BufferedReader, BytesIO, FileIO
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from packpipe import checks
from packpipe.headers import (
    HEAD_BYTES,
    ICON,
    exif_orientation,
    icon_hw,
    quick_probe,
    upright_hw,
)
from packpipe.modes import NoRule, image_of, plain

# The bytes of an encoded image, the path of its file, or its pixels.
ImageData: TypeAlias = "bytes | memoryview | str | NDArray[Any] | Image.Image"
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"),
    *("SGI", "QOI", "DDS", "DIB", "CUR", "DCX", "ICNS", "PSD"),
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Warnings of Pillow's modules, or that it addresses to its caller, which is here.
_PILLOW_WARNS = ("ignore", None, Warning, re.compile(r"PIL\.|packpipe\.(images|modes)$"), 0)
_FARTHEST = 2**40  # file systems go no farther than a few times that
# Of text that a PNG file may inflate, in bytes.
_TEXT_LIMITS = {"MAX_TEXT_CHUNK": 2**20, "MAX_TEXT_MEMORY": 2**26}
_PILLOW_LOG = logging.getLogger("PIL.TiffImagePlugin")
# Errors of one path, which another machine would meet as well.
_FILE_FAULTS = (
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP),
    errno.ENXIO,  # a socket
    errno.EINVAL,  # a header that points before the file's first byte
)


class _Clipped(BufferedReader):
    """A file that bears what headers ask for as bytes do: gigabytes, and places outside of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size > HEAD_BYTES:
            rest = self._size() - self.tell()
            size = max(0, rest if size is None else min(size, rest))
        return super().read(size)

    def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET:
            target += self.tell() if whence == os.SEEK_CUR else self._size()
            target = max(target, 0)
        if _FARTHEST < target <= sys.maxsize:
            target = _FARTHEST
        return super().seek(target)

    def _size(self) -> int:
        return os.fstat(self.fileno()).st_size


class BadImage(ValueError):
    """An image that cannot become a row; ``reason`` is the word the rejects are counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def exception(self) -> str:
        """The exception behind it and what it said, the same in every run."""
        return f"{type(self.__cause__ or self).__name__}: {self}"


class Probe(NamedTuple):
    """What a header says: upright (height, width) in pixels; whether its EXIF is broken."""

    image_hw: tuple[int, int]
    broken_exif: bool


class PixelRules(NamedTuple):
    """How pixels are made: the options of `PackConfig` of the same names."""

    background: tuple[int, int, int]
    max_pixels: int
    reducing_gap: float | None
    downscale_filter: str
    upscale_filter: str


def pixel_rules(options: Any) -> PixelRules:
    """Return the rules among the attributes of a configuration."""
    return PixelRules(*(getattr(options, name) for name in PixelRules._fields))


def probe(data: ImageData, *, max_pixels: int) -> Probe:
    """Return the upright size of an image from its header; nothing is decoded.

    Raises:
        BadImage: no such file, empty, no image, or more than max_pixels pixels.
    """
    if isinstance(data, np.ndarray):
        height, width = _array_hw(data, max_pixels)
        return Probe((height, width), False)
    with ExitStack() as stack:
        source: ImageData | FileIO = data
        if not isinstance(data, Image.Image):
            if isinstance(data, str):
                with _rejecting(data):
                    source = stack.enter_context(_file(data))
                    head, size = source.read(HEAD_BYTES), os.fstat(source.fileno()).st_size
            else:
                head, size = data, len(data)
            image_hw = quick_probe(head, size)
            if image_hw is not None and image_hw[0] * image_hw[1] <= max_pixels:
                return Probe(image_hw, False)
        image = stack.enter_context(_opened(source, max_pixels))
        orientation, broken_exif = _orientation(image)
        return Probe(upright_hw(*image.size, orientation), broken_exif)


def decode(
    data: ImageData, *, image_hw: tuple[int, int], target_hw: tuple[int, int], rules: PixelRules
) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3], the upright image resized to target_hw.

    Args:
        data: bytes, path or pixels.
        image_hw: upright size in pixels the plan was made for.
        target_hw: (height, width) of the result in pixels.
        rules: how pixels are made.

    Raises:
        BadImage: it cannot be decoded, or its mode has no rule.
        ValueError: its size is not image_hw, so the plan is out of date.
    """
    with _opened(data, rules.max_pixels) as image:
        orientation, _ = _orientation(image)
        found = upright_hw(*image.size, orientation)
        if found != image_hw:
            raise ValueError(
                f"image_hw is {found}, expected {image_hw} as planned; "
                "plan again, the source has changed"
            )
        try:
            box = (0.0, 0.0, float(image.width), float(image.height))
            if rules.reducing_gap is not None and image is not data:
                height, width = upright_hw(*target_hw[::-1], orientation)  # as it is stored
                least = (int(width * rules.reducing_gap), int(height * rules.reducing_gap))
                drafted = image.draft(None, least)
                box = box if drafted is None else drafted[1]
            expected = image.size
            pixels = plain(image, rules.background)
            if pixels.size != expected:
                raise ValueError(f"{pixels.size} pixels, expected {expected} as the header says")
        except Exception as error:  # decoders raise whatever they like
            _reraise_faults(error)
            reason = "unsupported mode" if isinstance(error, NoRule) else "undecodable"
            raise BadImage(reason, str(error)) from error
    if orientation in _TRANSPOSE:
        box = _turned(box, pixels.size, orientation)
        pixels = pixels.transpose(_TRANSPOSE[orientation])
    pixels = _resized(pixels, box, target_hw[::-1], rules)
    return np.asarray(pixels if pixels.mode == "RGB" else pixels.convert("RGB"))


def _turned(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where a box of an image of a size of (width, height) is once it is upright."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)


def _resized(image: Image.Image, box: Box, size: tuple[int, int], rules: PixelRules) -> Image.Image:
    """Return what box holds of the image at a size of (width, height)."""
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


@cache
def known_formats() -> tuple[str, ...]:
    """Return those of FORMATS this Pillow knows; the first call imports all of its modules."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _file(path: str) -> FileIO:
    """Open a regular file for reading."""
    file = open(path, "rb", buffering=0, opener=_at_once)  # noqa: SIM115 the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadImage("unreadable", f"{path!r} is no regular file")
    return file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


@contextmanager
def _opened(source: ImageData | FileIO, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the image with its header read; what was opened here is closed afterwards."""
    check_settings(max_pixels)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        with _rejecting(source):
            image = _image(source, stack, max_pixels)
            width, height = image.size
            if width * height > max_pixels:
                raise _too_many(height, width, max_pixels)
            if width * height == 0:
                raise BadImage("empty", f"{height}x{width} pixels")
            if isinstance(image, TiffImageFile):  # decoded by tiles, which may be larger than it
                rows, columns = (int(image.tag_v2.get(side, 0)) for side in (TILELENGTH, TILEWIDTH))
                if rows * columns > max_pixels:
                    raise _too_many(rows, columns, max_pixels)
        yield image


def check_settings(max_pixels: int) -> None:
    """Raise if Pillow is set, in this process, to something that rows would depend on."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        name, remedy = "PIL.ImageFile.LOAD_TRUNCATED_IMAGES", "cut images would become rows"
        raise ValueError(checks.sentence(name, True, "False", remedy))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and 2 * limit < max_pixels:  # Pillow refuses twice as many
        name, expected = "PIL.Image.MAX_IMAGE_PIXELS", f"{-(-max_pixels // 2)} or more"
        raise ValueError(checks.sentence(name, limit, expected, "lower max_pixels instead"))
    for setting, usual in _TEXT_LIMITS.items():
        value = getattr(PngImagePlugin, setting)
        if value != usual:
            name, remedy = f"PIL.PngImagePlugin.{setting}", "such a PNG file is a reject"
            raise ValueError(checks.sentence(name, value, str(usual), remedy))


def _image(source: ImageData | FileIO, stack: ExitStack, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        _array_hw(source, max_pixels)
        return image_of(source)
    file: BinaryIO
    if isinstance(source, str):
        source = stack.enter_context(_file(source))
    if isinstance(source, FileIO):
        file = stack.enter_context(_Clipped(source, HEAD_BYTES))
    else:
        file = BytesIO(source)
    file.seek(0)
    start = file.read(len(ICON))
    if not start:
        raise BadImage("empty", "the file holds no bytes")
    if start == ICON:
        height, width = icon_hw(file)
        if height * width > max_pixels:
            raise _too_many(height, width, max_pixels)
    return stack.enter_context(Image.open(file, formats=known_formats()))


def _array_hw(pixels: NDArray[Any], max_pixels: int) -> tuple[int, int]:
    height, width = pixels.shape[:2] if pixels.ndim > 1 else (0, 0)
    if height * width > max_pixels:
        raise _too_many(height, width, max_pixels)
    if height * width == 0:
        raise BadImage("empty", f"an array of shape {list(pixels.shape)} holds no pixels")
    return height, width


def _too_many(height: int, width: int, max_pixels: int) -> BadImage:
    message = f"{height}x{width} pixels, expected at most {max_pixels}"
    return BadImage("too many pixels", message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hear nothing of what Pillow warns of while it opens and decodes: all of it is settled here.

    One entry of the process's filters comes and goes, which other threads do not notice;
    `catch_warnings` would put back a whole list, theirs included. Likewise the one error it logs.
    """
    filters: Any = warnings.filters
    filters.insert(0, _PILLOW_WARNS)
    log_filter = logging.Filter("nobody")
    _PILLOW_LOG.addFilter(log_filter)
    try:
        yield
    finally:
        _PILLOW_LOG.removeFilter(log_filter)
        if _PILLOW_WARNS in filters:
            filters.remove(_PILLOW_WARNS)


@contextmanager
def _rejecting(source: object) -> Iterator[None]:
    """Turn what opening and header parsers raise, which may be anything, into a BadImage."""
    try:
        yield
    except Exception as error:
        _reraise_faults(error)
        if isinstance(error, FileNotFoundError):
            raise BadImage("missing", f"no file {source!r}") from error
        if isinstance(error, Image.DecompressionBombError):
            raise BadImage("too many pixels", str(error)) from error
        if isinstance(error, NoRule):
            raise BadImage("unsupported mode", str(error)) from error
        # Pillow's own message holds an address, which differs from run to run.
        unknown = isinstance(error, UnidentifiedImageError)
        message = "no known image format" if unknown else str(error)
        raise BadImage("unreadable", message) from error


def _reraise_faults(error: Exception) -> None:
    """Raise what is the machine's fault, not the image's: it must not become a reject."""
    known = (None, *_FILE_FAULTS)  # decoders raise OSError without a number
    fault = isinstance(error, OSError) and error.errno not in known
    if fault or isinstance(error, (BadImage, MemoryError)):
        raise error


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """Return (EXIF orientation 1..8, whether the EXIF is broken), before pixels are loaded."""
    if image.format == "TIFF":  # Pillow turns TIFF files upright itself, their size included
        return 1, False
    exif = image.info.get("exif")
    try:
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
