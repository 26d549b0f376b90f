"""Joins and converts Arrow texts, bytes and lists, with 64-bit offsets where 2 GiB are too few.

An array of `string`, `binary` or `list` has 32-bit offsets, so it reaches at most 2**31 - 1 bytes
or values, and joining the chunks of a larger column fails. The large types have 64-bit offsets.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MOST = 2**31 - 1  # bytes or values that 32-bit offsets reach
_WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of a type are texts or bytes with offsets of 32 or 64 bits."""
    return kind in _WIDE or kind in _WIDE.values()


def is_narrow(kind: pa.DataType) -> bool:
    """Return whether values of a type are texts or bytes with 32-bit offsets."""
    return kind in _WIDE


def wide(kind: pa.DataType) -> pa.DataType:
    """Return a type with 64-bit offsets instead of 32-bit ones, also inside lists."""
    if pa.types.is_list(kind):
        return pa.large_list(wide(kind.value_type))
    return _WIDE.get(kind, kind)


def joined(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; one too large for 32-bit offsets gets 64-bit ones."""
    if column.num_chunks == 1:  # `combine_chunks` copies even a single chunk
        return column.chunk(0)
    return (column if column.nbytes <= MOST else column.cast(wide(column.type))).combine_chunks()


def as_bytes(text: pa.Array) -> pa.Array:
    """Return texts as lists of uint8 in the same memory."""
    valid, offsets, data = text.buffers()
    data = pa.py_buffer(b"") if data is None else data
    kind = (pa.list_ if is_narrow(text.type) else pa.large_list)(pa.uint8())
    values = pa.Array.from_buffers(pa.uint8(), data.size, [None, data])
    return pa.Array.from_buffers(
        kind, len(text), [valid, offsets], offset=text.offset, children=[values]
    )


def from_bytes(
    kind: pa.DataType, ends: NDArray[np.int64], data: NDArray[np.uint8], there: NDArray[np.bool_]
) -> pa.Array:
    """Return texts: text i is ``data[ends[i]:ends[i + 1]]``, or null where it is not there.

    The type is the one given, or its large form if 32-bit offsets do not reach.
    """
    kind = kind if ends[-1] <= MOST else wide(kind)
    width = np.int32 if is_narrow(kind) else np.int64
    valid = None if there.all() else pa.array(there).buffers()[1]
    offsets = pa.py_buffer(ends.astype(width))
    return pa.Array.from_buffers(kind, len(there), [valid, offsets, pa.py_buffer(data)])


def ends_of(text: pa.Array) -> NDArray[np.int64]:
    """Return int64[texts + 1], where each text ends in the memory of all of them."""
    ends: NDArray[np.int64] = as_bytes(text).offsets.to_numpy().astype(np.int64)
    return ends


def narrowed(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return texts of 2 GiB at most with 32-bit offsets; their bytes are not copied."""
    # Arrow's own cast refuses a slice that begins beyond 2 GiB.
    ends, data = ends_of(text), as_bytes(text).values.to_numpy()
    there = text.is_valid().to_numpy(zero_copy_only=False)
    return from_bytes(kind, ends - ends[0], data[ends[0] : ends[-1]], there)
