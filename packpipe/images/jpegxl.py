"""Reads JPEG XL: its header here, its pixels with the decoder of `pillow-jxl-plugin`.

The plugin's own image class decodes a file when it opens it, whatever its size, so the header is
read here, from the file's first bytes. The decoder then gets the codestream alone:

==================  ==========================================================================
orientation         the codestream's, which the decoder applies; EXIF does not count, by the
                    standard
animation           refused: the decoder gives its last frame
10 to 16 bits       scaled by depth; colours lose their lower bits, as 16-bit RGB does elsewhere
floating point      0 is black and 1 white, by the standard; beyond that clipped, NaN is black
premultiplied       divided by their transparency
light               numbers of linear light lose steps in the dark: they have 8 bits before their
                    profile is applied
CMYK                refused: the decoder gives three of its four inks
more than 4 extra   refused: each takes as much memory as a colour, whatever the limit on pixels
channels
==================  ==========================================================================

An image that a caller opened with the plugin has the same rules, as far as it is the same: it is
decoded already, and premultiplied colours are not divided.

Source: ISO/IEC 18181-1 (headers), 18181-2 (boxes).
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from packpipe.images.boxes import boxes
from packpipe.images.modes import NoRule, between, scaled

CODESTREAM = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
# More than a header takes: each of the extra channels may have a name of 1,071 bytes.
_HEAD_BYTES = 2**13
_MOST_BOXES = 2**14
_MOST_EXTRA = 4
# What a decoder takes beside its pixels, the stacks of its threads included.
_LEAST_MEMORY = 2**26
_ALPHA, _SPOT, _BLACK, _FILTER = 0, 2, 4, 5  # types of extra channels
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
# (offset, bits) of the four ways in which a number is written.
_SIDE, _SIDE_BY_8 = ((1, 9), (1, 13), (1, 18), (1, 30)), ((1, 5),)
_PREVIEW = ((1, 6), (65, 8), (321, 10), (1345, 12)), ((16, 0), (32, 0), (1, 5), (33, 9))
_DEPTHS, _FLOAT_DEPTHS = ((8, 0), (10, 0), (12, 0), (1, 6)), ((32, 0), (16, 0), (24, 0), (1, 6))
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Header(NamedTuple):
    """What a header says; the size in pixels is that of the upright image.

    Grey counts as three channels, as the decoder may have it; a number has 1, 2 or 4 bytes.
    """

    width: int
    height: int
    is_premultiplied: bool
    channels: int = 3
    number_bytes: int = 1


class JpegXLFile(ImageFile.ImageFile):
    """An image whose mode and colour profile are known once it is loaded."""

    format = "JXL"

    def _open(self) -> None:
        file: Any = self.fp
        self._header = header_of(codestream_of(file, _HEAD_BYTES))
        self._size, self._mode = self._header[:2], "RGB"

    def load(self) -> Any:
        """Decode the pixels, if they are not decoded yet."""
        if self._im is None:
            file: Any = self.fp
            codestream = codestream_of(file)
            header = self._header
            # The decoder took up to 5.2 bytes a channel of 8 bits, and 14.5 of floating point,
            # its results and copies of them included.
            allocate(header.width * header.height * header.channels, 4 + 3 * header.number_bytes)
            pixels, profile = _decoded(codestream, header.is_premultiplied)
            self._size, self._mode, self.im = pixels.size, pixels.mode, pixels.im
            if profile:
                self.info["icc_profile"] = profile
        return super().load()


def codestream_of(file: BinaryIO, most: int = -1) -> bytes:
    """Return the codestream of a file, at most its first bytes; -1 for all.

    Raises:
        ValueError: the file holds none, or too many boxes.
    """
    file.seek(0)
    if file.read(2) == CODESTREAM:
        file.seek(0)
        return file.read(most)
    parts = bytearray()
    for name, start, end in boxes("a JPEG XL", file, len(CONTAINER), _MOST_BOXES):
        if name not in (b"jxlc", b"jxlp"):
            continue
        file.seek(start)
        number = file.read(4) if name == b"jxlp" else b"\x80"  # of the part; the last is marked
        file.seek(start + 4 * (name == b"jxlp"))
        size = max(0, end - file.tell())
        parts += file.read(size if most < 0 else min(size, most))
        if number[:1] >= b"\x80" or 0 <= most <= len(parts):
            break
    if not parts.startswith(CODESTREAM):
        raise ValueError("a JPEG XL without a codestream")
    return bytes(parts[:most] if most >= 0 else parts)


def header_of(codestream: bytes) -> Header:
    """Return what the header of a codestream says.

    Raises:
        NoRule: the decoder cannot give its pixels.
        ValueError: the header is cut short.
    """
    bits = _Bits(codestream.removeprefix(CODESTREAM))
    width, height = bits.size()
    is_premultiplied, channels, number_bytes = False, 0, 1
    if not bits.take(1):  # else everything has its default
        more = bits.take(1)
        orientation = 1 + bits.take(3) if more else 1
        if orientation > 4:
            width, height = height, width
        if more and bits.take(1):
            bits.size()  # it is only recommended
        if more and bits.take(1):
            bits.size(*_PREVIEW)
        if more and bits.take(1):
            raise NoRule("an animated JPEG XL has no rule to become RGB")
        number_bytes = bits.depth()
        bits.take(1)
        channels = bits.number((0, 0), (1, 0), (2, 4), (1, 12))
        if channels > _MOST_EXTRA:
            raise NoRule(f"a JPEG XL of {channels} extra channels has no rule to become RGB")
        multiplied = [bits.extra_channel() for _ in range(channels)]
        is_premultiplied = any(multiplied)
    return Header(width, height, is_premultiplied, 3 + channels, number_bytes)


class _Bits:
    """The bits of a header, the lowest of each byte first."""

    def __init__(self, content: bytes) -> None:
        self._bits, self._left = int.from_bytes(content[:_HEAD_BYTES], "little"), 8 * len(content)

    def take(self, bits: int) -> int:
        self._left -= bits
        if self._left < 0:
            raise ValueError("the header of a JPEG XL is cut short")
        value = self._bits & (1 << bits) - 1
        self._bits >>= bits
        return value

    def number(self, *ways: tuple[int, int]) -> int:
        offset, bits = ways[self.take(2) if len(ways) > 1 else 0]
        return offset + self.take(bits)

    def size(self, ways: Any = _SIDE, ways_by_8: Any = _SIDE_BY_8) -> tuple[int, int]:
        """Return (width, height)."""
        unit, ways = (8, ways_by_8) if self.take(1) else (1, ways)
        height = unit * self.number(*ways)
        ratio = self.take(3)
        if not ratio:
            return unit * self.number(*ways), height
        over, under = _RATIOS[ratio]
        return height * over // under, height

    def depth(self) -> int:
        """Return the bytes of a number once it is decoded."""
        is_float = self.take(1)
        bits = self.number(*(_FLOAT_DEPTHS if is_float else _DEPTHS))
        self.take(4 if is_float else 0)
        return 4 if is_float or bits > 16 else 1 + (bits > 8)

    def extra_channel(self) -> bool:
        """Return whether it is one of transparency that colours are multiplied by."""
        if self.take(1):
            return False
        kind = self.number((0, 0), (1, 0), (2, 4), (18, 6))
        if kind == _BLACK:
            raise NoRule("a JPEG XL of CMYK has no rule to become RGB")
        self.depth()
        self.number((0, 0), (3, 0), (4, 0), (1, 3))
        self.take(8 * self.number((0, 0), (0, 4), (16, 5), (48, 10)))  # its name
        if kind == _SPOT:
            self.take(64)
        elif kind == _FILTER:
            self.number((1, 0), (0, 2), (3, 4), (19, 8))
        return kind == _ALPHA and bool(self.take(1))


def allocate(values: int, each: int) -> None:
    """Raise MemoryError if there is not enough for so many values of some bytes, and some more.

    For decoders that end the process where memory is short. It is given back, untouched.
    """
    np.empty(_LEAST_MEMORY + values * each, np.uint8)


def _decoded(codestream: bytes, is_premultiplied: bool) -> tuple[Image.Image, bytes]:
    """Return the upright pixels in 8 bits, and the profile of their colours."""
    from pillow_jxl import Decoder

    try:
        _, info, data, profile, *_ = Decoder(num_threads=0)(codestream)
    except BaseException as error:
        # A panic in Rust is no Exception.
        is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not is_failure:
            raise
        raise ValueError("libjxl cannot decode it") from error
    channels = info.num_channels + info.has_alpha_channel
    # The mode that it says is wrong for grey with transparency of more than 8 bits.
    bytes_each = len(data) // (info.width * info.height * channels)
    values = np.frombuffer(data, {1: np.uint8, 2: np.uint16, 4: np.float32}[bytes_each])
    if bytes_each == 2:
        values = scaled(values.astype(np.uint32))
    elif bytes_each == 4:
        values = between(values, (0.0, 1.0))
    mode = _MODES[channels]
    stored = mode.replace("A", "a") if is_premultiplied else mode
    image = Image.frombytes(stored, (info.width, info.height), values.tobytes())
    return image.convert(mode), profile
