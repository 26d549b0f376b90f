"""Corrects, or refuses, files of layouts whose pixels Pillow reads wrongly without an error.

Pillow opens these files without complaint and gives other pixels than they hold:

=====================================  ===========================================================
TIFF, one sample in planes of its own  read as samples side by side, which is the same
TIFF, 16-bit RGB(A) planes, no codec   each plane read with its 16 bits
TIFF, other planes, marked below       refused: Pillow puts them into wrong channels
TIFF, signed bytes                     refused: no rule says which of them is white
TIFF, YCbCr, no codec                  read as such (RGB to Pillow before 13), but refused if its
                                       colours are subsampled, which no Pillow knows
BMP of 4 or 8 bits, two or grey        its palette used, which Pillow drops along with the depth
colours; in icons and cursors          refused
PSD in bitmap mode                     0 is white
PSD, RGB with a fourth channel         ignored, unless the layers say that it is transparency
PSD in multichannel mode               refused: Pillow reads the first ink alone
GIF, a frame smaller than its canvas   transparent beside the frame, not of the first colour
=====================================  ===========================================================

Called after an image is opened and before it is loaded; it changes where Pillow finds the samples.
"""

from __future__ import annotations

import os
from io import BytesIO
from struct import unpack, unpack_from
from typing import Any, BinaryIO

from PIL import BmpImagePlugin, Image, ImageFile, ImagePalette
from PIL.GifImagePlugin import GifImageFile
from PIL.PsdImagePlugin import PsdImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    YCBCRSUBSAMPLING,
    ImageFileDirectory_v2,
    TiffImageFile,
)

from packpipe.images.extras import load_heic
from packpipe.images.jpegxl import JpegXLFile, codestream_of, header_of
from packpipe.images.modes import NoRule

_SIGNED, _PLANES, _YCBCR = 2, 2, 6
# Uncompressed planes that Pillow knows by the letters of their mode, and those that it mixes up
# when libtiff reads them.
_PLANES_READ, _PLANES_LOST = ("RGB", "RGBA", "CMYK"), ("LA", "La", "PA", "LAB")
# Where the header of a BMP file starts; the oldest one counts in 16 bits.
_BMP_HEAD, _OLD_HEADER = 14, 12
_PALETTE_SAMPLES = {1: "P;1", 4: "P;4", 8: "P"}
# Where a PSD file has its mode; and the block that says that its image is merged with transparency.
_PSD_MODE, _PSD_MULTICHANNEL, _PSD_MERGED = 24, 7, b"8BIMMtrn"


def mend(image: Image.Image) -> Image.Image:
    """Return an image that was opened, but not loaded, so that it gives what its file holds.

    Raises:
        NoRule: Pillow cannot read its layout; the message names it.
    """
    if image.format == "ICO":
        _check_icon(image)
    elif isinstance(image, JpegXLFile):
        image.load()  # before, nobody knows its profile
    elif image.format == "JXL" and hasattr(image, "fc"):  # a caller's, and its bytes
        header_of(codestream_of(BytesIO(image.fc)))
    elif image.format == "HEIF" and isinstance(image, ImageFile.ImageFile):
        load_heic(image)
    elif not getattr(image, "tile", None):
        pass
    elif image.format == "PNG" and image.mode == "P" and image.palette is None:
        raise NoRule("a PNG of palette indices without a palette has no rule to become RGB")
    elif isinstance(image, TiffImageFile):
        _mend_tiff(image)
    elif isinstance(image, BmpImagePlugin.BmpImageFile):  # DIB and CUR as well
        _mend_bitmap(image)
    elif isinstance(image, PsdImageFile):
        _mend_photoshop(image)
    elif isinstance(image, GifImageFile):
        return _on_canvas(image)
    return image


def _on_canvas(image: GifImageFile) -> Image.Image:
    """Return the first frame of a GIF file, transparent where it does not cover the canvas."""
    place = image.tile[0].extents
    if place is None or place == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(place), place)
    return canvas


def _mend_tiff(image: Any) -> None:
    tags = image.tag_v2
    bits, samples = tags.get(BITSPERSAMPLE, (1,))[0], tags.get(SAMPLESPERPIXEL, 1)
    if _SIGNED in tags.get(SAMPLEFORMAT, ()) and bits == 8:
        raise NoRule("a TIFF of signed bytes has no rule to become RGB")
    is_raw = image.tile[0].codec_name != "libtiff"
    if is_raw and tags.get(PHOTOMETRIC_INTERPRETATION) == _YCBCR:
        image._mode = "YCbCr"
        image.tile = [tile._replace(args=("YCbCr", *tile.args[1:])) for tile in image.tile]
    if tags.get(PLANAR_CONFIGURATION) != _PLANES:
        if image.mode == "YCbCr":
            _check_colours(tags.get(YCBCRSUBSAMPLING, (2, 2)))  # unless it says, it has a quarter
        return
    if samples == 1:
        del tags[PLANAR_CONFIGURATION]
        image._setup()  # finds the samples anew
        return
    has_padded_tiles = is_raw and any(tile.args[1] for tile in image.tile)
    unmarked = image.mode == "RGBA" and EXTRASAMPLES not in tags
    if unmarked and (bits != 8 or not is_raw or has_padded_tiles):
        lost = True  # Pillow counts three planes of four
    elif is_raw:
        lost = image.mode not in _PLANES_READ or any(tile.args[0] == "a" for tile in image.tile)
        lost |= bits != 8 and image.mode == "CMYK"
    else:
        lost = image.mode in _PLANES_LOST
    if lost:
        what = f"{samples} samples of {bits} bits in planes (mode {image.mode})"
        raise NoRule(f"a TIFF of {what} has no rule to become RGB")
    if is_raw and bits == 16:
        order = "16L" if tags.prefix == b"II" else "16B"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};{order}", *tile.args[1:])) for tile in image.tile
        ]


def _check_colours(places: Any) -> None:
    """Refuse colours of which there are fewer than pixels; they are two numbers of pixels."""
    what = "a TIFF of YCbCr without compression, its colours in"
    if len(places) != 2:
        raise NoRule(f"{what} {len(places)} numbers of pixels, has no rule to become RGB")
    across, down = places
    if (across, down) != (1, 1):
        raise NoRule(f"{what} {across} x {down} pixels, has no rule to become RGB")


def unread_samples(file: BinaryIO) -> NoRule:
    """Return the error of a TIFF file for whose samples Pillow has no mode."""
    file.seek(0)
    head = file.read(8)
    tags: Any = ImageFileDirectory_v2(head + file.read(8) if 43 in head[2:4] else head)
    file.seek(tags.next)
    tags.load(file)
    bits, kinds = tags.get(BITSPERSAMPLE, (1,)), tags.get(SAMPLEFORMAT, (1,))
    kind = {1: "unsigned", 2: "signed", 3: "floating point"}.get(kinds[0], "unknown")
    # Pillow knows some samples in one order of their bytes alone.
    order = "big-endian" if head.startswith(b"MM") else "little-endian"
    where = " in planes" if tags.get(PLANAR_CONFIGURATION) == _PLANES else ""
    what = f"{tags.get(SAMPLESPERPIXEL, 1)} samples of {bits[0]} bits{where}, {kind}, {order}"
    return NoRule(f"a TIFF of {what}, has no rule to become RGB")


def _mend_bitmap(image: Any) -> None:
    """Give a bitmap the palette that Pillow dropped as grey, and its samples their bits."""
    file, mode = image.fp, image.mode
    if image.format == "CUR":
        mode = image._rawmode if getattr(image, "_masked", False) else mode  # since Pillow 12.3
        file.seek(_cursor_at(file))
    else:
        file.seek(0 if image.format == "DIB" else _BMP_HEAD)
    bits = _bits_of_bitmap(file)
    if not _lost_palette(mode, bits):
        return
    if image.format == "CUR":
        raise _lost_in_icon(bits)
    greys = (0, 255) if mode == "1" else range(256)
    image._mode = "P"
    image.palette = ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in "RGB"))
    (tile,) = image.tile
    if tile.codec_name == "raw":
        image.tile = [tile._replace(args=(_PALETTE_SAMPLES[bits], *tile.args[1:]))]


def _bits_of_bitmap(file: BinaryIO) -> int:
    """Return the bits a pixel that the header says which starts where the file stands."""
    size, header = unpack("<I12s", file.read(16))
    return int(unpack_from("<H", header, 6 if size == _OLD_HEADER else 10)[0])


def _lost_palette(mode: str, bits: int) -> bool:
    """Return whether Pillow took the pixels of a bitmap to have another number of bits."""
    return (mode == "1" and bits != 1) or (mode == "L" and bits != 8)


def _cursor_at(file: BinaryIO) -> int:
    """Return where the bitmap of the cursor starts that Pillow chooses."""
    file.seek(4)
    entries = file.read(16 * unpack("<H", file.read(2))[0])
    chosen, *others = (entries[at : at + 16] for at in range(0, len(entries), 16))
    for entry in others:
        chosen = entry if entry[0] > chosen[0] and entry[1] > chosen[1] else chosen
    return int(unpack_from("<I", chosen, 12)[0])


def _check_icon(image: Any) -> None:
    """Refuse an icon, which Pillow decodes when it opens it, if it dropped a palette as grey."""
    file, start = image.ico.buf, image.ico.entry[0].offset
    file.seek(start)
    if file.read(4) == b"\x89PNG":
        return
    file.seek(start)
    bits = _bits_of_bitmap(file)
    file.seek(start)
    if _lost_palette(BmpImagePlugin.DibImageFile(file).mode, bits):
        raise _lost_in_icon(bits)


def _lost_in_icon(bits: int) -> NoRule:
    return NoRule(f"an icon of {bits} bits in two or grey colours has no rule to become RGB")


def _mend_photoshop(image: Any) -> None:
    image.fp.seek(_PSD_MODE)
    (mode,) = unpack(">H", image.fp.read(2))
    if mode == _PSD_MULTICHANNEL:
        raise NoRule("a PSD in multichannel mode has no rule to become RGB")
    if image.mode == "1":
        image.tile = [tile._replace(args="1;I") for tile in image.tile]
    elif image.mode == "RGBA" and not _says_transparency(image):
        image._mode, image.tile = "RGB", image.tile[:3]


def _says_transparency(image: Any) -> bool:
    """Return whether the fourth channel is the transparency of all layers, merged."""
    file = image.fp
    if image._layers_position is not None:
        file.seek(image._layers_position)
        if unpack(">h", file.read(2))[0] < 0:  # the sign says so
            return True
    file.seek(_PSD_MODE + 2)
    for _ in range(2):  # colours, resources
        file.seek(unpack(">I", file.read(4))[0], os.SEEK_CUR)
    return _PSD_MERGED in file.read(unpack(">I", file.read(4))[0])
