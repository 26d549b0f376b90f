"""Invariants of packed rows of tokens: what must hold of stored ones (floor 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe.invariants import has_nulls
from packpipe.problems import Broken
from packpipe.token_config import TokenConfig
from packpipe.token_rows import (
    NO_LABEL,
    SEGMENT_COLUMNS,
    TokenSegments,
    fill_tokens,
    first_places,
    padding_of,
    table_token_segments,
    token_schema,
)


def broken_token_rows(
    rows: pa.Table, names: list[str], values: list[str], config: TokenConfig
) -> Iterator[Broken]:
    """Yield what is wrong with which rows of a table; nothing if all is well.

    Whatever else could be wrong with a row is not looked for once its segments are.

    Args:
        rows: with the columns of packed rows.
        names: its columns of the source's tokens.
        values: its columns of one value of the source a segment.
        config: the options they were made with.
    """
    every = np.arange(rows.num_rows)
    for name in [*names, *values]:
        if not hasattr(rows.schema.field(name).type, "value_type"):
            what = f"column {name!r} is {rows.schema.field(name).type}, expected lists"
            yield Broken(what, every, False)
            return
    expected = token_schema(
        config,
        {name: rows.schema.field(name).type.value_type for name in names},
        {name: rows.schema.field(name).type.value_type for name in values},
    )
    for field in expected:
        column, found = rows.column(field.name), rows.schema.field(field.name).type
        if found != field.type:
            yield Broken(f"column {field.name!r} is {found}, expected {field.type}", every, False)
            return
        # A value of the source may be null; a token may not.
        if column.null_count or (field.name not in values and has_nulls(column)):
            yield Broken(f"column {field.name!r} holds nulls", every, False)
            return
    of_segments = [*SEGMENT_COLUMNS, *values]
    lengths = np.stack([lengths_of(rows, name) for name in of_segments])
    uneven = np.flatnonzero((lengths != lengths[0]).any(axis=0))
    if len(uneven):
        yield Broken("the segment columns hold lists of different lengths", uneven, False)
        return
    segments, sound = table_token_segments(rows), True
    for what, bad in _broken_segments(segments, config):
        if bad.any():
            sound = False
            yield Broken(what, np.flatnonzero(bad), True)
    if sound:
        for what, bad in _broken_tokens(rows, segments, names, config):
            if bad.any():
                yield Broken(what, np.flatnonzero(bad), True)


def _broken_segments(
    segments: TokenSegments, config: TokenConfig
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each thing that can be wrong with segments, and bool[rows], with which it is."""
    per_row = np.diff(segments.offsets)
    row_of = np.repeat(np.arange(len(segments)), per_row)
    kept = np.bincount(row_of, segments.seq_lens, len(segments))
    yield f"seq_lens add up to more than seq_len, {config.seq_len}", kept > config.seq_len
    if config.max_segments is not None:
        what = f"more than max_segments, {config.max_segments}, segments"
        yield what, per_row > config.max_segments
    bad = (segments.seq_lens < 1) | (segments.fragment < 0)
    found = np.zeros(len(segments), np.bool_)
    found[row_of[bad]] = True
    yield "a segment with no token, or a fragment below 0", found


def _broken_tokens(
    rows: pa.Table, segments: TokenSegments, names: list[str], config: TokenConfig
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each thing that can be wrong with tokens, and bool[rows], with which it is."""
    per_row = np.diff(segments.offsets)
    row_of = np.repeat(np.arange(len(segments)), per_row)
    kept = np.bincount(row_of, segments.seq_lens, len(segments)).astype(np.int64)
    if config.layout == "fixed":
        plain = replace(config, mask_first_label=False)
        numbers = fill_tokens(segments, np.zeros(len(row_of), np.int64), {}, plain)
        padding = np.arange(config.seq_len) >= kept[:, None]
        for name, expected in numbers.items():
            differing = flat_tokens(rows, name) != expected
            yield f"{name} are not those of seq_lens", _any_by_row(differing, len(rows))
        for name in names:
            absent = padding_of(name, config)
            differing = (flat_tokens(rows, name) != absent) & padding.reshape(-1)
            yield f"{name} are not {absent} in padding", _any_by_row(differing, len(rows))
    else:
        uneven = [lengths_of(rows, name) != kept for name in names]
        yield "the tokens are not as many as seq_lens say", np.any(uneven, axis=0)
        if np.any(uneven):
            return
    if config.mask_first_label:
        unmasked = flat_tokens(rows, "labels")[first_places(segments, config)] != NO_LABEL
        found = np.zeros(len(segments), np.bool_)
        found[row_of[unmasked]] = True
        yield f"the first label of a segment is not {NO_LABEL}", found


def lengths_of(rows: pa.Table, name: str) -> NDArray[np.int64]:
    """Return int64[rows], how many values each row's list holds."""
    return np.asarray(pc.list_value_length(rows.column(name)))


def flat_tokens(rows: pa.Table, name: str) -> NDArray[Any]:
    """Return the tokens of all rows, end to end."""
    flat: NDArray[Any] = rows.column(name).combine_chunks().flatten().to_numpy()
    return flat


def _any_by_row(flat: NDArray[np.bool_], num_rows: int) -> NDArray[np.bool_]:
    return np.asarray(flat.reshape(num_rows, -1).any(axis=1))
