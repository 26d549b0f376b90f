"""Converts any Pillow image, or an array of pixels, to grey or RGB in 8 bits.

Every mode has one rule:

======================  ====================================================================
RGB, L, P, 1            as they are (1-bit black and white become 0 and 255)
any transparency        laid on the background, before resizing; after it and after the conversion
                        of its colours, if they are to be converted (`colour`)
CMYK, YCCK, YCbCr, HSV  Pillow's conversion (Adobe's inverted CMYK is undone while decoding); CMYK
                        stays CMYK until it is resized, if its colours are to be converted
LAB                     to sRGB by colour profile
12- and 16-bit grey     scaled by depth, value · 255 ÷ 65535 to the nearest; never clipped
16-bit RGB              the upper 8 bits, as Pillow decodes it: at most one level lower
other grey of 32 bits,  by ``value_range``: low..high to 0..255, to the nearest; values outside are
floating point          clipped, and NaN is black; without it rejected; JPEG XL has 0..1
anything else           no rule: rejected
======================  ====================================================================

Files in which Pillow finds other samples than there are: see `layouts`.

Grey stays one channel until it is resized, at a third of the cost and with the same result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

_CONVERTED = ("RGBX", "P", "CMYK", "YCbCr", "HSV")
_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class NoRule(ValueError):
    """Raised for pixels that no rule turns into grey or RGB."""


def plain(
    image: Image.Image,
    background: tuple[int, int, int] | None,
    value_range: tuple[float, float] | None = None,
) -> Image.Image:
    """Return the image in mode L or RGB, by the rules in the module's table.

    Args:
        image: an image of any mode; loaded if it is not yet.
        background: (red, green, blue) that transparent pixels are laid on; None keeps colours to be
            converted as they are, so that the mode may also be RGBA or CMYK.
        value_range: the values of mode F or I that become black and white.

    Raises:
        NoRule: its mode has no rule. Exceptions of Pillow's decoders are not caught.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion clips at 255.
        values = np.asarray(image)
        grey = Image.fromarray(_grey(values, image))
        if "transparency" not in image.info:
            return grey
        # The transparent value has 16 bits, so it is compared before scaling merges values.
        layer = grey.convert("RGB")
        layer.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
        return layer if background is None else laid_on(background, layer)
    if image.mode == "F" and image.format == "JXL":  # opened by its plugin; see `jpegxl`
        value_range = (0.0, 1.0)
    if image.mode in ("F", "I") and value_range is not None:
        return Image.fromarray(_ranged(image, value_range))
    if image.has_transparency_data:
        layer = _with_transparent_value(image).convert("RGBA")
        return layer if background is None else laid_on(background, layer)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise NoRule("the colour profile conversion gave no image")
        return converted
    if image.mode in ("RGB", "L") or (image.mode == "CMYK" and background is None):
        image.load()
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in _CONVERTED:
        return image.convert("RGB")
    remedy = "; value_range=(low, high) gives it one" if image.mode in ("F", "I") else ""
    raise NoRule(f"mode {image.mode} has no rule to become RGB{remedy}")


def laid_on(background: tuple[int, int, int], layer: Image.Image) -> Image.Image:
    """Return an RGBA image as RGB, laid on (red, green, blue)."""
    below = Image.new("RGB", layer.size, background)
    below.paste(layer, mask=layer)  # the bytes of alpha_composite, in one pass
    return below


def image_of(pixels: NDArray[np.generic]) -> Image.Image:
    """Return an array of pixels as a Pillow image.

    Args:
        pixels: bool, uint8 or uint16 (scaled by depth); [height, width] of grey or
            [height, width, channels] of grey, grey and alpha, RGB, or RGB and alpha.

    Raises:
        NoRule: the array has another shape or type.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in _CHANNELS:
        shape = list(pixels.shape)
        raise NoRule(f"pixels of shape {shape} have no rule, expected [height, width, 1 to 4]")
    if pixels.dtype == np.bool_:
        values = pixels.astype(np.uint8) * 255
    elif pixels.dtype.newbyteorder("=") == np.uint16:
        values = scaled(pixels.astype(np.uint32))
    elif pixels.dtype == np.uint8:
        values = np.asarray(pixels, np.uint8)
    else:
        raise NoRule(f"pixels of type {pixels.dtype} have no rule, expected bool, uint8 or uint16")
    height, width = pixels.shape[:2]
    return Image.frombytes(_CHANNELS[channels], (width, height), values.tobytes())


def scaled(values: NDArray[np.uint32], most: int = 65535) -> NDArray[np.uint8]:
    """Return values of 0..most scaled to 0..255, rounded to the nearest."""
    # In integers. uint32 is enough: 65535 · 255 + 32767 is below 2**24.
    return ((values * 255 + most // 2) // most).astype(np.uint8)


def between(values: NDArray[Any], value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Return values scaled so that low becomes 0 and high 255, rounded to the nearest.

    Args:
        values: of any type and shape; those outside are clipped, and NaN becomes 0.
        value_range: (low, high).
    """
    low, high = value_range
    with np.errstate(over="ignore"):  # infinity is clipped as well
        shares = (values.astype(np.float64) - low) / (high - low)
    shares[np.isnan(shares)] = 0
    levels: NDArray[np.uint8] = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
    return levels


def _ranged(image: Image.Image, value_range: tuple[float, float]) -> NDArray[np.uint8]:
    """Return grey of an image in mode F or I; in a TIFF file, 0 may stand for white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    unsigned = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1
    if image.mode == "I" and tags and unsigned:  # Pillow has signed values alone
        values = values.view(np.uint32)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = 255 - between(values, value_range)
        levels[np.isnan(values)] = 0
        return levels
    return between(values, value_range)


def _grey(values: NDArray[Any], image: Image.Image) -> NDArray[np.uint8]:
    """Return grey of more than 8 bits in 8; the tags of a TIFF file give its bits and its white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    most = (1 << bits) - 1
    grey = scaled(np.minimum(values.astype(np.uint32), most), most)
    zero_is_white = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return 255 - grey if zero_is_white else grey


def _with_transparent_value(image: Image.Image) -> Image.Image:
    """Return a PNG image with its transparent value scaled to 8 bits, as its pixels are."""
    value: Any = image.info.get("transparency")
    tiles = getattr(image, "tile", [])  # none once it is loaded
    depth = tiles[0].args if tiles and image.format == "PNG" else None
    # Pillow scales the pixels of these depths when it decodes them, but not the value.
    if depth in ("L;2", "L;4"):
        value = value * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B":
        value = tuple(level >> 8 for level in value)
    else:
        return image
    image = image.copy()
    image.info["transparency"] = value
    return image
