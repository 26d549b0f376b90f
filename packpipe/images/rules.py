"""How pixels are made: the options of a configuration that decide it, and what they need."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from packpipe import checks

_TURBO = ("simplejpeg", "imagecodecs")  # what `turbo` needs
# Raised when `resize` makes other bytes.
_TURBO_RESIZE = "3"


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
    pixels: str = "pillow"


def pixel_rules(options: Any) -> PixelRules:
    """Return the `PixelRules` among the attributes of a configuration.

    Raises:
        ValueError: they need a package that is not installed.
    """
    rules = PixelRules(*(getattr(options, name) for name in PixelRules._fields))
    if rules.damaged_scans == "strict" and find_spec("simplejpeg") is None:
        expected, remedy = "simplejpeg to be installed", 'pip install simplejpeg, or use "reject"'
        raise ValueError(checks.sentence("damaged_scans", "strict", expected, remedy))
    if rules.pixels == "turbo" and not all(map(find_spec, _TURBO)):
        expected = f"{' and '.join(_TURBO)} to be installed"
        remedy = "pip install 'packpipe[turbo]'; rows made with it need it wherever they are made"
        raise ValueError(checks.sentence("pixels", "turbo", expected, remedy))
    return rules


def engine_versions(pixels: str) -> dict[str, str]:
    """Return the versions of what decodes and resizes besides Pillow, by name."""
    if pixels != "turbo":
        return {}
    return {name: version(name) for name in _TURBO} | {"turbo_resize": _TURBO_RESIZE}
