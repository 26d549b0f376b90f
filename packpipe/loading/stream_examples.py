"""An example of a stream: its image in a form that can be decoded, and its label, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, LargeList, List, Value

from packpipe import checks
from packpipe.images.bad_images import BadImage
from packpipe.images.given import given
from packpipe.images.image_data import ImageData
from packpipe.rows.labels import as_arrow
from packpipe.sources.image_source import image_at


def length_of(features: Features, column: str | None) -> int | None:
    """Return how many numbers each label has; None if labels are no lists.

    Raises:
        ValueError: the column's type does not say it.
    """
    feature = None if column is None else features[column]
    if not isinstance(feature, List | LargeList):
        return None
    length = getattr(feature, "length", -1)
    if length < 1:
        expected = "lists of one known length, in a stream"
        remedy = "cast_column it to List(Value('float32'), length=...)"
        raise ValueError(checks.sentence(f"features[{column!r}]", feature, expected, remedy))
    return int(length)


def check_label(label: Any, feature: Any, length: int | None) -> None:
    """Raise BadImage if a label cannot be one of a row.

    Args:
        label: of an example of a stream with labels.
        feature: that of the labels in the dataset's features; None if they are unknown.
        length: numbers of a label that is a list; None if it is none.
    """
    if length is not None:
        _check_vector(label, length)
    elif label is None and not _is_float(feature):
        raise BadImage("bad label", "the label is null")
    elif isinstance(label, float) and _is_infinite(label):
        raise BadImage("bad label", f"label is {label}, expected a finite number, or NaN")
    classes = range(feature.num_classes or 0) if isinstance(feature, ClassLabel) else []
    if classes and label not in classes:
        raise BadImage("bad label", f"label is {label}, expected 0..{classes[-1]}")


def label_values(labels: list[Any], feature: Any, length: int | None) -> pa.Array:
    """Return labels as Arrow, as rows have them; the arguments are those of `check_label`."""
    if length is None:
        return pa.array(labels, None if feature is None else feature.pa_type)
    vectors = [_vector(label, length) for label in labels]
    return as_arrow(np.array(vectors, np.float32).reshape(-1, length))


def _check_vector(label: Any, length: int) -> None:
    """Raise BadImage if a label is no list of so many numbers; None is one without any."""
    if label is None:
        return
    if len(label) != length:
        raise BadImage("bad label", f"label has {len(label)} numbers, expected {length}")
    for place, number in enumerate(label):
        if number is not None and _is_infinite(number):
            what = f"label[{place}] is {number}, expected a finite number, or NaN"
            raise BadImage("bad label", what)


def _is_infinite(number: float) -> bool:
    """Return whether a number is infinite as float32, which batches hold."""
    with np.errstate(over="ignore"):
        return bool(np.isinf(np.float32(number)))


def _is_float(feature: Any) -> bool:
    """Return whether labels are floats, of which a missing one (null) is NaN."""
    return isinstance(feature, Value) and pa.types.is_floating(feature.pa_type)


def _vector(label: Any, length: int) -> list[float]:
    """Return the numbers of a label, NaN where one is missing."""
    given = [None] * length if label is None else label
    return [math.nan if number is None else number for number in given]


def image_data(value: Any, pixels: np.dtype[Any] | None, root: str | None) -> ImageData:
    """Return the bytes, the path or the pixels of an image that a dataset yields.

    Args:
        value: the image, in any form that `datasets` yields.
        pixels: dtype of the pixels, if the dataset's features name it: arrays may come as lists.
        root: the only folder that paths may lead into; None for any.

    Raises:
        BadImage: the value is none of these.
    """
    image = given(value)
    if image is not None:
        return image_at(image, root) if isinstance(image, str) else image
    if isinstance(value, list) and pixels is not None:
        try:
            return np.array(value, pixels)
        except (ValueError, TypeError, OverflowError) as error:
            raise BadImage("unreadable", str(error)) from error
    raise BadImage("missing", f"the image is {type(value).__name__}, not bytes, a path or pixels")
