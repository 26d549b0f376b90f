"""Which columns of a table are of packed rows, and whether those are as packpipe wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from packpipe import checks
from packpipe.rows.schema import (
    IMAGE_SEGMENTS,
    IMAGE_TOKENS,
    NUMBER_COLUMNS,
    RESERVED,
    SOMETIMES,
    TOKEN_SEGMENTS,
)

# Of rows whose tokens stay in a store, the column that says which row of their folder each is.
ROW = "packpipe_row"
# Of those of encoded images, the column of (first byte in the file, bytes) of each image.
PLACES = "packpipe_places"


def holds_rows(names: Any) -> bool:
    """Return whether columns are those of packed rows, of images or of token sequences."""
    return "seq_lens" in names and "example_index" in names


def holds_tokens(names: Any) -> bool:
    """Return whether columns are those of packed token sequences, not of images."""
    return "fragment" in names and "seq_lens" in names


def packed_columns(tables: Sequence[pa.Table]) -> list[str]:
    """Return the columns of rows of token sequences with a value for each token or each segment.

    Others were added to the rows since. All tables are asked, since lists may be as many as the
    segments of some rows by chance.

    Args:
        tables: of the same columns, one at least.

    Raises:
        ValueError: one of packpipe's own columns is not as packpipe made it: without it the rows
            mean something else.
    """
    schema = tables[0].schema
    seq_len = schema.field("segment_ids").type.list_size

    def is_own(name: str, table: pa.Table) -> bool:
        kind = schema.field(name).type
        if pa.types.is_fixed_size_list(kind):
            return (
                kind.list_size == seq_len
                and is_number(kind.value_type)
                and _has_all(table.column(name))
            )
        return pa.types.is_list(kind) and is_of_segments(table, name)

    chosen = [name for name in schema.names if all(is_own(name, table) for table in tables)]
    for name in RESERVED:
        if name in schema.names and name not in chosen:
            expected = "a number for every token, or for every segment"
            remedy = "pack again; something changed the rows"
            raise ValueError(checks.sentence(f"column {name!r}", "incomplete", expected, remedy))
    return chosen


def is_number(kind: pa.DataType) -> bool:
    """Return whether values of a type are integers, floats or bools."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _has_all(lists: pa.ChunkedArray) -> bool:
    """Return whether neither a list nor a value of one is null."""
    return not any(chunk.null_count or chunk.flatten().null_count for chunk in lists.chunks)


def is_of_segments(table: pa.Table, name: str) -> bool:
    """Return whether a column has lists of as many values as the rows have segments."""
    found, wanted = (pc.list_value_length(table.column(one)) for one in (name, "seq_lens"))
    return bool(found.equals(wanted))


def has_labels(table: pa.Table) -> bool:
    """Return whether rows are of images with labels.

    Raises:
        ValueError: the labels are not one a segment.
    """
    if holds_tokens(table.column_names) or "labels" not in table.column_names:
        return False
    kind = table.schema.field("labels").type
    if not pa.types.is_list(kind) or not is_of_segments(table, "labels"):
        expected, remedy = "one value a segment", "add lists as long as seq_lens, or rename it"
        raise ValueError(checks.sentence("column 'labels'", str(kind), expected, remedy))
    return True


def has_targets(schema: pa.Schema) -> bool:
    """Return whether rows of images have a target for each cell of their tokens."""
    if "targets" not in schema.names:
        return False
    kind, tokens = schema.field("targets").type, schema.field("segment_ids").type.list_size
    # A column of another type is somebody else's.
    fits = pa.types.is_fixed_size_list(kind) and kind.list_size % tokens == 0
    return bool(fits and kind.value_type in (pa.uint8(), pa.uint16()))


def check_columns(schema: pa.Schema) -> None:
    """Raise ValueError if these are not the columns of packed rows of one length."""
    found = {field.name: field.type for field in schema}
    if found.keys() & {ROW, PLACES}:
        expected = "as open_packed returned them, which reads their tokens from the store"
        remedy = "drop the other format, or join no folders, or let open_packed copy them"
        raise ValueError(
            checks.sentence("rows", "without what reads their tokens", expected, remedy)
        )
    of_tokens = holds_tokens(found)
    if of_tokens and not found.keys() >= set(NUMBER_COLUMNS):
        expected, remedy = "rows of one length", "pack with layout='fixed'"
        raise ValueError(checks.sentence("layout", "ragged", expected, remedy))
    if not found.keys() & IMAGE_TOKENS.keys() and found.keys() >= IMAGE_SEGMENTS.keys():
        expected = "rows with patches"
        remedy = "open them by the call of pack that wrote them, which computes their patches"
        raise ValueError(checks.sentence("rows", "packed with materialize=False", expected, remedy))
    tokens = dict.fromkeys(NUMBER_COLUMNS, pa.int32()) if of_tokens else IMAGE_TOKENS
    segments = own_segments(schema)
    for name, kind in tokens.items():
        there = found.get(name)
        if there is None or not pa.types.is_fixed_size_list(there) or there.value_type != kind:
            raise ValueError(_not_a_row(name, there, f"fixed_size_list<{kind}>"))
    for name, kind in segments.items():
        there = found.get(name)
        if there is None or not pa.types.is_list(there):
            raise ValueError(_not_a_row(name, there, str(kind)))


def own_segments(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return packpipe's own columns of segments, which are NumPy arrays in memory."""
    if holds_tokens(schema.names):
        return TOKEN_SEGMENTS
    # A column of another type is somebody else's.
    there = {
        name: kind
        for name, kind in SOMETIMES.items()
        if name in schema.names and schema.field(name).type == kind
    }
    return IMAGE_SEGMENTS | there


def _not_a_row(name: str, found: pa.DataType | None, expected: str) -> str:
    value = "missing" if found is None else str(found)
    return checks.sentence(
        f"column {name!r}", value, expected, "read rows that packpipe has written"
    )
