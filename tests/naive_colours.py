"""What the pixels of every mode look like on a screen: slow twins, with the rules of naive.py.

Each takes the bands of one pixel as they are stored, and answers in numbers of 0..255, unrounded.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

Colour = tuple[float, float, float]


def laid_on(background: Sequence[float], colour: Sequence[float], alpha: int) -> Colour:
    """Source over: the colour as far as it is opaque, the background as far as it is not."""
    red, green, blue = (
        (front * alpha + back * (255 - alpha)) / 255
        for front, back in zip(colour, background, strict=True)
    )
    return red, green, blue


def of_cmyk(cyan: int, magenta: int, yellow: int, black: int) -> Colour:
    """Each ink takes its share of its colour, black its share of what is left."""
    red, green, blue = ((255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow))
    return red, green, blue


def of_ycbcr(luma: int, blueness: int, redness: int) -> Colour:
    """JFIF: full range, centred at 128."""
    blueness, redness = blueness - 128, redness - 128
    red, green, blue = (
        min(255.0, max(0.0, value))
        for value in (
            luma + 1.402 * redness,
            luma - 0.344136 * blueness - 0.714136 * redness,
            luma + 1.772 * blueness,
        )
    )
    return red, green, blue


def of_hsv(hue: int, saturation: int, value: int) -> Colour:
    """A hue of 255 is red again."""
    red, green, blue = colorsys.hsv_to_rgb(hue / 255, saturation / 255, value / 255)
    return red * 255, green * 255, blue * 255


_WHITE = (0.9642, 1.0, 0.8249)  # D50
_TO_LINEAR_SRGB = (  # from XYZ under D50, by Bradford
    (3.1338561, -1.6168667, -0.4906146),
    (-0.9787684, 1.9161415, 0.0334540),
    (0.0719453, -0.2289914, 1.4052427),
)


def of_lab(lightness: int, a: int, b: int) -> Colour:
    """CIE L*a*b* in bytes: L* in 255ths of 100, a* and b* 128 too high."""
    y = (lightness * 100 / 255 + 16) / 116
    xyz = [
        white * (t**3 if t > 6 / 29 else (t - 4 / 29) * 3 * (6 / 29) ** 2)
        for white, t in zip(_WHITE, (y + (a - 128) / 500, y, y - (b - 128) / 200), strict=True)
    ]
    red, green, blue = (
        255 * _sRGB(sum(m * value for m, value in zip(row, xyz, strict=True)))
        for row in _TO_LINEAR_SRGB
    )
    return red, green, blue


def _sRGB(light: float) -> float:  # noqa: N802
    light = min(1.0, max(0.0, light))
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def to_8_bits(value: int) -> int:
    """A 16-bit value as the nearest share of 255; there are no ties, since 257 is odd."""
    return round(Fraction(value * 255, 65535))


def rgb_of(
    mode: str,
    bands: np.ndarray,
    background: Sequence[float] = (0, 0, 0),
    palette: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """float[height, width, 3] of what is stored: [height, width, bands], bands of the mode."""

    def colour(stored: list[int]) -> Colour:
        rule: dict[str, Callable[..., Sequence[float]]] = {
            "1": lambda white: (255 if white else 0,) * 3,
            "L": lambda grey: (grey,) * 3,
            "LA": lambda grey, alpha: laid_on(background, (grey,) * 3, alpha),
            "P": lambda index: tuple(palette[index]),
            "PA": lambda index, alpha: laid_on(background, palette[index], alpha),
            "RGB": lambda *rgb: rgb,
            "RGBX": lambda red, green, blue, _: (red, green, blue),
            "RGBA": lambda red, green, blue, alpha: laid_on(background, (red, green, blue), alpha),
            "CMYK": of_cmyk,
            "YCbCr": of_ycbcr,
            "HSV": of_hsv,
            "LAB": of_lab,
            "I;16": lambda grey: (to_8_bits(grey),) * 3,
        }
        red, green, blue = rule[mode](*stored)
        return red, green, blue

    height, width = bands.shape[:2]
    pixels = bands.reshape(height * width, -1).tolist()
    return np.array([colour(pixel) for pixel in pixels], float).reshape(height, width, 3)
