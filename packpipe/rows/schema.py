"""The packed row as Arrow columns, and back without copying.

Token columns are fixed-size lists, so row r lies at a constant stride; segment columns are
lists. There are no nulls. Written from NumPy buffers and read as views of Arrow's.

=================  ===============================  =========================================
patches            fixed_size_list<uint8>[L·D]      row, column, channel within a patch
segment_ids        fixed_size_list<int32>[L]        1, 2, ... in row order; 0 is padding
coords             fixed_size_list<int16>[2L]       (y, x) of the token in its patch grid
seq_lens           list<int32>                      tokens kept per segment
grid_hw            list<fixed_size_list<int16>[2]>  patches of the full grid, before dropping
image_hw           list<fixed_size_list<int32>[2]>  upright source size in pixels
labels             list<the label's type>           absent without a label column
example_index      list<int64>                      row in the source
=================  ===============================  =========================================

Rows of tokens have columns of their own:

==============  ===================  ==============================================================
input_ids, ...  fixed<T>[L]          the source's token columns, each of its own type
segment_ids     fixed<int32>[L]      1, 2, ... in row order; 0 is padding
position_ids    fixed<int32>[L]      0, 1, ... within the segment; 0 in padding
seq_lens        list<int32>          tokens of each segment
fragment        list<int32>          0, 1, ... of a sequence that was split; else 0
label, ...      list<T>              the source's other columns, one value a segment
example_index   list<int64>          row in the source
==============  ===================  ==============================================================

``layout="ragged"`` keeps the token columns alone, as lists without padding. A piece of a sequence
begins at token fragment · seq_len of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import (
    NUMBER_COLUMNS,
    SEGMENT_TYPES,
    Rows,
    Segments,
    TokenRows,
    TokenSegments,
)

VERSION = 1

_TOKEN_TYPES = {"patches": pa.uint8(), "segment_ids": pa.int32(), "coords": pa.int16()}

REJECTS = pa.schema(
    [
        ("example_index", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("exception", pa.string()),
    ]
)


def segment_schema(label_type: pa.DataType | None) -> pa.Schema:
    """Return the schema of the segment columns."""
    fields = [
        ("seq_lens", pa.list_(pa.int32())),
        ("grid_hw", pa.list_(pa.list_(pa.int16(), 2))),
        ("image_hw", pa.list_(pa.list_(pa.int32(), 2))),
        *([] if label_type is None else [("labels", pa.list_(label_type))]),
        ("example_index", pa.list_(pa.int64())),
    ]
    return pa.schema(fields)


def row_schema(config: PackConfig, label_type: pa.DataType | None) -> pa.Schema:
    """Return the schema of a packed row."""
    tokens = [
        ("patches", pa.list_(pa.uint8(), config.seq_len * config.patch_bytes)),
        ("segment_ids", pa.list_(pa.int32(), config.seq_len)),
        ("coords", pa.list_(pa.int16(), 2 * config.seq_len)),
    ]
    return pa.schema([*map(pa.field, *zip(*tokens, strict=True)), *segment_schema(label_type)])


def segments_table(segments: Segments, schema: pa.Schema) -> pa.Table:
    """Return the segment columns as Arrow, without copying."""
    columns = _segment_columns(segments)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def rows_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Return packed rows as Arrow, without copying."""
    columns = _segment_columns(rows.segments)
    for name in _TOKEN_TYPES:
        values = getattr(rows, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1)), type=schema.field(name).type
        )
    return pa.table([columns[name] for name in schema.names], schema=schema)


def rejects_table(rejects: list[Reject]) -> pa.Table:
    """Return rejects as Arrow, in order of their example."""
    ordered = sorted(rejects)
    return pa.table([list(column) for column in zip(*ordered, strict=True)] or [[]] * 4, REJECTS)


def table_segments(table: pa.Table) -> Segments:
    """Return the segment columns of a table; views where a column is one chunk."""
    seq_lens = _one_chunk(table, "seq_lens")
    # A list array may be a slice: its offsets then start above zero, and `flatten` obeys them.
    starts = seq_lens.offsets.to_numpy().astype(np.int64)
    has_labels = "labels" in table.column_names
    return Segments(
        offsets=starts - starts[0],
        seq_lens=seq_lens.flatten().to_numpy(),
        grid_hw=_pairs(table, "grid_hw"),
        image_hw=_pairs(table, "image_hw"),
        example_index=_one_chunk(table, "example_index").flatten().to_numpy(),
        labels=_one_chunk(table, "labels").flatten() if has_labels else None,
    )


def table_rows(table: pa.Table) -> Rows:
    """Return the packed rows of a table; views where a column is one chunk, else one copy.

    Raises:
        ValueError: a column of the packed row is missing or has another type.
    """
    for name, wanted in _TOKEN_TYPES.items():
        found = table.schema.field(name).type if name in table.column_names else None
        if found is None or not pa.types.is_fixed_size_list(found) or found.value_type != wanted:
            expected = f"fixed_size_list<{wanted}>"
            raise ValueError(_not_a_row(name, found, expected))
    for field in segment_schema(None):
        found = table.schema.field(field.name).type if field.name in table.column_names else None
        if found is None or not pa.types.is_list(found):
            raise ValueError(_not_a_row(field.name, found, str(field.type)))
    shape = (table.num_rows, table.schema.field("segment_ids").type.list_size)
    patch_bytes = table.schema.field("patches").type.list_size // shape[1]
    return Rows(
        segments=table_segments(table),
        patches=_fixed(table, "patches").reshape(*shape, patch_bytes),
        segment_ids=_fixed(table, "segment_ids").reshape(shape),
        coords=_fixed(table, "coords").reshape(*shape, 2),
    )


def _not_a_row(name: str, found: pa.DataType | None, expected: str) -> str:
    value = "missing" if found is None else str(found)
    return checks.sentence(
        f"column {name!r}", value, expected, "read rows that packpipe has written"
    )


def _segment_columns(segments: Segments) -> dict[str, pa.Array]:
    offsets = pa.array(segments.offsets.astype(np.int32))

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    def pairs(values: NDArray[Any]) -> pa.Array:
        return lists(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2))

    columns = {
        "seq_lens": lists(pa.array(segments.seq_lens)),
        "grid_hw": pairs(segments.grid_hw),
        "image_hw": pairs(segments.image_hw),
        "example_index": lists(pa.array(segments.example_index)),
    }
    if segments.labels is not None:
        columns["labels"] = lists(segments.labels)
    return columns


def _one_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed(table: pa.Table, name: str) -> NDArray[Any]:
    """Return the values of a fixed-size list column as one flat array."""
    chunks = [chunk.flatten().to_numpy() for chunk in table.column(name).chunks]
    dtype = table.schema.field(name).type.value_type.to_pandas_dtype()
    values: NDArray[Any] = (
        chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, dtype), *chunks])
    )
    return values


def _pairs(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = _one_chunk(table, name).flatten().flatten().to_numpy()
    return values.reshape(-1, 2)


def token_schema(
    config: TokenConfig, tokens: dict[str, pa.DataType], values: dict[str, pa.DataType]
) -> pa.Schema:
    """Return the schema of packed rows of tokens.

    Args:
        config: the options.
        tokens: type of the values of each token column.
        values: type of each other column.
    """
    fixed = config.layout == "fixed"
    size = config.seq_len if fixed else -1
    fields = [pa.field(name, pa.list_(kind, size)) for name, kind in tokens.items()]
    if fixed:
        fields += [pa.field(name, pa.list_(pa.int32(), size)) for name in NUMBER_COLUMNS]
    segment_types = {**SEGMENT_TYPES, **values}
    return pa.schema([*fields, *(pa.field(n, pa.list_(kind)) for n, kind in segment_types.items())])


def tokens_table(
    segments: TokenSegments, tokens: dict[str, NDArray[Any]], schema: pa.Schema
) -> pa.Table:
    """Return rows as Arrow, without copying.

    Args:
        segments: what stands where.
        tokens: by name, rows laid end to end, as `fill_tokens` returns them.
        schema: as of `token_schema`.
    """
    before = np.concatenate([[0], np.cumsum(segments.seq_lens, dtype=np.int64)])
    ends = pa.array(before[segments.offsets].astype(np.int32))
    offsets = pa.array(segments.offsets.astype(np.int32))
    lists = {
        **segments.values,
        **{name: pa.array(getattr(segments, name)) for name in SEGMENT_TYPES},
    }
    columns = []
    for field in schema:
        if field.name in tokens:
            values = pa.array(tokens[field.name])
            if pa.types.is_fixed_size_list(field.type):
                columns.append(pa.FixedSizeListArray.from_arrays(values, type=field.type))
            else:
                columns.append(pa.ListArray.from_arrays(ends, values))
        else:
            columns.append(pa.ListArray.from_arrays(offsets, lists[field.name]))
    return pa.table(columns, schema=schema)


def table_tokens(table: pa.Table) -> TokenRows:
    """Return the rows of a table; views where a column is one chunk, else one copy.

    Raises:
        ValueError: a column of packed rows of tokens is missing, or the rows are ragged.
    """
    for name in SEGMENT_TYPES:
        if name not in table.column_names:
            expected, remedy = "a column of packed tokens", "read rows that packpipe has written"
            raise ValueError(checks.sentence(f"column {name!r}", "missing", expected, remedy))
    whole = {name: _one_chunk(table, name) for name in table.column_names}
    tokens = {}
    for name, column in whole.items():
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            tokens[name] = column.flatten().to_numpy().reshape(-1, size)
    if not set(NUMBER_COLUMNS) <= tokens.keys():
        found, expected = "ragged", "rows of one length"
        raise ValueError(checks.sentence("layout", found, expected, "pack with layout='fixed'"))
    values = {
        name: column.flatten()
        for name, column in whole.items()
        if name not in tokens and name not in SEGMENT_TYPES
    }
    numbers = {name: tokens.pop(name) for name in NUMBER_COLUMNS}
    return TokenRows(
        segments=replace(table_token_segments(table), values=values),
        tokens=tokens,
        **numbers,
    )


def table_token_segments(table: pa.Table) -> TokenSegments:
    """Return the segments of a table of rows, fixed or ragged, without the source's values."""
    whole = {name: _one_chunk(table, name) for name in SEGMENT_TYPES}
    # A list array may be a slice: its offsets then start above zero, and `flatten` obeys them.
    offsets = whole["seq_lens"].offsets.to_numpy().astype(np.int64)
    segments = {name: column.flatten().to_numpy() for name, column in whole.items()}
    return TokenSegments(offsets=offsets - offsets[0], **segments, values={})


def is_token_rows(names: Sequence[str]) -> bool:
    """Return whether columns are those of packed rows of tokens."""
    return "fragment" in names and "seq_lens" in names
