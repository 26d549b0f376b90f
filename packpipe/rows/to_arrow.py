"""Packed rows as an Arrow table, without copying."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.rows import text
from packpipe.rows.rows import Rows


def rows_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Return rows as Arrow, without copying.

    The offsets of a list and of a text have 32 bits, so a column is cut into chunks of whole rows
    where they do not reach.

    Args:
        rows: hold the schema's columns. A token column of ragged rows has one dimension, its rows
            laid end to end.
        schema: made by `row_schema`, `segment_schema` or `token_schema`.

    Raises:
        ValueError: the texts of a single row are more than 2 GiB, and their type is no large one.
    """
    before = np.concatenate([[0], np.cumsum(rows.segments["seq_lens"], dtype=np.int64)])
    # By column, int64[rows + 1]: where each row's values end.
    ends, values = {}, {}
    for field in schema:
        name = field.name
        if pa.types.is_fixed_size_list(field.type):
            # Arrow shares the memory of a contiguous NumPy array.
            flat = pa.array(rows.tokens[name].reshape(-1))
            values[name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        elif name in rows.tokens:
            ends[name], values[name] = before[rows.offsets], pa.array(rows.tokens[name])
        else:
            found = _arrow(rows.segments[name], field.type.value_type)
            ends[name], values[name] = rows.offsets, found
    spans = _spans(rows, ends, values, schema)
    columns = [
        pa.chunked_array(
            [_chunk(values[n], ends.get(n), some, schema.field(n).type) for some in spans]
        )
        for n in schema.names
    ]
    return pa.table(columns, schema=schema)


def _spans(
    rows: Rows,
    ends: dict[str, NDArray[np.int64]],
    values: dict[str, pa.Array],
    schema: pa.Schema,
) -> list[range]:
    """Return ranges of rows within the reach of 32-bit offsets; one, unless there are 2 GiB."""
    reached = list(ends.items())
    for name in ends:
        kind = schema.field(name).type.value_type
        if text.is_narrow(kind) and values[name].nbytes > text.MOST:
            reached.append((name, text.ends_of(values[name])[rows.offsets]))
    spans: list[range] = []
    start = 0
    while start < len(rows) or not spans:
        stops = [
            int(np.searchsorted(some, some[start] + text.MOST, side="right")) - 1
            for _, some in reached
        ]
        stop = min(stops)
        if stop == start < len(rows):  # of texts: a row has at most 2**24 tokens and segments
            name, some = reached[stops.index(stop)]
            size = int(some[start + 1] - some[start])
            expected, remedy = f"at most {text.MOST}", "cast_column it to Value('large_string')"
            what = f"bytes of {name} in row {start}"
            raise ValueError(checks.sentence(what, size, expected, remedy))
        spans.append(range(start, stop))
        start = stop
    return spans


def _chunk(
    values: pa.Array, ends: NDArray[np.int64] | None, some: range, kind: pa.DataType
) -> pa.Array:
    """Return some rows of a column; the ends of rows are None if all have one length."""
    if ends is None:
        return values.slice(some.start, len(some))
    ends = ends[some.start : some.stop + 1]
    values = values.slice(ends[0], ends[-1] - ends[0])
    if text.is_narrow(kind.value_type) and values.type != kind.value_type:
        values = text.narrowed(values, kind.value_type)
    return pa.ListArray.from_arrays(pa.array((ends - ends[0]).astype(np.int32)), values)


def _arrow(values: Any, kind: pa.DataType) -> pa.Array:
    """Return a column of segments as an Arrow array."""
    if isinstance(values, pa.Array):
        return values
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if values.ndim > 1 else flat
