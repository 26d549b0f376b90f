"""What a column of a dataset can hold, by its type: images, labels, token lists, texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Array2D, Array3D, ClassLabel, Image, LargeList, List, Value
from PIL.Image import registered_extensions

from packpipe.images.opening import known_formats

# Formats that Pillow reads with a plugin, or when it is built with a library.
_MORE_SUFFIXES = (".avif", ".heic", ".heif", ".hif", ".jxl")


def is_text(feature: Any) -> bool:
    """Return whether a column holds texts."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def holds_labels(feature: Any) -> bool:
    """Return whether a column holds a value an example, or a list of numbers.

    Lists of classes, of which an image has several, are none: they are of no fixed length.
    """
    if isinstance(feature, ClassLabel | Value):
        return True
    return holds_numbers(feature) and not isinstance(feature.feature, ClassLabel)


def holds_images(feature: Any) -> bool:
    """Return whether a column holds images: encoded, or arrays of pixels."""
    if isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary")):
        return True
    return pixel_type(feature) is not None


def pixel_type(feature: Any) -> np.dtype[Any] | None:
    """Return the type of the pixels of an array column, None if it is no such column."""
    depth = 0  # axes of an array: [height, width] or [height, width, channels]
    while isinstance(feature, List | LargeList):
        feature, depth = feature.feature, depth + 1
    if isinstance(feature, Array2D | Array3D):
        depth = 0 if depth else len(feature.shape)  # lists of arrays are no images
    dtype = getattr(feature, "dtype", None)
    found = depth in (2, 3) and dtype in ("bool", "uint8", "uint16")
    return np.dtype(dtype) if found else None


def holds_numbers(feature: Any) -> bool:
    """Return whether a feature is one of lists of numbers: of tokens."""
    # A list of bools, integers or floats. ClassLabel has integers, Value may be of text or dates.
    inner = getattr(feature, "feature", None)
    if not isinstance(feature, List | LargeList) or not isinstance(inner, ClassLabel | Value):
        return False
    return inner.dtype == "bool" or np.dtype(inner.pa_type.to_pandas_dtype()).kind in "iuf"


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of images: those of `datasets`, of Pillow's formats and some more."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return decoded_suffixes().union(ImageFolder.EXTENSIONS)


def decoded_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that packpipe decodes; films and drawings are none."""
    known = known_formats()
    own = {name for name, format_ in registered_extensions().items() if format_ in known}
    return frozenset({*own, *_MORE_SUFFIXES})
