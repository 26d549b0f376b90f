"""Checks rows of token sequences, and compares all their pieces with the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.building import token_job
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.fill_tokens import fill_tokens, first_places, padding_of
from packpipe.rows.rows import NO_LABEL, Rows
from packpipe.rows.schema import table_segments, token_schema
from packpipe.sources.columns import TokenColumns, holds_numbers, value_type
from packpipe.sources.token_source import TokenSource, token_source
from packpipe.verification.problems import FoundRows, Problem, named
from packpipe.verification.row_checks import (
    Check,
    RowChecks,
    lengths_of,
    row_of,
    rows_with,
    value_type_of,
)


class TokenChecks(RowChecks):
    """The checks of rows of token sequences, fixed or ragged."""

    KEYS = ("token_columns", "value_columns")
    VERSION_KEY, VERSION = "token_schema_version", token_job.VERSION
    config: TokenConfig

    @staticmethod
    def config_of(values: dict[str, Any]) -> TokenConfig:
        """Return the options of a manifest."""
        return TokenConfig(**values)

    def values(self) -> list[str]:
        """Return the columns of the source that go with each segment, which may hold nulls."""
        found: list[str] = self.manifest["value_columns"]
        return found

    def token_names(self) -> list[str]:
        """Return the columns of tokens."""
        names = list(self.manifest["token_columns"])
        if self.config.mask_first_label and "labels" not in names:
            names.append("labels")
        return names

    def columns(self) -> list[str]:
        """Return the columns that stored rows must have."""
        tokens = dict.fromkeys(self.token_names(), pa.int32())
        values = dict.fromkeys(self.values(), pa.int32())
        return list(token_schema(self.config, tokens, values).names)

    def schema_of(self, rows: pa.Table) -> pa.Schema:
        """Return the schema rows must have, given the types of the source's own columns."""
        tokens = {name: value_type_of(rows, name) for name in self.token_names()}
        for name, kind in tokens.items():
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise ValueError(f"column {name!r} holds {kind}, expected numbers")
        values = {name: value_type_of(rows, name) for name in self.values()}
        return token_schema(self.config, tokens, values)

    def broken_segments(self, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with segments."""
        bad = (segments.seq_lens < 1) | (segments.fragment < 0)
        yield "a segment with no token, or a fragment below 0", rows_with(segments, bad)

    def broken_tokens(self, rows: pa.Table, segments: Rows) -> Iterator[Check]:
        """Yield each thing that can be wrong with tokens whose segments are sound."""
        config, names = self.config, self.token_names()
        lens = np.bincount(row_of(segments), segments.seq_lens, len(segments)).astype(np.int64)
        if config.layout == "fixed":
            # Without the source's columns only ids and positions are made: labels need input_ids.
            plain = replace(config, mask_first_label=False)
            padding = np.arange(config.seq_len) >= lens[:, None]
            for name, expected in fill_tokens(segments, {}, plain).items():
                differing = _flat_tokens(rows, name) != expected
                yield f"{name} are not those of seq_lens", _any_by_row(differing, len(rows))
            for name in names:
                absent = padding_of(name, config)
                differing = (_flat_tokens(rows, name) != absent) & padding.reshape(-1)
                yield f"{name} are not {absent} in padding", _any_by_row(differing, len(rows))
        else:
            uneven = [lengths_of(rows, name) != lens for name in names]
            yield "the tokens are not as many as seq_lens say", np.any(uneven, axis=0)
            if np.any(uneven):
                return
        if config.mask_first_label:
            firsts = _flat_tokens(rows, "labels")[first_places(segments, config)]
            what = f"the first label of a segment is not {NO_LABEL}"
            yield what, rows_with(segments, firsts != NO_LABEL)

    def counts(self, held: Rows) -> dict[str, int]:
        """Return the manifest's counts that only rows of tokens have."""
        return {"pieces": len(held.example_index)}

    def total_problems(self, held: Rows) -> Iterator[Problem]:
        """Yield which sequences miss a piece, have one twice, or were cut at another place."""
        seq_len = self.config.seq_len
        # By sequence, then by piece: the last key comes first.
        order = np.lexsort((held.fragment, held.example_index))
        example, fragment = held.example_index[order], held.fragment[order]
        # Cut to length, since np.r_ makes one entry where there is no piece at all.
        first = np.r_[True, example[1:] != example[:-1]][: len(example)]
        begins = np.maximum.accumulate(np.where(first, np.arange(len(example)), 0))
        # Every piece of a sequence but its last is as long as a row.
        followed = ~np.r_[first[1:], True][: len(example)]
        bad = fragment != np.arange(len(example)) - begins
        bad |= followed & (held.seq_lens[order] != seq_len)
        if bad.any():
            what = f"its pieces are not 0, 1, ... of {seq_len} tokens and a rest"
            yield Problem(named("example", np.unique(example[bad]).tolist()), what)

    def source_columns(self) -> list[str]:
        """Return the columns of the source that rows were made from."""
        return [*self.manifest["token_columns"], *self.values()]

    def source_problems(
        self,
        dataset: Dataset,
        sample: int | None,  # noqa: ARG002
        found: FoundRows,
    ) -> Iterator[Problem]:
        """Compare every piece with its sequence, and yield how they differ."""
        columns = TokenColumns(self.manifest["token_columns"], self.values())
        for name in columns.tokens:
            if not holds_numbers(dataset.features[name]):
                what = f"has {name} of {dataset.features[name]}, expected lists of numbers"
                yield Problem("dataset", what)
                return
        source = token_source(dataset, columns)
        types = {name: value_type(dataset.features, name) for name in columns.tokens}
        # A part is one record batch, so its rows follow each other in one file.
        row = 0
        for part in found.parts:
            if len(part):
                name, stored, start = found.places[row]
                # Lists of a broken row may be of other lengths than it says.
                sound = [n for n in range(len(part)) if row + n not in found.broken]
                rows = stored.slice(start, len(part)).take(pa.array(sound, pa.int64()))
                for what, bad in _differences(rows, source, types, self.config):
                    numbers = np.array(sound, np.int64)[bad] + start
                    yield Problem(f"{name}, {named('row', numbers.tolist())}", what)
            row += len(part)
        yield from _lost_tokens(
            found.held(), source.lens, self.config, self.manifest.get("longest", 0)
        )


def _differences(
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
    example, starts = segments.example_index, segments.fragment.astype(np.int64) * config.seq_len
    outside = (example < 0) | (example >= len(source.lens))
    known = np.where(outside, 0, example)
    outside |= starts + segments.seq_lens > (source.lens[known] if len(source.lens) else 0)
    # `fill_tokens` does not check bounds: it would read memory behind the sequence.
    if outside.any():
        yield "a piece that its sequence does not have", rows_with(segments, outside)
        return
    held = lengths_of(rows, next(iter(types)))
    for name, expected in fill_tokens(segments, source.columns, config).items():
        found = _flat_tokens(rows, name)
        # NaN differs from itself, and here is what it should be.
        differing = (found != expected) & ~((found != found) & (expected != expected))
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
        elif not stored.equals(expected):
            # For Arrow null = null is null and NaN = NaN false, while here both are the same.
            same = pc.fill_null(pc.equal(stored, expected), False).to_numpy(zero_copy_only=False)
            for is_so in (pc.is_null, pc.is_nan)[: 1 + pa.types.is_floating(stored.type)]:
                both = pc.and_(is_so(stored), is_so(expected))
                same |= pc.fill_null(both, False).to_numpy(zero_copy_only=False)
            if not same.all():
                yield f"{name} is not that of the source", rows_with(segments, ~same)


def _lost_tokens(
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


def _flat_tokens(rows: pa.Table, name: str) -> NDArray[Any]:
    """Return a column of tokens, all rows laid end to end."""
    flat: NDArray[Any] = rows.column(name).combine_chunks().flatten().to_numpy()
    return flat


def _any_by_row(flat: NDArray[np.bool_], num_rows: int) -> NDArray[np.bool_]:
    return np.asarray(flat.reshape(num_rows, -1).any(axis=1))
