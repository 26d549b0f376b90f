"""Invariants of packed rows: what must hold of stored ones, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe.planning.decisions import decide_all
from packpipe.planning.image_config import PackConfig
from packpipe.planning.token_config import TokenConfig
from packpipe.rows import schema
from packpipe.rows.fill_images import planned_tokens, token_columns
from packpipe.rows.fill_tokens import fill_tokens, first_places, padding_of
from packpipe.rows.rows import NO_LABEL, SEGMENT_COLUMNS, Rows, Segments, TokenSegments
from packpipe.rows.schema import table_token_segments, token_schema
from packpipe.verification.problems import Broken


def broken_rows(rows: pa.Table, config: PackConfig, *, seed: int, epoch: int) -> Iterator[Broken]:
    """Yield what is wrong with which rows of a table; nothing if all is well.

    Whatever else could be wrong with a row is not looked for once its segments are.

    Args:
        rows: with the columns of packed rows, or their segment columns alone.
        config: the options they were made with.
        seed: likewise.
        epoch: likewise.
    """
    every = np.arange(rows.num_rows)
    has_tokens = "patches" in rows.column_names
    label = rows.schema.field("labels").type.value_type if "labels" in rows.column_names else None
    expected = schema.row_schema(config, label) if has_tokens else schema.segment_schema(label)
    for name, wanted in zip(expected.names, expected.types, strict=True):
        found = rows.schema.field(name).type if name in rows.column_names else "missing"
        if found != wanted:
            yield Broken(f"column {name!r} is {found}, expected {wanted}", every, False)
            return
        if has_nulls(rows.column(name)):
            yield Broken(f"column {name!r} holds nulls", every, False)
            return
    counts = [
        np.asarray(pc.list_value_length(rows.column(name)))
        for name in schema.segment_schema(label).names
    ]
    uneven = np.flatnonzero((np.stack(counts) != counts[0]).any(axis=0))
    if len(uneven):
        what = "the segment columns hold lists of different lengths"
        yield Broken(what, uneven, False)
        return
    segments = schema.table_segments(rows)
    sound = True
    for what, bad in _broken_segments(segments, config, seed=seed, epoch=epoch):
        if bad.any():
            sound = False
            yield Broken(what, np.flatnonzero(bad), True)
    if sound and has_tokens:
        for what, bad in _broken_tokens(schema.table_rows(rows), seed=seed, epoch=epoch):
            if bad.any():
                yield Broken(what, np.flatnonzero(bad), True)


def _broken_segments(
    segments: Segments, config: PackConfig, *, seed: int, epoch: int
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each thing that can be wrong with segments, and bool[rows], with which it is."""
    per_row = np.diff(segments.offsets)
    row_of = np.repeat(np.arange(len(segments)), per_row)

    def rows_with(bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found = np.zeros(len(segments), np.bool_)
        found[row_of[bad]] = True
        return found

    held = np.bincount(row_of, segments.seq_lens, len(segments))
    yield f"seq_lens add up to more than seq_len, {config.seq_len}", held > config.seq_len
    if config.max_segments is not None:
        yield (
            f"more than max_segments, {config.max_segments}, segments",
            (per_row > config.max_segments),
        )
    num_tokens = segments.grid_hw.astype(np.int64).prod(axis=1)
    least = np.minimum(segments.grid_hw, segments.image_hw).min(axis=1, initial=1)
    no_grid = least < 1
    yield "a size or a grid below 1", rows_with(no_grid)
    outside = (segments.seq_lens < 1) | (segments.seq_lens > num_tokens)
    yield "a segment with no token, or with more than its grid has", rows_with(outside)
    if (no_grid | outside).any():
        return
    grid_hw, num_keep, _ = decide_all(
        segments.image_hw, config, seed=seed, epoch=epoch, index=segments.example_index
    )
    differs = (segments.grid_hw != grid_hw).any(axis=1) | (segments.seq_lens != num_keep)
    if config.fit_last is not None:  # the last of a row may have grown
        last = segments.offsets[1:][per_row > 0] - 1
        differs[last] = segments.seq_lens[last] < num_keep[last]
    yield "a grid or a number of tokens that its size does not give", rows_with(differs)


def _broken_tokens(rows: Rows, *, seed: int, epoch: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield each thing that can be wrong with tokens, and bool[rows], with which it is."""
    tokens = planned_tokens(rows.segments, seed=seed, epoch=epoch)
    segment_ids, coords = token_columns(rows.segments, tokens, rows.segment_ids.shape[1])
    differing = (rows.segment_ids != segment_ids).any(axis=1)
    yield "segment_ids are not those of seq_lens", differing
    yield "coords are not those of the kept tokens", (rows.coords != coords).any(axis=(1, 2))
    held = np.count_nonzero(segment_ids, axis=1)
    yield (
        "patches are not zero in padding",
        np.array([patches[end:].any() for patches, end in zip(rows.patches, held, strict=True)]),
    )


def has_nulls(column: pa.ChunkedArray | pa.Array) -> bool:
    """Return whether a column, or a list in it, holds a null."""
    if column.null_count:
        return True
    if isinstance(column, pa.ChunkedArray):
        return any(has_nulls(chunk) for chunk in column.chunks)
    return (
        hasattr(column, "flatten")
        and pa.types.is_nested(column.type)
        and has_nulls(column.flatten())
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
    for what, bad in _broken_token_segments(segments, config):
        if bad.any():
            sound = False
            yield Broken(what, np.flatnonzero(bad), True)
    if sound:
        for what, bad in _broken_token_columns(rows, segments, names, config):
            if bad.any():
                yield Broken(what, np.flatnonzero(bad), True)


def _broken_token_segments(
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


def _broken_token_columns(
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
