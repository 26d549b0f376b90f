"""`given`: an image that a caller passes by itself, in a form that can be decoded."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from packpipe.images.bad_images import rejecting
from packpipe.images.image_data import ImageData


def given(value: Any) -> ImageData | None:
    """Return an image in the form that it is decoded from, None if the value is none.

    Args:
        value: encoded bytes in any form, an open file, a path, pixels, or a dict of ``bytes`` and
            ``path`` as `datasets` has it.

    Raises:
        BadImage: a file cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, bytearray):
        return bytes(value)  # whoever yields it may fill it anew
    if hasattr(value, "read"):
        with rejecting(value):
            if value.seekable():
                value.seek(0)
            value = value.read()
            return value if isinstance(value, bytes) else None
    known = isinstance(value, str | bytes | memoryview | np.ndarray | Image.Image)
    return value if known else None
