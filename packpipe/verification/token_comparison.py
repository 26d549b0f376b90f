"""Compares rows of token sequences with their source: all their pieces, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import piece_starts
from packpipe.rows.fill_tokens import fill_tokens
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rows import Rows
from packpipe.sources.token_source import TokenSource
from packpipe.verification.problems import Problem, named
from packpipe.verification.row_checks import Check, lengths_of, rows_with, same_numbers, same_values


def differing_pieces(
    rows: pa.Table, source: TokenSource, types: dict[str, pa.DataType], config: TokenConfig
) -> Iterator[Check]:
    """Yield how rows differ from the source."""
    segments = table_segments(rows)
    for name, expected in types.items():
        kind = rows.schema.field(name).type.value_type
        if kind != expected:
            every = np.ones(len(segments.seq_lens), np.bool_)
            what = f"{name} are {kind}, those of the source {expected}"
            yield what, rows_with(segments, every)
            return
    example, starts = segments.example_index, piece_starts(segments.fragment, config.seq_len)
    outside = (example < 0) | (example >= len(source.lens))
    known = np.where(outside, 0, example)
    outside |= starts + segments.seq_lens > (source.lens[known] if len(source.lens) else 0)
    # `fill_tokens` does not check bounds: it would read memory behind the sequence.
    if outside.any():
        yield "a piece that its sequence does not have", rows_with(segments, outside)
        return
    held = lengths_of(rows, next(iter(types)))
    for name, expected in fill_tokens(segments, source.columns, config).items():
        differing = ~same_numbers(flat_tokens(rows, name), expected)
        if differing.any():
            bad = np.zeros(len(segments), np.bool_)
            bad[np.repeat(np.arange(len(segments)), held)[differing]] = True
            yield f"{name} are not those of the source", bad
    for name, value in source.values.items():
        expected = value.take(pa.array(example))
        stored = rows.column(name).combine_chunks().flatten()
        if stored.type != value.type:
            every = np.ones(len(stored), np.bool_)
            what = f"{name} are {stored.type}, those of the source {value.type}"
            yield what, rows_with(segments, every)
        elif not (same := same_values(stored, expected)).all():
            yield f"{name} is not that of the source", rows_with(segments, ~same)


def lost_tokens(
    held: Rows, lens: NDArray[np.int64], config: TokenConfig, longest: int
) -> Iterator[Problem]:
    """Yield which sequences have more or fewer tokens in rows than they should."""
    example = held.example_index
    inside = (example >= 0) & (example < len(lens))
    found = np.bincount(example[inside], held.seq_lens[inside], len(lens)).astype(np.int64)
    if config.overflow == "truncate":
        lens = np.minimum(lens, config.seq_len)
    # Texts of `pack_pairs` are truncated to max_text.
    if longest:
        lens = np.minimum(lens, longest)
    # A sequence without any token is a reject, or the totals report it.
    wrong = np.flatnonzero((found != lens) & (found > 0))
    if len(wrong):
        what = f"{found[wrong[0]]} tokens in rows, expected {lens[wrong[0]]}"
        what += ", the first of them" * (len(wrong) > 1)
        yield Problem(named("example", wrong.tolist()), what)


def flat_tokens(rows: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of tokens, all rows laid end to end."""
    values = rows.column(name).combine_chunks().flatten()
    flat: NDArray[Any] = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
    return flat
