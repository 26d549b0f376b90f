"""List columns of a source: where each example's tokens lie in memory (floor 1).

Arrow keeps a column in chunks, each with offsets into values; a chunk may be a slice. Here all of
it becomes one array of starts and one of lengths, and the values stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe.gathering import one_view
from packpipe.rows import Reject


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """A list column: example i is ``values[starts[i] : starts[i] + lens[i]]``.

    Attributes:
        values: what lists hold; what no list points to is not to be touched.
        starts: int64[examples].
        lens: int64[examples], 0 where there is no list.
        bad: bool[examples], whether the list or a value of it is null.
        owner: keeps the memory.
    """

    values: NDArray[Any]
    starts: NDArray[np.int64]
    lens: NDArray[np.int64]
    bad: NDArray[np.bool_]
    owner: Any

    def take(self, rows: NDArray[np.int64]) -> TokenColumn:
        """Return the column of some examples; no value is moved."""
        return TokenColumn(
            self.values, self.starts[rows], self.lens[rows], self.bad[rows], self.owner
        )


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
