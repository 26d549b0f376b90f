"""Images: an encoded file to upright RGB pixels at a planned size (floor 1).

Obeys the plan and decides nothing. `probe` reads the header only, so sizes cost no decoding, and
asks Pillow where `headers` is not sure; `decode` gives exactly the planned grid. Pillow's globals
are never touched.

Every mode becomes RGB by one stated rule:

======================  ====================================================================
RGB, L, P, 1            as they are (1-bit black and white become 0 and 255)
any transparency        laid on the background, before resizing
CMYK, YCCK, YCbCr, HSV  Pillow's conversion (Adobe's inverted CMYK is undone while decoding)
LAB                     to sRGB by colour profile
16-bit grey             scaled by depth, value · 255 ÷ 65535 to the nearest; never clipped
animation               its first frame
anything else           no rule: rejected
======================  ====================================================================

The EXIF orientation is applied. An orientation that cannot be read is taken as upright and
flagged; in PNG files it counts only where it stands before the pixels, since finding a later
one would mean decoding the image while probing.
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader, BytesIO, FileIO
from threading import Lock
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from packpipe.headers import HEAD_BYTES, exif_orientation, quick_probe, upright_hw

# The bytes of an encoded image, or the path of its file.
Encoded: TypeAlias = "bytes | memoryview | str"

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS = Lock()
# Errors of one path, which another machine would meet as well.
_FILE_FAULTS = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG)
_PLAIN_MODES = ("RGB", "RGBX", "L", "P", "1", "CMYK", "YCbCr", "HSV")


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


def probe(encoded: Encoded, *, max_pixels: int) -> Probe:
    """Return the upright size of an image from its header; nothing is decoded.

    Raises:
        BadImage: no such file, empty, no image, or more than max_pixels pixels.
    """
    with ExitStack() as stack:
        source: Encoded | FileIO = encoded
        if isinstance(encoded, str):
            with _rejecting(encoded):
                source = stack.enter_context(open(encoded, "rb", buffering=0))
                head, size = source.read(HEAD_BYTES), os.fstat(source.fileno()).st_size
        else:
            head, size = encoded, len(encoded)
        image_hw = quick_probe(head, size)
        if image_hw is not None and image_hw[0] * image_hw[1] <= max_pixels:
            return Probe(image_hw, False)
        image = stack.enter_context(_opened(source, max_pixels))
        orientation, broken_exif = _orientation(image)
        return Probe(upright_hw(*image.size, orientation), broken_exif)


def decode(
    encoded: Encoded,
    *,
    image_hw: tuple[int, int],
    target_hw: tuple[int, int],
    background: tuple[int, int, int],
    max_pixels: int,
) -> NDArray[np.uint8]:
    """Return uint8[height, width, 3], the upright image resized to target_hw (antialiased bicubic).

    Args:
        encoded: bytes or path.
        image_hw: upright size in pixels the plan was made for.
        target_hw: (height, width) of the result in pixels.
        background: (red, green, blue) that transparent pixels are laid on.
        max_pixels: as for `probe`.

    Raises:
        BadImage: it cannot be decoded, or its mode has no rule.
        ValueError: its size is not image_hw, so the plan is out of date.
    """
    with _opened(encoded, max_pixels) as image:
        orientation, _ = _orientation(image)
        found = upright_hw(*image.size, orientation)
        if found != image_hw:
            raise ValueError(
                f"image_hw is {found}, expected {image_hw} as planned; "
                "plan again, the source has changed"
            )
        try:
            upright = _to_rgb(image, background)
        except Exception as error:  # decoders raise whatever they like
            _reraise_faults(error)
            raise BadImage("undecodable", str(error)) from error
    if orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    height, width = target_hw
    if upright.size != (width, height):
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(upright)


@contextmanager
def _opened(source: Encoded | FileIO, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the image with its header read; everything is closed afterwards."""
    with ExitStack() as stack:
        with _rejecting(source):
            file: BinaryIO
            if isinstance(source, str):
                source = stack.enter_context(open(source, "rb", buffering=0))
            if isinstance(source, FileIO):
                file = stack.enter_context(BufferedReader(source, HEAD_BYTES))
            else:
                file = BytesIO(source)
            file.seek(0)
            if not file.read(1):  # waits for the disk here, not under the lock
                raise BadImage("empty", "the file holds no bytes")
            # Pillow warns of large images and of broken EXIF, both of which are settled below;
            # the filters it consults belong to the whole process, hence the lock.
            with _WARNINGS, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = stack.enter_context(Image.open(file))
        width, height = image.size
        if width * height > max_pixels:
            message = f"{height}x{width} pixels, expected at most {max_pixels}"
            raise BadImage("too many pixels", message)
        yield image


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


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the image as RGB by the rules in the module's table."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion clips at 255.
        values = np.asarray(image).astype(np.uint32)
        rgb = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            rgb.paste(background, mask=Image.fromarray(values == image.info["transparency"]))
        return rgb
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(below, layer).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise BadImage("undecodable", "the colour profile conversion gave no image")
        return converted
    if image.mode in _PLAIN_MODES:
        return image.convert("RGB")
    raise BadImage("unsupported mode", f"mode {image.mode} has no rule to become RGB")
