"""The packed row as Arrow columns, and back without copying.

Token columns are fixed-size lists, so row r lies at a constant stride; segment columns are
lists, so the schema says which is which. packpipe's own columns hold no nulls. Written from NumPy
buffers and read as views of Arrow's.

=================  ===============================  =========================================
patches            fixed_size_list<uint8>[L·D]      row, column, channel within a patch
segment_ids        fixed_size_list<int32>[L]        1, 2, ... in row order; 0 is padding
coords             fixed_size_list<int16>[2L]       (y, x) of the token in its patch grid;
                                                    (-1, k) of prefix token k
targets            fixed_size_list<uint8>[L·T]      classes of the T cells of each patch, by row and
                   or uint16                        column; the largest number (255, 65535) where
                                                    there is none; absent without a mask column
seq_lens           list<int32>                      tokens kept per segment
grid_hw            list<fixed_size_list<int16>[2]>  patches of the full grid, before dropping
image_hw           list<fixed_size_list<int32>[2]>  upright source size in pixels
box                list<fixed_size_list<int32>[4]>  (top, left, height, width) of the upright source
                                                    in pixels; absent if nothing is cropped
view               list<int32>                      which of the example's views; absent if there is
                                                    one of each
weight             list<float32>                    what the image counts in the loss; absent
                                                    without a weight column
labels             list<the label's type>           absent without a label column
example_index      list<int64>                      row in the source
=================  ===============================  =========================================

Rows of token sequences:

==============  ===================  ==============================================================
input_ids, ...  fixed<T>[L]          the source's token columns, each of its own type
segment_ids     fixed<int32>[L]      1, 2, ... in row order; 0 is padding
position_ids    fixed<int32>[L]      0, 1, ... within the segment; 0 in padding
seq_lens        list<int32>          tokens of each segment
fragment        list<int32>          0, 1, ... of a sequence that was split; else 0
example_index   list<int64>          row in the source
label, ...      list<T>              the source's other columns, one value a segment
==============  ===================  ==============================================================

With ``layout="ragged"`` the source's token columns are lists without padding, and there are no
segment_ids and position_ids. A piece of a sequence begins at token fragment · seq_len of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.masks import TargetRules
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import text
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows

VERSION = 1

# packpipe's own columns in rows of tokens; a source may have none of these names.
NUMBER_COLUMNS = ("segment_ids", "position_ids")
SEGMENT_TYPES = {"seq_lens": pa.int32(), "fragment": pa.int32(), "example_index": pa.int64()}
RESERVED = (*NUMBER_COLUMNS, *SEGMENT_TYPES)

_IMAGE_TOKENS = {"patches": pa.uint8(), "segment_ids": pa.int32(), "coords": pa.int16()}

REJECTS = pa.schema(
    [
        ("example_index", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("exception", pa.string()),
    ]
)


# Columns of segments that rows of images have only with some options.
_SOMETIMES = {
    "box": pa.list_(pa.list_(pa.int32(), 4)),
    "view": pa.list_(pa.int32()),
    "weight": pa.list_(pa.float32()),
}


def segment_schema(
    label_type: pa.DataType | None, config: PackConfig | None = None, *, weighted: bool = False
) -> pa.Schema:
    """Return the schema of the segment columns of images; without options, of those always there.

    Boxes are there if images are cropped, views if there is more than one of each.
    """
    there = () if config is None else sometimes_of(config, weighted=weighted)
    fields = [
        ("seq_lens", pa.list_(pa.int32())),
        ("grid_hw", pa.list_(pa.list_(pa.int16(), 2))),
        ("image_hw", pa.list_(pa.list_(pa.int32(), 2))),
        *((name, _SOMETIMES[name]) for name in there),
        *([] if label_type is None else [("labels", pa.list_(label_type))]),
        ("example_index", pa.list_(pa.int64())),
    ]
    return pa.schema(fields)


_TOKEN_SEGMENTS = {name: pa.list_(kind) for name, kind in SEGMENT_TYPES.items()}
_IMAGE_SEGMENTS = {field.name: field.type for field in segment_schema(None)}


def row_schema(
    config: PackConfig,
    label_type: pa.DataType | None,
    *,
    weighted: bool = False,
    targets: TargetRules | None = None,
) -> pa.Schema:
    """Return the schema of packed rows of images."""
    widths = {"patches": config.patch_bytes, "segment_ids": 1, "coords": 2}
    kinds = dict(_IMAGE_TOKENS)
    if targets is not None:
        widths["targets"] = targets.cells(config.patch_size)
        kinds["targets"] = pa.from_numpy_dtype(targets.dtype)
    tokens = [
        pa.field(name, pa.list_(kind, config.seq_len * widths[name]))
        for name, kind in kinds.items()
    ]
    return pa.schema([*tokens, *segment_schema(label_type, config, weighted=weighted)])


def sometimes_of(config: PackConfig, *, weighted: bool = False) -> list[str]:
    """Return the columns of segments that rows have beside the usual ones, by the options."""
    there = {"box": config.crops, "view": config.num_views > 1, "weight": weighted}
    return [name for name in _SOMETIMES if there[name]]


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
    numbers = dict.fromkeys(NUMBER_COLUMNS, pa.int32()) if fixed else {}
    lists = {name: pa.list_(kind, size) for name, kind in (tokens | numbers).items()}
    return pa.schema(lists | {n: pa.list_(kind) for n, kind in (SEGMENT_TYPES | values).items()})


def holds_rows(names: Any) -> bool:
    """Return whether columns are those of packed rows, of images or of token sequences."""
    return "seq_lens" in names and "example_index" in names


def holds_tokens(names: Any) -> bool:
    """Return whether columns are those of packed token sequences, not of images."""
    return "fragment" in names and "seq_lens" in names


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
    _check_columns(table.schema)
    shape = (table.num_rows, table.schema.field("segment_ids").type.list_size)
    if holds_tokens(table.column_names):
        own = table.select(packed_columns([table]))
        fixed = {f.name: pa.types.is_fixed_size_list(f.type) for f in own.schema}
        tokens = [name for name in fixed if fixed[name]]
        rows = _segments(own, [name for name in fixed if not fixed[name]])
    else:
        tokens, rows = list(_IMAGE_TOKENS), table_segments(table)
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
        return pa.types.is_list(kind) and _is_of_segments(table, name)

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


def _is_of_segments(table: pa.Table, name: str) -> bool:
    """Return whether a column has lists of as many values as the rows have segments."""
    found, wanted = (pc.list_value_length(table.column(one)) for one in (name, "seq_lens"))
    return bool(found.equals(wanted))


def table_segments(table: pa.Table) -> Rows:
    """Return rows without their tokens: packpipe's own columns of segments, and labels of images.

    The other columns of token sequences are left out: ragged rows do not say which of them are
    tokens.

    Raises:
        ValueError: labels, boxes, views or weights of images are not one a segment.
    """
    own = _own_segments(table.schema)
    labels = ["labels"] if has_labels(table) else []
    for name in _SOMETIMES:
        if name in own and not _is_of_segments(table, name):
            expected = f"one {name} a segment"
            remedy = "join rows of one configuration, or rename it"
            raise ValueError(checks.sentence(f"column {name!r}", "incomplete", expected, remedy))
    return _segments(table, [name for name in table.column_names if name in (*own, *labels)])


def has_labels(table: pa.Table) -> bool:
    """Return whether rows are of images with labels.

    Raises:
        ValueError: the labels are not one a segment.
    """
    if holds_tokens(table.column_names) or "labels" not in table.column_names:
        return False
    kind = table.schema.field("labels").type
    if not pa.types.is_list(kind) or not _is_of_segments(table, "labels"):
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


def rejects_table(rejects: list[Reject]) -> pa.Table:
    """Return rejects as Arrow, in order of their example."""
    ordered = [reject[:4] for reject in sorted(rejects)]
    return pa.table([list(column) for column in zip(*ordered, strict=True)] or [[]] * 4, REJECTS)


def _check_columns(schema: pa.Schema) -> None:
    """Raise ValueError if these are not the columns of packed rows of one length."""
    found = {field.name: field.type for field in schema}
    of_tokens = holds_tokens(found)
    if of_tokens and not found.keys() >= set(NUMBER_COLUMNS):
        expected, remedy = "rows of one length", "pack with layout='fixed'"
        raise ValueError(checks.sentence("layout", "ragged", expected, remedy))
    if not found.keys() & _IMAGE_TOKENS.keys() and found.keys() >= _IMAGE_SEGMENTS.keys():
        expected = "rows with patches"
        remedy = "open them by the call of pack that wrote them, which computes their patches"
        raise ValueError(checks.sentence("rows", "packed with materialize=False", expected, remedy))
    tokens = dict.fromkeys(NUMBER_COLUMNS, pa.int32()) if of_tokens else _IMAGE_TOKENS
    segments = _own_segments(schema)
    for name, kind in tokens.items():
        there = found.get(name)
        if there is None or not pa.types.is_fixed_size_list(there) or there.value_type != kind:
            raise ValueError(_not_a_row(name, there, f"fixed_size_list<{kind}>"))
    for name, kind in segments.items():
        there = found.get(name)
        if there is None or not pa.types.is_list(there):
            raise ValueError(_not_a_row(name, there, str(kind)))


def _own_segments(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return packpipe's own columns of segments, which are NumPy arrays in memory."""
    if holds_tokens(schema.names):
        return _TOKEN_SEGMENTS
    # A column of another type is somebody else's.
    there = {
        name: kind
        for name, kind in _SOMETIMES.items()
        if name in schema.names and schema.field(name).type == kind
    }
    return _IMAGE_SEGMENTS | there


def _not_a_row(name: str, found: pa.DataType | None, expected: str) -> str:
    value = "missing" if found is None else str(found)
    return checks.sentence(
        f"column {name!r}", value, expected, "read rows that packpipe has written"
    )


def _segments(table: pa.Table, names: list[str]) -> Rows:
    """Return rows with some columns of segments, and no tokens yet."""
    columns = {name: text.joined(table.column(name)) for name in names}
    own = _own_segments(table.schema)
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


def _arrow(values: Any, kind: pa.DataType) -> pa.Array:
    """Return a column of segments as an Arrow array."""
    if isinstance(values, pa.Array):
        return values
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=kind) if values.ndim > 1 else flat
