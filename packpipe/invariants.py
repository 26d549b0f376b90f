"""Invariants of packed rows: what must hold of stored ones, whoever wrote them (floor 1)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from packpipe import schema
from packpipe.config import PackConfig
from packpipe.decisions import decide_all
from packpipe.problems import Broken
from packpipe.rows import Rows, Segments, planned_tokens, token_columns


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
