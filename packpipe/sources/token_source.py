"""List columns of a source: where each example's tokens lie in memory.

Arrow keeps a column in chunks, each with offsets into values; a chunk may be a slice. Here all of
it becomes one array of starts and one of lengths, and the values stay where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe.rows.fill_tokens import TokenColumn
from packpipe.rows.rejects import Reject


def one_view(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (values, firsts): one array that reaches all given ones, and where each begins.

    Nothing is copied: the array spans the memory from the first to the last of them. What lies
    between belongs to others and must not be touched; the arrays must outlive the view.

    Args:
        arrays: of one dtype and dimension, one at least.
    """
    dtype = arrays[0].dtype
    there = [array for array in arrays if array.size]
    if len(there) < 2:
        return (there or arrays)[0], np.zeros(len(arrays), np.int64)
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    first = min(array.ctypes.data for array in there)
    last = max(array.ctypes.data + array.nbytes for array in there)
    if any((array.ctypes.data - first) % dtype.itemsize for array in there):
        sizes = [array.size for array in arrays]
        return np.concatenate(arrays), np.cumsum([0, *sizes[:-1]])
    span: Any = (ctypes.c_uint8 * (last - first)).from_address(first)
    return np.frombuffer(span, dtype), (addresses - first) // dtype.itemsize


def token_column(column: pa.ChunkedArray) -> TokenColumn:
    """Return a column of lists (of any kind) of numbers; bool becomes uint8, which is copied."""
    empty = pa.array([], column.type)
    chunks = [_read(chunk) for chunk in column.chunks or [empty]]
    values, firsts = one_view([chunk.values for chunk in chunks])
    moved = [chunk.starts + first for chunk, first in zip(chunks, firsts, strict=True)]
    return TokenColumn(
        values=values,
        starts=np.concatenate(moved),
        lens=np.concatenate([chunk.lens for chunk in chunks]),
        bad=np.concatenate([chunk.bad for chunk in chunks]),
        owner=[chunk.owner for chunk in chunks],
    )


def _read(lists: pa.Array) -> TokenColumn:
    """Return one chunk. Its offsets are those of a slice; ``values`` is what they point into."""
    if pa.types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        starts = (np.arange(len(lists)) + lists.offset) * size
        lens = np.full(len(lists), size)
    else:
        offsets = lists.offsets.to_numpy().astype(np.int64)
        starts, lens = offsets[:-1], np.diff(offsets)
    missing = lists.is_null().to_numpy(zero_copy_only=False)
    lens[missing] = 0
    values = lists.values
    bad = missing
    if values.null_count:
        nulls = values.is_null().to_numpy(zero_copy_only=False)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(nulls)])
        bad = bad | (before[starts + lens] > before[starts])
        values = pc.fill_null(values, False if pa.types.is_boolean(values.type) else 0)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    return TokenColumn(values.to_numpy(), starts, lens, bad, [lists, values])


def rejected(columns: dict[str, TokenColumn]) -> list[Reject]:
    """Return the examples that cannot be packed: null, empty, or of lists of several lengths.

    Args:
        columns: of the source, by name; the first gives an example's length.
    """
    first, *others = columns
    lens = columns[first].lens
    found: dict[int, Reject] = {}
    for name, column in columns.items():
        for row in np.flatnonzero(column.bad).tolist():
            what = f"{name} is null or holds null"
            found.setdefault(row, Reject(row, "tokens", "null", what))
    for name in others:
        for row in np.flatnonzero(columns[name].lens != lens).tolist():
            what = (
                f"{name} holds {columns[name].lens[row]} values, {first} {lens[row]}; name the "
                "columns that travel together in token_columns"
            )
            found.setdefault(row, Reject(row, "tokens", "lengths differ", what))
    for row in np.flatnonzero(lens == 0).tolist():
        found.setdefault(row, Reject(row, "tokens", "empty", f"{first} holds nothing"))
    return sorted(found.values())


def usable(num_examples: int, rejects: list[Reject]) -> NDArray[np.int64]:
    """Return int64[usable examples], the rows of those that are no rejects."""
    good = np.ones(num_examples, np.bool_)
    good[[reject.example_index for reject in rejects]] = False
    return np.flatnonzero(good)
