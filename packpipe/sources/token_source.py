"""Finds where each example's tokens lie in memory, in the list columns of a source.

Arrow keeps a column in chunks, each with offsets into values; a chunk may be a slice. Here a
column becomes one array of starts and one of lengths, while its values stay where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.rows.copy import copy_tokens, kept_runs
from packpipe.rows.fill_tokens import TokenColumn
from packpipe.rows.rejects import EMPTY, Reject
from packpipe.rows.text import as_bytes, from_bytes, is_text, joined
from packpipe.sources.token_columns import TokenColumns


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Where the sequences of a dataset lie in memory, with their values and rejects.

    Attributes:
        columns: of tokens, by name; the first gives a sequence's length.
        values: the other columns that are packed, one value a sequence, as ``take`` returns them.
        rejects: the examples that cannot be packed.
        num_masked: tokens left out, since they are padding in the source.
    """

    columns: dict[str, TokenColumn]
    values: dict[str, pa.Array | TextColumn]
    rejects: list[Reject]
    num_masked: int = 0

    @property
    def lens(self) -> NDArray[np.int64]:
        """int64[examples], tokens of each; 0 where there is no list."""
        return next(iter(self.columns.values())).lens

    @property
    def text_lens(self) -> NDArray[np.int64]:
        """int64[examples], bytes of all texts of each."""
        texts = [column for column in self.values.values() if isinstance(column, TextColumn)]
        return sum((column.bytes.lens for column in texts), np.zeros(len(self.lens), np.int64))


@dataclass(frozen=True, eq=False)
class TextColumn:
    """A column of texts of any size, which stay where they lie until they are taken.

    Attributes:
        bytes: text i is list i of uint8; ``bad`` are the nulls.
        type: Arrow's type of the texts.
    """

    bytes: TokenColumn
    type: pa.DataType

    def take(self, rows: pa.Array) -> pa.Array:
        """Return a copy of the texts of some rows; beyond 2 GiB, of the large type."""
        some = self.bytes.take(np.asarray(rows))
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(some.lens)])
        data = np.empty(ends[-1], np.uint8)
        copy_tokens(some.values, some.starts, some.lens, ends[:-1], data)
        return from_bytes(self.type, ends, data, ~some.bad)


def token_source(dataset: Dataset, names: TokenColumns) -> TokenSource:
    """Return the sequences of a dataset, without their padding.

    Tokens and texts are not copied; bool and nulls are, and sequences with padding between tokens.
    """
    table = dataset.data
    texts = [name for name in names.values if is_text(table.schema.field(name).type)]
    found = {name: token_column(table.column(name)) for name in names.lists}
    found |= {name: token_column(_as_bytes(table.column(name))) for name in texts}
    # Rows that were selected or shuffled: reading them through `datasets` would copy them all.
    if dataset._indices is not None:
        rows = dataset._indices.column(0).to_numpy().astype(np.int64)
        found = {name: column.take(rows) for name, column in found.items()}
    values: dict[str, pa.Array | TextColumn] = {}
    for name in names.values:
        if name in texts:
            values[name] = TextColumn(found[name], table.schema.field(name).type)
        else:
            rows = dataset.select_columns([name]).with_format("arrow")[:]
            # One chunk, since `take` searches every chunk of a column, for every pack.
            values[name] = joined(rows.column(name))
    columns = {name: found[name] for name in names.tokens}
    if names.mask is None:
        bad = bad_sequences(columns)
        return TokenSource(columns, values, sorted([*bad, *empty_sequences(columns, bad)]))
    mask = found[names.mask]
    bad = bad_sequences(columns | {names.mask: mask})
    columns, num_masked = without_padding(columns, mask, usable(len(mask.lens), bad))
    rejects = sorted([*bad, *empty_sequences(columns, bad)])
    return TokenSource(columns, values, rejects, num_masked)


def _as_bytes(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    chunks = [as_bytes(chunk) for chunk in texts.chunks if len(chunk)]
    return pa.chunked_array(chunks, None if chunks else pa.list_(pa.uint8()))


def one_view(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (values, firsts): one array that reaches all given ones, and where each begins.

    The array spans the memory from the first to the last of them, without a copy. What lies between
    belongs to others and must not be touched; the arrays must outlive the view. Arrays that are not
    a whole number of values apart are copied into one.

    Args:
        arrays: of one dtype and dimension, one at least.
    """
    dtype = arrays[0].dtype
    there = [array for array in arrays if array.size]  # an empty one may lie anywhere
    if len(there) < 2:
        return (there or arrays)[0], np.zeros(len(arrays), np.int64)
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    first = min(array.ctypes.data for array in there)
    last = max(array.ctypes.data + array.nbytes for array in there)
    if any((array.ctypes.data - first) % dtype.itemsize for array in there):
        sizes = [array.size for array in arrays]
        return np.concatenate(arrays), np.cumsum([0, *sizes[:-1]])
    # Bytes that belong to no array may be unmapped, but only values of an array are read.
    span: Any = (ctypes.c_uint8 * (last - first)).from_address(first)
    return np.frombuffer(span, dtype), (addresses - first) // dtype.itemsize


def token_column(column: pa.ChunkedArray) -> TokenColumn:
    """Return a column of lists (of any kind) of numbers; bool and nulls are copied."""
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
    """Return the lists of one chunk: offsets of its slice, into the values of the whole chunk."""
    if pa.types.is_fixed_size_list(lists.type):
        size = lists.type.list_size
        starts = (np.arange(len(lists)) + lists.offset) * size
        lens = np.full(len(lists), size)
    else:
        offsets = lists.offsets.to_numpy().astype(np.int64)
        starts, lens = offsets[:-1], np.diff(offsets)
    # Arrow lets a null list span values, which must not be read.
    missing = lists.is_null().to_numpy(zero_copy_only=False)
    lens[missing] = 0
    values = lists.values
    bad = missing
    if values.null_count:
        nulls = values.is_null().to_numpy(zero_copy_only=False)
        # Nulls before each value; a list with one has more of them at its end than at its start.
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(nulls)])
        bad = bad | (before[starts + lens] > before[starts])
        # Integers with nulls would become floats in NumPy.
        values = pc.fill_null(values, False if pa.types.is_boolean(values.type) else 0)
    numbers = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))  # bits in Arrow
    return TokenColumn(numbers, starts, lens, bad, [lists, numbers])


def without_padding(
    columns: dict[str, TokenColumn], mask: TokenColumn, good: NDArray[np.int64]
) -> tuple[dict[str, TokenColumn], int]:
    """Return columns without the tokens at which a mask is 0, and how many these are.

    Padding at the ends is left out by moving the ends. A sequence with padding between its tokens
    is copied without it.

    Args:
        columns: by name.
        mask: the mask.
        good: int64[usable], the examples in which every column is as long as the mask. What others
            hold is not read.
    """
    # The kernel compares bits, and -0.0 has some.
    is_kept = mask.values != 0 if mask.values.dtype.kind == "f" else mask.values
    num_runs, places, sizes = kept_runs(is_kept, mask.starts, mask.lens)
    owners = np.repeat(np.arange(len(num_runs)), num_runs)
    # In floats, which are exact up to 2**53.
    lens = np.bincount(owners, sizes, len(num_runs)).astype(np.int64)
    firsts = np.zeros(len(num_runs), np.int64)
    firsts[owners[::-1]] = places[::-1]  # the last one written is a sequence's first run
    # Of several runs one is made, in new memory.
    holed = np.zeros(len(num_runs), np.bool_)
    holed[good] = num_runs[good] > 1
    runs = holed[owners]
    ends = np.cumsum(sizes[runs])
    out = {}
    for name, column in columns.items():
        values, starts, owner = column.values, column.starts + firsts, column.owner
        if len(ends):
            copied = np.empty(ends[-1], values.dtype)
            begins = column.starts[owners[runs]] + places[runs]
            copy_tokens(values, begins, sizes[runs], ends - sizes[runs], copied)
            values, (moved, begin) = one_view([values, copied])
            starts += moved
            starts[holed] = begin + np.cumsum(lens[holed]) - lens[holed]
            owner = [owner, copied]
        out[name] = replace(column, values=values, starts=starts, lens=lens, owner=owner)
    return out, int((mask.lens - lens)[good].sum())


def bad_sequences(columns: dict[str, TokenColumn]) -> list[Reject]:
    """Return the examples that are null, hold null, or have columns of unequal lengths.

    Args:
        columns: of the source, by name; the first gives an example's length.
    """
    # The first reason counts: null, then unequal lengths.
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
    return list(found.values())


def empty_sequences(columns: dict[str, TokenColumn], bad: list[Reject]) -> list[Reject]:
    """Return the examples without a token, as rejects, which are not counted as bad.

    Args:
        columns: of the source, by name.
        bad: the examples that are rejected for another reason.
    """
    first, column = next(iter(columns.items()))
    empty = np.setdiff1d(np.flatnonzero(column.lens == 0), [one.example_index for one in bad])
    return [Reject(row, *EMPTY, f"{first} holds nothing") for row in empty.tolist()]


def usable(num_examples: int, rejects: list[Reject]) -> NDArray[np.int64]:
    """Return int64[usable examples], the rows of all examples that are not rejected."""
    good = np.ones(num_examples, np.bool_)
    good[[reject.example_index for reject in rejects]] = False
    return np.flatnonzero(good)
