"""Labels of images in Arrow: numbers of classes, numbers to predict, or lists of numbers.

Lists of K numbers are stored as ``fixed_size_list<float32>[K]``: several labels (0 or 1 a class),
shares of classes, or what a regression is to give. A number that is missing is NaN, and an image
without a list has NaN alone: losses leave both out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe import checks


class Vectors(NamedTuple):
    """Lists of numbers as an array.

    Attributes:
        values: float32[n, K], NaN where a number is missing.
        lens: int64[n], numbers of each list as it was given; K of one that is null.
    """

    values: NDArray[np.float32]
    lens: NDArray[np.int64]


def is_vector(kind: pa.DataType) -> bool:
    """Return whether values of a type are lists of numbers."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_so(kind) for is_so in lists):
        return False
    inner = kind.value_type
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_so(inner) for is_so in numbers)


def vectors(lists: pa.Array) -> Vectors:
    """Return lists of numbers as one array; a list of another length than K is NaN throughout.

    K is the length that their type says or, of lists of any length, the commonest.

    Args:
        lists: of integers, floats or bools.

    Raises:
        ValueError: there is no list, or lists are empty, so that K is unknown.
    """
    given = pc.list_value_length(lists)
    there = np.asarray(given.is_valid())
    lens = np.asarray(pc.fill_null(given, -1)).astype(np.int64)
    if pa.types.is_fixed_size_list(lists.type):
        length = lists.type.list_size
    else:
        found, times = np.unique(lens[there], return_counts=True)
        length = int(found[times.argmax()]) if len(found) else 0  # of equal ones the shortest
    if not length:
        expected = "lists of numbers, or of a length that their type says"
        remedy = "cast_column them to List(Value('float32'), length=K), or pass label_column=None"
        raise ValueError(checks.sentence("labels", "empty", expected, remedy))
    fits = there & (lens == length)
    values = np.full((len(lists), length), np.nan, np.float32)
    flat = lists.filter(pa.array(fits)).flatten().cast(pa.float32(), safe=False)
    values[fits] = flat.to_numpy(zero_copy_only=False).reshape(-1, length)
    lens[~there] = length
    return Vectors(values, lens)


def as_arrow(values: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return float32[n, K] as n lists of K numbers, without copying."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def label_values(labels: pa.Array) -> NDArray[Any]:
    """Return labels as batches show them: int64[n] of classes, float32[n, K] of other numbers.

    Single numbers that are no integers have K = 1.

    Raises:
        TypeError: they are neither numbers nor lists of them.
        ValueError: lists are of several lengths.
    """
    kind = labels.type
    if is_vector(kind):
        if not len(labels):
            size = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
            return np.empty((0, size), np.float32)
        values, lens = vectors(labels)
        odd = np.flatnonzero(lens != values.shape[1])
        if len(odd):
            found, expected = int(lens[odd[0]]), f"{values.shape[1]}, as most have"
            what = f"numbers in labels[{odd[0]}]"
            raise ValueError(checks.sentence(what, found, expected, "make them equally long"))
        return values
    if pa.types.is_floating(kind):
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite
            numbers = labels.to_numpy(zero_copy_only=False).astype(np.float32)
        single: NDArray[np.float32] = numbers.reshape(-1, 1)
        return single
    if not len(labels):  # a rank without packs, where the type may be unknown
        return np.empty(0, np.int64)
    if not pa.types.is_integer(kind):
        expected = "integers, floats or lists of numbers"
        remedy = "class_encode_column it before packing, or pack with label_column=None"
        raise TypeError(checks.sentence("labels.type", str(kind), expected, remedy))
    # torch's cross-entropy takes class numbers as int64.
    return np.asarray(labels).astype(np.int64)
