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
bound the difference and ``benchmarks/pixels.py`` shows it; ``reducing_gap=None`` gives none.

With ``pixels="turbo"`` plain JPEG, PNG and WebP files are decoded by `turbo`, to the same bytes;
`resize` does steps 3 to 5 at once: one antialiased resize from what is decoded, without averaging
before, straight into the tiles. Other files are decoded by Pillow; pixels that are still CMYK or
transparent when they are resized, since their colours are converted afterwards, are resized by
Pillow, too.

If the orientation cannot be read, the image counts as upright and is flagged. In PNG files EXIF
counts behind the pixels, too, but not XMP.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from packpipe.images.bad_images import (
    BadImage,
    SizeChanged,
    message_of,
    rejecting,
    rejecting_giants,
    reraise_faults,
)
from packpipe.images.colour import (
    Conversion,
    HighDynamicRange,
    conversion_of,
    to_srgb,
)
from packpipe.images.edges import decoded_at, whole_parts
from packpipe.images.geometry import Box, cut, scaled, turned
from packpipe.images.headers import (
    HEAD_BYTES,
    PNG,
    late_exif,
    quick_probe,
    upright_hw,
)
from packpipe.images.image_data import Confined, ImageData
from packpipe.images.layouts import mend
from packpipe.images.modes import NoRule, plain
from packpipe.images.opening import array_hw, is_fit, known_formats, opened
from packpipe.images.orientation import TRANSPOSE, orientation_of, reader_of
from packpipe.images.pillow_settings import PILLOWS_LIMIT, check_settings
from packpipe.images.regular_files import open_file
from packpipe.images.rules import PixelRules
from packpipe.images.scans import Watched
from packpipe.images.stored import Planned, Stored, least_for

# Why an image is a reject, by the error that says so.
_REASONS: dict[type[Exception], str] = {
    NoRule: "unsupported mode",
    HighDynamicRange: "high dynamic range",
    Image.DecompressionBombError: "too many pixels",
}


class Probe(NamedTuple):
    """Result of `probe`: upright (height, width) in pixels, and whether the EXIF is broken."""

    image_hw: tuple[int, int]
    broken_exif: bool


class Decoded(NamedTuple):
    """Result of `decode`.

    Attributes:
        pixels: uint8[height, width, 3]; or the tiles that were given.
        flag: what is amiss with the image, though it has pixels: ``"broken profile"``; or None.
    """

    pixels: NDArray[np.uint8]
    flag: str | None


def prepare(rules: PixelRules) -> None:
    """Load now what rules decode with, so that no image's time limit pays for it."""
    known_formats()
    if rules.pixels == "turbo":
        from packpipe.images import turbo  # noqa: F401

        square = np.zeros((1, 1), np.uint8)
        _resize_into(np.empty((1, 1, 1, 1, 3), np.uint8), square, (0, 0, 1, 1), 1, rules)


@rejecting_giants()
def probe(data: ImageData, *, max_pixels: int) -> Probe:
    """Return the upright size of an image from its header; nothing is decoded.

    Raises:
        BadImage: there is no such file, or it is empty, no image, or has more than max_pixels.
    """
    if isinstance(data, np.ndarray):
        height, width = array_hw(data, max_pixels)
        return Probe((height, width), False)
    with ExitStack() as stack:
        source: ImageData | FileIO = data
        if not isinstance(data, Image.Image):
            if isinstance(data, str | Confined):
                with rejecting(data):
                    source = stack.enter_context(open_file(data))
                    head, size = source.read(HEAD_BYTES), os.fstat(source.fileno()).st_size
                    if head is None:  # so FileIO says that there is nothing to read yet
                        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            else:
                head, size = data, len(data)
            image_hw = quick_probe(head, size)
            late = None
            if image_hw is not None and bytes(head[:8]) == PNG:
                with rejecting(data):
                    late = late_exif(reader_of(source))
            # An image that is too large goes on to Pillow's path, which raises the error.
            if image_hw is not None and is_fit(image_hw, max_pixels) and late is None:
                return Probe(image_hw, False)
        image = stack.enter_context(opened(source, max_pixels))
        orientation, broken_exif = orientation_of(image)
        return Probe(upright_hw(*image.size, orientation), broken_exif)


@rejecting_giants()
def decode(
    data: ImageData,
    *,
    image_hw: tuple[int, int],
    target_hw: tuple[int, int],
    rules: PixelRules,
    box: tuple[int, int, int, int] | None = None,
    tiles: NDArray[np.uint8] | None = None,
) -> Decoded:
    """Return the upright image, or a box of it, resized to target_hw, its colours in sRGB.

    Args:
        data: bytes, path or pixels.
        image_hw: upright size in pixels for which the plan was made.
        target_hw: (height, width) of the result in pixels.
        rules: how pixels are made.
        box: (top, left, height, width) in pixels of the upright image, within it; None for all.
        tiles: uint8[rows, columns, height, width, 3], contiguous: where the result is written, cut
            into as many tiles of that size; None for an array of its own.

    Raises:
        BadImage: the image cannot be decoded, its mode has no rule, or it has a high dynamic range;
            or it alone takes more memory than there is.
        SizeChanged: its size is not image_hw, so the source has changed since the plan was made.
        ValueError: settings of Pillow in this process would give other pixels.
    """
    check_settings()
    planned = Planned(image_hw, target_hw, box or (0, 0, *image_hw))
    found = None
    if rules.pixels == "turbo":
        from packpipe.images import turbo

        found = turbo.stored(data, planned, rules)
    pixels, area, orientation, conversion = found or _by_pillow(data, planned, rules)
    flag = "broken profile" if conversion.broken else None
    whole = tiles if tiles is not None else np.empty((1, 1, *target_hw, 3), np.uint8)
    answer = Decoded(whole[0, 0] if tiles is None else whole, flag)
    if not isinstance(pixels, np.ndarray):
        if box is not None:
            pixels, area = cut(pixels, area)
        if rules.pixels == "turbo" and pixels.mode in ("L", "RGB"):
            pixels = np.asarray(pixels)
    if isinstance(pixels, np.ndarray):
        _resize_into(whole, pixels, area, orientation, rules)
        if conversion.transform is not None:  # of pixels one by one, so their order is any
            tall = whole.reshape(*target_hw, 3)
            converted = to_srgb(Image.fromarray(tall), conversion.transform, rules.background)
            tall[...] = np.asarray(converted)
        return answer
    if orientation in TRANSPOSE:
        area = turned(area, pixels.size, orientation)
        pixels = pixels.transpose(TRANSPOSE[orientation])
    # Turned before, so that width and height are those of the target.
    result = _resized(pixels, area, target_hw[::-1], rules)
    if conversion.transform is not None:
        result = to_srgb(result, conversion.transform, rules.background)
    rows, columns, height, width, _ = whole.shape
    levels = np.asarray(result if result.mode == "RGB" else result.convert("RGB"))
    whole.transpose(0, 2, 1, 3, 4)[...] = levels.reshape(rows, height, columns, width, 3)
    return answer


def _by_pillow(data: ImageData, planned: Planned, rules: PixelRules) -> Stored:
    """Return an image that Pillow decodes; raise what `decode` does."""
    with opened(data, rules.max_pixels) as image:
        orientation, _ = orientation_of(image)
        found = upright_hw(*image.size, orientation)
        if found != planned.image_hw:
            raise SizeChanged(
                f"image_hw is {found}, expected {planned.image_hw} as planned; "
                "plan again (stored rows: into another folder), the source has changed"
            )
        box, target = planned.stored(orientation)
        try:
            pixels, area, conversion = _loaded(image, box, target, rules, image is not data)
        except Exception as error:  # decoders raise whatever they like
            reraise_faults(error)
            reason = _REASONS.get(type(error), "undecodable")
            raise BadImage(reason, message_of(error, data)) from error
    return Stored(pixels, area, orientation, conversion)


def _loaded(
    image: Image.Image, box: Box, target: tuple[int, int], rules: PixelRules, of_file: bool
) -> tuple[Image.Image, Box, Conversion]:
    """Return pixels as stored, grey or RGB; where a box is in them; what colours they have.

    Args:
        image: opened, perhaps not loaded.
        box: what is needed of it, in the size that its header says.
        target: (width, height) that the box is to be resized to, before it is turned.
        rules: how pixels are made.
        of_file: whether the image was opened from a file, not given by the caller.
    """
    size = image.size  # as the header says; loading may set another
    mended = mend(image)
    conversion = Conversion(None, False)
    if rules.profiles != "ignore":
        conversion = conversion_of(image, of_file=of_file)
    background = rules.background if conversion.transform is None else None
    # A JPEG alone is decoded smaller: other formats would give a thumbnail that their file holds.
    # And not an image of the caller's, which draft would change.
    scans = _watched(image) if of_file else None
    drafted = _drafted(image, scans, box, target, rules)
    expected = size if drafted is None else image.size
    pixels = plain(mended, background, rules.value_range)
    if pixels.size != expected:
        raise ValueError(f"{pixels.size} pixels, expected {expected} as the header says")
    decoded_size = drafted or size
    if scans is not None:
        if rules.damaged_scans != "keep":
            damage = scans.damage(image, strict=rules.damaged_scans == "strict")
            if damage is not None:
                raise BadImage("damaged scan", damage)
        if drafted is not None and rules.jpeg_edges == "clean":
            pixels, decoded_size = _whole(pixels, decoded_size, scans, size, background)
    return pixels, scaled(box, size, decoded_size), conversion


def _drafted(
    image: Image.Image,
    scans: Watched | None,
    box: Box,
    target: tuple[int, int],
    rules: PixelRules,
) -> tuple[float, float] | None:
    """Have a JPEG decoded smaller, if it can be; return its (width, height) then, else None."""
    if scans is None or scans.scans.is_lossless or rules.reducing_gap is None:
        return None
    drafted = image.draft(None, least_for(box, image.size, target, rules.reducing_gap))
    return None if drafted is None else drafted[1][2:]


def _watched(image: Image.Image) -> Watched | None:
    """Have a JPEG image decoded from a file that watches; None for other images."""
    if not isinstance(image, JpegImageFile):
        return None
    file: Any = image.fp
    file.seek(0)
    image.fp = watched = Watched(file.read())
    return watched


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
    if parts == drafted or size[0] * size[1] > PILLOWS_LIMIT * parts**2:
        return pixels, decoded_size
    return plain(decoded_at(scans.content, parts), background), (size[0] / parts, size[1] / parts)


def _resize_into(
    tiles: NDArray[np.uint8],
    pixels: NDArray[np.uint8],
    box: Box,
    orientation: int,
    rules: PixelRules,
) -> None:
    from packpipe.images.resize import resize  # Numba takes a second to load

    down, up = rules.downscale_filter, rules.upscale_filter
    resize(pixels, box, tiles, downscale_filter=down, upscale_filter=up, orientation=orientation)


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
