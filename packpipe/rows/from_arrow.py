"""Packed rows of an Arrow table, as views of its memory wherever that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows import text
from packpipe.rows.own_columns import (
    check_columns,
    has_labels,
    has_targets,
    holds_tokens,
    is_of_segments,
    own_segments,
    packed_columns,
)
from packpipe.rows.rows import Rows
from packpipe.rows.schema import IMAGE_TOKENS, SOMETIMES


@dataclass(frozen=True, eq=False)
class Bits:
    """A token column of bools where Arrow has it, eight a byte: a row is made when asked for.

    Attributes:
        column: fixed-size lists of bools.
    """

    column: pa.FixedSizeListArray
    dtype = np.dtype(np.bool_)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens of a row)."""
        return len(self.column), self.column.type.list_size

    def __getitem__(self, row: int) -> NDArray[np.bool_]:
        values: NDArray[np.bool_] = self.column[row].values.to_numpy(zero_copy_only=False)
        return values


def table_rows(table: pa.Table, *, keep_bits: bool = False) -> Rows:
    """Return the packed rows of a table: views of columns of one chunk, copies of the others.

    Args:
        table: the rows.
        keep_bits: whether bools of a table of one chunk stay where they are, as `Bits`; else they
            are copied, into a byte each.

    Raises:
        ValueError: a column of the packed row is missing or has another type, or the rows are
            ragged.
    """
    check_columns(table.schema)
    shape = (table.num_rows, table.schema.field("segment_ids").type.list_size)
    if holds_tokens(table.column_names):
        own = table.select(packed_columns([table]))
        fixed = {f.name: pa.types.is_fixed_size_list(f.type) for f in own.schema}
        tokens = [name for name in fixed if fixed[name]]
        rows = _segments(own, [name for name in fixed if not fixed[name]])
    else:
        tokens, rows = list(IMAGE_TOKENS), table_segments(table)
        tokens += ["targets"] if has_targets(table.schema) else []
    for name in tokens:
        if keep_bits and pa.types.is_boolean(table.schema.field(name).type.value_type):
            rows.tokens[name] = Bits(table.column(name).chunk(0))  # type: ignore[assignment]
            continue
        # coords have 2 and patches D values a token, so their lists are longer than seq_len.
        width = table.schema.field(name).type.list_size // shape[1]
        whole = shape if width == 1 and name != "targets" else (*shape, width)
        rows.tokens[name] = _fixed(table, name).reshape(whole)
    return rows


def table_segments(table: pa.Table) -> Rows:
    """Return rows without their tokens: packpipe's own columns of segments, and labels of images.

    The other columns of token sequences are left out: ragged rows do not say which of them are
    tokens.

    Raises:
        ValueError: labels, boxes, views or weights of images are not one a segment.
    """
    own = own_segments(table.schema)
    labels = ["labels"] if has_labels(table) else []
    for name in SOMETIMES:
        if name in own and not is_of_segments(table, name):
            expected = f"one {name} a segment"
            remedy = "join rows of one configuration, or rename it"
            raise ValueError(checks.sentence(f"column {name!r}", "incomplete", expected, remedy))
    return _segments(table, [name for name in table.column_names if name in (*own, *labels)])


def _segments(table: pa.Table, names: list[str]) -> Rows:
    """Return rows with some columns of segments, and no tokens yet."""
    columns = {name: text.joined(table.column(name)) for name in names}
    own = own_segments(table.schema)
    # A list array may be a slice: its offsets then start above zero, and `flatten` obeys them.
    offsets = _from_zero(columns["seq_lens"].offsets)
    segments = {}
    for name, column in columns.items():
        segments[name] = _numbers(column.flatten()) if name in own else column.flatten()
    return Rows(offsets, segments)


def _from_zero(offsets: pa.Array) -> NDArray[np.int64]:
    starts = offsets.to_numpy().astype(np.int64)
    from_zero: NDArray[np.int64] = starts - starts[0]
    return from_zero


def _fixed(table: pa.Table, name: str) -> NDArray[Any]:
    """Return the values of a fixed-size list column as one flat array."""
    # `flatten` keeps to the rows of a slice, `values` would return all of its parent's. The empty
    # array below gives the dtype to a table without chunks.
    kind = table.schema.field(name).type.value_type
    is_view = not pa.types.is_boolean(kind)
    flat = (chunk.flatten() for chunk in table.column(name).chunks)
    chunks = [chunk.to_numpy(zero_copy_only=is_view) for chunk in flat]
    dtype = kind.to_pandas_dtype()
    values: NDArray[Any] = (
        chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, dtype), *chunks])
    )
    return values


def _numbers(values: pa.Array) -> NDArray[Any]:
    """Return a column of numbers, or of two or four of them, as a NumPy array."""
    if pa.types.is_fixed_size_list(values.type):
        flat: NDArray[Any] = values.flatten().to_numpy()
        return flat.reshape(-1, values.type.list_size)
    numbers: NDArray[Any] = values.to_numpy()
    return numbers
