"""Refuses settings of Pillow that would change pixels, and silences its warnings."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageFile, PngImagePlugin

from packpipe import checks

# Matches warnings from Pillow's modules, and those that Pillow attributes to its caller, this wing.
_PILLOW_WARNS = ("ignore", None, Warning, re.compile(r"PIL\.|packpipe\.images\."), 0)

# Above this Pillow itself refuses an image, unless somebody changes its limit.
PILLOWS_LIMIT = 178_956_970

# Settings of Pillow by which it reads files otherwise, and what they are when nobody changes them:
# whether cut images are read, and the text that a PNG file may inflate, in bytes.
_SETTINGS = {
    "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": False,
    "PIL.PngImagePlugin.MAX_TEXT_CHUNK": 2**20,
    "PIL.PngImagePlugin.MAX_TEXT_MEMORY": 2**26,
}

_PILLOW_LOG = logging.getLogger("PIL.TiffImagePlugin")


def check_settings() -> None:
    """Raise ValueError if settings of Pillow would change what is decoded in this process."""
    for name, value in changed_settings().items():
        remedy = (
            "set it back before images are decoded in this process, or call packpipe.pack with "
            "num_workers=1 or more: the processes that decode do not inherit it"
        )
        raise ValueError(checks.sentence(name, value, str(_SETTINGS[name]), remedy))


def changed_settings() -> dict[str, Any]:
    """Return the settings of Pillow in this process by which it would read files otherwise."""
    found = {
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": ImageFile.LOAD_TRUNCATED_IMAGES,
        "PIL.PngImagePlugin.MAX_TEXT_CHUNK": PngImagePlugin.MAX_TEXT_CHUNK,
        "PIL.PngImagePlugin.MAX_TEXT_MEMORY": PngImagePlugin.MAX_TEXT_MEMORY,
    }
    return {name: value for name, value in found.items() if value != _SETTINGS[name]}


def check_limit(max_pixels: int) -> None:
    """Raise ValueError if Pillow, in this process, opens no images of as many pixels."""
    limit, most = Image.MAX_IMAGE_PIXELS, min(max_pixels, PILLOWS_LIMIT)
    if limit is not None and 2 * limit < most:  # Pillow warns above it, refuses above twice
        name, expected = "PIL.Image.MAX_IMAGE_PIXELS", f"{-(-most // 2)} or more"
        raise ValueError(checks.sentence(name, limit, expected, "lower max_pixels instead"))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings and the error it logs; every condition they report is checked here.

    Adds one entry to the process's warning filters and removes it, which does not affect other
    threads; `catch_warnings` would restore the whole list and undo changes that they made.
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
