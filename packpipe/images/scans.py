"""Finds JPEG files whose scan is damaged: Pillow decodes them to grey or noise and says nothing.

libjpeg goes on after an error, with a warning that Pillow hides. What it leaves can be seen:

1. markers (`scans_of`, from the file alone): one that has no place within a scan, restarts missing
   or out of order, components or coefficients that no scan holds;
2. bytes that the decoder did not need: those before them were read as more units than they were;
3. a last pixel in the grey of a unit that was not there. Whether it was can be asked: behind a
   whole scan more bytes change nothing. Two decodes at 1/8, only for such pixels.

Not seen: bytes that were read as other codes for as many units; a few units more or less; in
progressive and arithmetic files all that 1 does not show. With simplejpeg, libjpeg's warnings are
seen, too, at the cost of another decode. ``benchmarks/damage.py`` measures both.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from io import BytesIO
from struct import unpack_from
from typing import NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from packpipe.images.headers import JpegHead

_RESTARTS, _END, _SCAN, _INTERVAL = range(0xD0, 0xD8), 0xD9, 0xDA, 0xDD
_ALONE = {0x01, *_RESTARTS, 0xD8}  # markers without a length
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE, _LOSSLESS = (0xC0, 0xC1), (0xC2, 0xCA), (0xC3, 0xCB)
# What may follow a scan: tables, a number of lines, an interval, applications, a comment, a scan.
_FOLLOWING = {0xC4, 0xCC, 0xDB, 0xDC, _INTERVAL, *range(0xE0, 0xF0), 0xFE, _SCAN}
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_COEFFICIENTS = 64
_SPARE = 16
_FILLING = bytes(range(1, 251)) * 2
# Grey as decoded, and as Pillow turns the inks of CMYK.
_GREYS = (127, 128)


class Scans(NamedTuple):
    """What the markers of a JPEG file say; zeros if they cannot be followed.

    Attributes:
        frame: the frame's marker without its FF: 0xC0 for a baseline file.
        number: how many scans there are.
        end: where the last one ends.
        damage: what is wrong, or None.
    """

    frame: int = 0
    number: int = 0
    end: int = 0
    damage: str | None = None

    @property
    def is_lossless(self) -> bool:
        """Whether it holds no frequencies, so that libjpeg cannot decode it at a smaller size."""
        return self.frame in _LOSSLESS


def scans_of(content: bytes, head: JpegHead | None = None) -> Scans:
    """Return what the markers of a JPEG file say.

    Args:
        content: the file.
        head: what it says before its first scan, if that is known; the result is the same without.
    """
    try:
        return _walked(content, head)
    except (struct.error, LookupError, ValueError, ArithmeticError):
        return Scans(damage="markers that lead nowhere")  # unless Pillow has refused it


class _Layout(NamedTuple):
    """Size of a frame in pixels, and how often each layer is sampled in a unit, across and down."""

    width: int = 0
    height: int = 0
    samples: dict[int, tuple[int, int]] = {}  # noqa: RUF012 never changed

    def restarts(self, layers: bytes, interval: int) -> int:
        """Return how many restarts there are in a scan of some layers."""
        if not interval:
            return 0
        most_across, most_down = map(max, zip(*self.samples.values(), strict=True))
        # Layers together come in units of all their blocks, one alone block by block.
        across, down = (1, 1) if len(layers) > 1 else self.samples[layers[0]]
        columns = -(-self.width * across // (8 * most_across))
        rows = -(-self.height * down // (8 * most_down))
        return int(-(-columns * rows // interval) - 1)


def _walked(content: bytes, head: JpegHead | None) -> Scans:
    frame = number = interval = at = end = 0
    layout = _Layout()
    markers: list[int] = []
    low_bits: dict[int, list[int]] = {}  # lowest bit that came, of each coefficient
    if head is not None:
        frame, layout = content[head.frame + 1], _layout(content, head.frame + 4)
        low_bits, interval, at = _no_bits(layout), head.interval, head.scan
    while True:
        if number and at == len(content):  # Pillow needs no marker at the end
            break
        if number and content[at] != 0xFF:
            return Scans(frame, number, end, "bytes between two segments")
        at = content.index(b"\xff", at)
        while content[at] == 0xFF:
            at += 1
        code, at = content[at], at + 1
        if code == _END:
            break
        if code in _ALONE:
            continue
        if number and code not in _FOLLOWING:
            return Scans(frame, number, end, f"marker FF{code:02X} within a scan")
        start, at = at + 2, at + unpack_from(">H", content, at)[0]
        if code in _FRAMES:
            frame, layout = code, _layout(content, start)
            low_bits = _no_bits(layout)
        elif code == _INTERVAL:
            (interval,) = unpack_from(">H", content, start)
        elif code == _SCAN:
            number += 1
            layers = content[start + 1 : start + 1 + 2 * content[start] : 2]
            first, last, bits = content[(said := start + 1 + 2 * len(layers)) : said + 3]
            if frame not in _PROGRESSIVE:
                first, last, bits = 0, _COEFFICIENTS - 1, 0
            for layer in layers:
                low_bits[layer][first : last + 1] = [bits & 15] * (last + 1 - first)
            markers = markers or _markers(content, at)
            restarts, at = _restarts(content, at, markers)
            end = at
            if frame not in _LOSSLESS:
                expected = layout.restarts(layers, interval)
                # One more, behind the last unit, does no harm.
                if len(restarts) not in (expected, expected + bool(interval)):
                    what = f"{len(restarts)} restarts, expected {expected}"
                    return Scans(frame, number, end, what)
            if restarts != [place % 8 for place in range(len(restarts))]:
                return Scans(frame, number, end, "restarts out of order")
    if any(any(bits) for bits in low_bits.values()):
        return Scans(frame, number, end, "coefficients that no scan holds")
    return Scans(frame, number, end)


def _no_bits(layout: _Layout) -> dict[int, list[int]]:
    return {layer: [_COEFFICIENTS] * _COEFFICIENTS for layer in layout.samples}


def _layout(content: bytes, start: int) -> _Layout:
    height, width, layers = unpack_from(">HHB", content, start + 1)
    parts = content[start + 6 : start + 6 + 3 * layers]
    sampled = zip(parts[::3], parts[1::3], strict=True)
    return _Layout(width, height, {layer: (of >> 4, of & 15) for layer, of in sampled})


def _markers(content: bytes, start: int) -> list[int]:
    """Return where FF stands from a place on, but for those of a scan: before 00, and before FF."""
    return [found.start() for found in _MARKER.finditer(content, start)]


def _restarts(content: bytes, start: int, markers: list[int]) -> tuple[list[int], int]:
    """Return the numbers of the restarts in a scan, and where the marker is that ends it."""
    numbers: list[int] = []
    for place in range(bisect_left(markers, start), len(markers)):
        at = markers[place]
        code = content[at + 1]
        if code not in _RESTARTS:
            return numbers, at
        numbers.append(code - _RESTARTS[0])
    return numbers, len(content)


class Watched(BytesIO):
    """A JPEG file that tells, once it is decoded, what is wrong with its scans.

    A scan needs its last byte for its last unit. So the decoder gets all but the last ones first,
    and asks for more, unless bytes were left over.

    Args:
        content: the file.

    Attributes:
        content: the file.
        scans: what its markers say.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.content, self.scans = content, scans_of(content)
        # Of other files the decoder reads all before the first row, or must not be kept waiting.
        is_watched = self.scans.frame in _SEQUENTIAL and self.scans.number == 1
        # Some encoders fill up their scans, or write a few bytes more than they need.
        end = len(content[: self.scans.end].rstrip(b"\x00\xff"))
        self._last = end - _SPARE if is_watched else -1

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, up to the last ones of the scan."""
        at = self.tell()
        if at < self._last and size is not None and at + size > self._last:
            size = self._last - at
        return super().read(size)

    def damage(self, image: Image.Image, *, strict: bool) -> str | None:
        """Return what is wrong with the scans of an image that was decoded from here, or None.

        Args:
            image: the image; loaded, nothing done to it.
            strict: ask libjpeg, too, which needs simplejpeg.
        """
        if self.scans.damage is not None:
            return self.scans.damage
        if self.tell() == self._last:
            return "bytes left over"
        if self._ends_early(image):
            return "the scan ends before its last unit"
        return _strict_error(self.content, image.mode) if strict else None

    def _ends_early(self, image: Image.Image) -> bool:
        last = image.getpixel((image.width - 1, image.height - 1))
        levels = last if isinstance(last, tuple) else (last,)
        if self.scans.is_lossless or any(level not in _GREYS for level in levels):
            return False
        content, end = self.content, self.scans.end
        return _eighth(content[:end] + _FILLING + content[end:]) != _eighth(content)


def _eighth(content: bytes) -> bytes:
    image = JpegImageFile(BytesIO(content))
    image.draft(None, (1, 1))
    return image.tobytes()


def _strict_error(content: bytes, mode: str) -> str | None:
    """Return what libjpeg warns of when it decodes a file, None if nothing."""
    import simplejpeg

    colours = "CMYK" if mode == "CMYK" else "GRAY"
    try:
        simplejpeg.decode_jpeg(content, colours, min_height=1, min_width=1, min_factor=2)
    except ValueError as error:
        return str(error)
    return None
