"""Packed rows of tokens: in memory, as Arrow, and back (floor 1).

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
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe import checks
from packpipe.gathering import gather, number_tokens
from packpipe.token_columns import TokenColumn
from packpipe.token_config import TokenConfig
from packpipe.token_plan import TokenPlan

NO_LABEL = -100
_NUMBERS = ("segment_ids", "position_ids")
_SEGMENT_TYPES = {"seq_lens": pa.int32(), "fragment": pa.int32(), "example_index": pa.int64()}
SEGMENT_COLUMNS = tuple(_SEGMENT_TYPES)
RESERVED = (*_NUMBERS, *SEGMENT_COLUMNS)


@dataclass(frozen=True, eq=False)
class TokenSegments:
    """Which sequences stand in which rows: one entry a segment, in row order.

    Attributes:
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        seq_lens: int32[segments], tokens.
        fragment: int32[segments], which piece of its sequence.
        example_index: int64[segments], row in the source; -1 where it is not known.
        values: the source's other columns, one value a segment.
    """

    offsets: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    fragment: NDArray[np.int32]
    example_index: NDArray[np.int64]
    values: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Packed rows of one length.

    Attributes:
        segments: what stands where.
        tokens: by name, [rows, seq_len]; of the source's columns.
        segment_ids: int32[rows, seq_len]: 1, 2, ... in row order; 0 is padding.
        position_ids: int32[rows, seq_len], 0, 1, ... within the segment; 0 in padding.
    """

    segments: TokenSegments
    tokens: dict[str, NDArray[Any]]
    segment_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.segments)


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
        fields += [pa.field(name, pa.list_(pa.int32(), size)) for name in _NUMBERS]
    segment_types = {**_SEGMENT_TYPES, **values}
    return pa.schema([*fields, *(pa.field(n, pa.list_(kind)) for n, kind in segment_types.items())])


class Memory:
    """Arrays that are written again and again: new memory costs more than what is put into it."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[Any]] = {}

    def array(self, name: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of this size, which overwrites the last of this name."""
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = np.empty(size, dtype)
        return self._kept[name][:size]


def planned_segments(
    plan: TokenPlan, packs: range, values: dict[str, pa.Array]
) -> tuple[TokenSegments, NDArray[np.int64]]:
    """Return the segments of some packs, and int64[segments], where each lies in the plan.

    Args:
        plan: the plan.
        packs: which of its packs.
        values: the source's other columns, one value a row.
    """
    offsets = plan.offsets[packs.start : packs.stop + 1]
    members = plan.order[offsets[0] : offsets[-1]]
    example_index = plan.index[members]
    rows = pa.array(example_index)
    segments = TokenSegments(
        offsets=offsets - offsets[0],
        seq_lens=plan.seq_lens[members],
        fragment=plan.fragments[members],
        example_index=example_index,
        values={name: column.take(rows) for name, column in values.items()},
    )
    return segments, members


def first_places(segments: TokenSegments, config: TokenConfig) -> NDArray[np.int64]:
    """Return int64[segments], the place of each one's first token, rows laid end to end."""
    before = np.cumsum(segments.seq_lens, dtype=np.int64) - segments.seq_lens
    if config.layout == "ragged":
        return before
    row_of = np.repeat(np.arange(len(segments)), np.diff(segments.offsets))
    row_starts = np.concatenate([before, [0]])[segments.offsets[:-1]]
    places: NDArray[np.int64] = before - row_starts[row_of] + row_of * config.seq_len
    return places


def fill_tokens(
    segments: TokenSegments,
    starts: NDArray[np.int64],
    columns: dict[str, TokenColumn],
    config: TokenConfig,
    *,
    executor: Executor | None = None,
    memory: Memory | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the token columns of rows by name, laid end to end; of fixed rows the numbers too.

    Args:
        segments: what stands where.
        starts: int64[segments], where each begins in its sequence.
        columns: of the source, by name; segments take ``example_index`` of them.
        config: the options.
        executor: copies with several threads.
        memory: what to write into; None takes new memory.
    """
    memory = Memory() if memory is None else memory
    places = first_places(segments, config)
    lens, rows = segments.seq_lens, segments.example_index
    fixed = config.layout == "fixed"
    size = len(segments) * config.seq_len if fixed else int(lens.sum(dtype=np.int64))
    out: dict[str, NDArray[Any]] = {}
    for name, column in columns.items():
        out[name] = memory.array(name, size, column.values.dtype)
        if fixed:
            _pad(out[name], segments, config.seq_len, padding_of(name, config))
        gather(
            column.values, column.starts[rows] + starts, lens, places, out[name], executor=executor
        )
    if config.mask_first_label:
        if "labels" not in out:
            out["labels"] = memory.array("labels", size, out["input_ids"].dtype)
            np.copyto(out["labels"], out["input_ids"])
            if fixed:
                _pad(out["labels"], segments, config.seq_len, NO_LABEL)
        out["labels"][places] = NO_LABEL
    if fixed:
        numbers = np.arange(len(lens)) - np.repeat(segments.offsets[:-1], np.diff(segments.offsets))
        for name in _NUMBERS:
            out[name] = memory.array(name, size, np.dtype(np.int32))
            _pad(out[name], segments, config.seq_len, 0)
        number_tokens(
            lens,
            (numbers + 1).astype(np.int32),
            places,
            out["segment_ids"],
            out["position_ids"],
            executor=executor,
        )
    return out


def padding_of(name: str, config: TokenConfig) -> int:
    """Return what a token column holds in padding."""
    return {"labels": NO_LABEL, "input_ids": config.pad_token_id}.get(name, 0)


def _pad(flat: NDArray[Any], segments: TokenSegments, seq_len: int, value: int) -> None:
    """Write a value into the padding of rows laid end to end."""
    before = np.concatenate([[0], np.cumsum(segments.seq_lens, dtype=np.int64)])
    filled = np.diff(before[segments.offsets])
    rows = flat.reshape(-1, seq_len)
    for row in np.flatnonzero(filled < seq_len).tolist():
        rows[row, filled[row] :] = value


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
        **{name: pa.array(getattr(segments, name)) for name in _SEGMENT_TYPES},
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
    for name in _SEGMENT_TYPES:
        if name not in table.column_names:
            expected, remedy = "a column of packed tokens", "read rows that packpipe has written"
            raise ValueError(checks.sentence(f"column {name!r}", "missing", expected, remedy))
    whole = {name: _one_chunk(table.column(name)) for name in table.column_names}
    tokens = {}
    for name, column in whole.items():
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            tokens[name] = column.flatten().to_numpy().reshape(-1, size)
    if not set(_NUMBERS) <= tokens.keys():
        found, expected = "ragged", "rows of one length"
        raise ValueError(checks.sentence("layout", found, expected, "pack with layout='fixed'"))
    values = {
        name: column.flatten()
        for name, column in whole.items()
        if name not in tokens and name not in _SEGMENT_TYPES
    }
    numbers = {name: tokens.pop(name) for name in _NUMBERS}
    return TokenRows(
        segments=replace(table_token_segments(table), values=values),
        tokens=tokens,
        **numbers,
    )


def table_token_segments(table: pa.Table) -> TokenSegments:
    """Return the segments of a table of rows, fixed or ragged, without the source's values."""
    whole = {name: _one_chunk(table.column(name)) for name in _SEGMENT_TYPES}
    # A list array may be a slice: its offsets then start above zero, and `flatten` obeys them.
    offsets = whole["seq_lens"].offsets.to_numpy().astype(np.int64)
    segments = {name: column.flatten().to_numpy() for name, column in whole.items()}
    return TokenSegments(offsets=offsets - offsets[0], **segments, values={})


def gathered_tokens(parts: list[TokenRows], numbers: list[int]) -> TokenRows:
    """Return one row of each part, in memory of their own.

    Args:
        parts: rows of one shape and the same columns, one at least; a part may come again.
        numbers: which row of each.
    """
    rows = list(zip(parts, numbers, strict=True))
    spans = [slice(*part.segments.offsets[number : number + 2].tolist()) for part, number in rows]
    found = [(part.segments, span) for (part, _), span in zip(rows, spans, strict=True)]
    segments = {
        name: np.concatenate([getattr(some, name)[span] for some, span in found])
        for name in _SEGMENT_TYPES
    }
    values = {
        name: pa.concat_arrays([some.values[name][span] for some, span in found])
        for name in parts[0].segments.values
    }
    offsets = np.cumsum([0, *(span.stop - span.start for span in spans)])
    return TokenRows(
        segments=TokenSegments(offsets=offsets, **segments, values=values),
        tokens={
            name: np.stack([part.tokens[name][number] for part, number in rows])
            for name in parts[0].tokens
        },
        segment_ids=np.stack([part.segment_ids[number] for part, number in rows]),
        position_ids=np.stack([part.position_ids[number] for part, number in rows]),
    )


def spread_tokens(rows: TokenRows, places: NDArray[np.int64], num_rows: int) -> TokenRows:
    """Return num_rows rows: those given at their places, which rise, and empty ones elsewhere."""

    def at_places(values: NDArray[Any], absent: int) -> NDArray[Any]:
        out = np.full((num_rows, *values.shape[1:]), absent, values.dtype)
        out[places] = values
        return out

    held = np.zeros(num_rows, np.int64)
    held[places] = np.diff(rows.segments.offsets)
    # input_ids: no row says what its padding is; a token nobody sees may be any.
    tokens = {
        name: at_places(values, NO_LABEL if name == "labels" else 0)
        for name, values in rows.tokens.items()
    }
    return TokenRows(
        segments=replace(rows.segments, offsets=np.concatenate([[0], np.cumsum(held)])),
        tokens=tokens,
        segment_ids=at_places(rows.segment_ids, 0),
        position_ids=at_places(rows.position_ids, 0),
    )


def is_token_rows(names: Sequence[str]) -> bool:
    """Return whether columns are those of packed rows of tokens."""
    return "fragment" in names and "seq_lens" in names


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
