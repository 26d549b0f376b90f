"""The options of images one by one: types, what may be chosen, checks, and what came later."""

from __future__ import annotations

import math
from typing import Any, TypedDict

from packpipe import checks
from packpipe.packing.packs import STRATEGIES
from packpipe.planning.crops import CropLaw
from packpipe.planning.dropping import DropLaw
from packpipe.planning.resolution import Resolution
from packpipe.planning.views import View

# A plan must not depend on the machine, but "optimal" depends on how much is done in its budget;
# "nnlshp" is for comparison only.
PLAN_STRATEGIES = tuple(name for name in STRATEGIES if name not in ("optimal", "nnlshp"))

# Coordinates are stored as int16, and one image may be seq_len patches wide.
MAX_IMAGE_SEQ_LEN = 2**15 - 1
# The default: above it Pillow's own opener refuses an image.
MAX_PIXELS = 178_956_970
# Of the largest JPEG.
MOST_PIXELS = 65535**2
FILTERS = ("bicubic", "lanczos", "hamming", "bilinear", "box", "nearest")
FIT_LAST = ("drop_rate", "resolution")
PROFILES = ("srgb", "ignore")
DAMAGED_SCANS = ("reject", "strict", "keep")
JPEG_EDGES = ("clean", "padded")
PIXELS = ("pillow", "turbo")
# Options that came later, each with the value by which all that was made before them was made. With
# this value they are not told, so that fingerprints, states and records of that time stay the same.
BEFORE: dict[str, Any] = {
    "profiles": "ignore",
    "damaged_scans": "keep",
    "crop": None,
    "value_range": None,
    "views": 1,
    "views_together": False,
    "jpeg_edges": "padded",
    "prefix_tokens": 0,
    "pixels": "pillow",
}


class PackOptions(TypedDict, total=False):
    """The options of `PackConfig` besides ``seq_len``, as keyword arguments."""

    patch_size: int
    crop: CropLaw | None
    resolution: Resolution
    max_tokens: int | None
    max_upscale: float | None
    drop_rate: float | DropLaw
    epochs: float | None
    fit_last: str | None
    fit_limit: float
    max_segments: int
    strategy: str
    window: int
    background: tuple[int, int, int]
    reducing_gap: float | None
    downscale_filter: str
    upscale_filter: str
    max_pixels: int
    profiles: str
    damaged_scans: str
    value_range: tuple[float, float] | None
    views: int | tuple[View, ...]
    views_together: bool
    jpeg_edges: str
    prefix_tokens: int
    pixels: str


def positive(name: str, value: Any) -> float | None:
    """Return a positive number, as a float; or None, where the option may be left out."""
    if value is None and name != "fit_limit":
        return None
    return checks.positive_number(name, value, "1.0 is the size, or the share, itself")


def checked_range(value_range: Any) -> tuple[float, float] | None:
    """Return the range of values that become black to white; None if there is none."""
    if value_range is None:
        return None
    expected = "(low, high), low below high, both finite"
    remedy = "values of low become black, of high white"
    try:
        low, high = value_range
        low = float(checks.real_number("value_range[0]", low, remedy))
        high = float(checks.real_number("value_range[1]", high, remedy))
    except (TypeError, ValueError):
        raise ValueError(checks.sentence("value_range", value_range, expected, remedy)) from None
    if not 0 < high - low < math.inf:
        raise ValueError(checks.sentence("value_range", value_range, expected, remedy))
    return low, high


def checked_colour(colour: Any) -> tuple[int, int, int]:
    """Return a colour: (red, green, blue), each in 0..255."""
    remedy = "white is (255, 255, 255)"
    try:
        red, green, blue = colour
    except (TypeError, ValueError):
        expected = "(red, green, blue) in 0..255"
        raise ValueError(checks.sentence("background", colour, expected, remedy)) from None
    return (
        checks.whole_number("background[0]", red, 0, 255, remedy),
        checks.whole_number("background[1]", green, 0, 255, remedy),
        checks.whole_number("background[2]", blue, 0, 255, remedy),
    )
