"""Rows of tokens, for `verify`: what they must be, and what their source gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe.building import token_job
from packpipe.building.token_job import TokenContents
from packpipe.planning.token_config import TokenConfig
from packpipe.rows.fill_tokens import TokenColumn, fill_tokens
from packpipe.rows.schema import table_token_segments, token_schema
from packpipe.sources.columns import value_type
from packpipe.verification.problems import Broken, FoundRows, Held, Problem, named
from packpipe.verification.row_checks import broken_token_rows, flat_tokens, lengths_of

KEYS: tuple[str, ...] = ("token_columns", "value_columns")
VERSION_KEY, VERSION = "token_schema_version", token_job.VERSION


def config_of(values: dict[str, Any]) -> TokenConfig:
    """Return the options of a manifest."""
    return TokenConfig(**values)


def columns(manifest: dict[str, Any]) -> list[str]:
    """Return the columns that stored rows must have."""
    tokens = dict.fromkeys(_token_names(manifest), pa.int32())
    values = dict.fromkeys(manifest["value_columns"], pa.int32())
    return list(token_schema(config_of(manifest["config"]), tokens, values).names)


def source_columns(manifest: dict[str, Any]) -> list[str]:
    """Return the columns of the source that rows were made from."""
    return [*manifest["token_columns"], *manifest["value_columns"]]


def held(rows: pa.Table) -> Held:
    """Return which sequences rows hold."""
    found = table_token_segments(rows)
    return Held(found.offsets, found.example_index, found.seq_lens, found.fragment)


def counts(found: Held) -> dict[str, int]:
    """Return the manifest's counts that only rows of tokens have."""
    return {"pieces": len(found.example_index)}


def broken_rows(rows: pa.Table, manifest: dict[str, Any]) -> Iterator[Broken]:
    """Yield what is wrong with which rows of a table, from what they say alone."""
    config = config_of(manifest["config"])
    return broken_token_rows(rows, _token_names(manifest), manifest["value_columns"], config)


def total_problems(found: Held, manifest: dict[str, Any]) -> Iterator[Problem]:
    """Yield which sequences lack a piece, or have one twice, or one cut elsewhere."""
    seq_len = manifest["config"]["seq_len"]
    order = np.lexsort((found.fragment, found.example_index))
    example, fragment = found.example_index[order], found.fragment[order]
    first = np.r_[True, example[1:] != example[:-1]][: len(example)]
    begins = np.maximum.accumulate(np.where(first, np.arange(len(example)), 0))
    # A piece that another one follows is as long as a row.
    followed = ~np.r_[first[1:], True][: len(example)]
    bad = fragment != np.arange(len(example)) - begins
    bad |= followed & (found.seq_lens[order] != seq_len)
    if bad.any():
        what = f"its pieces are not 0, 1, ... of {seq_len} tokens and a rest"
        yield Problem(named("example", np.unique(example[bad]).tolist()), what)


def source_problems(
    dataset: Dataset, sample: int | None, manifest: dict[str, Any], found: FoundRows
) -> Iterator[Problem]:
    """Compare every piece with its sequence in the source."""
    del sample
    config = config_of(manifest["config"])
    contents = TokenContents(
        dataset,
        manifest["token_columns"],
        manifest["value_columns"],
        config,
        manifest["seed"],
        manifest["epoch"],
    )
    tokens, _ = contents.read()
    values = contents.values()
    row = 0
    for part in found.parts:
        num_rows = len(part.offsets) - 1
        if num_rows:
            name, stored, start = found.places[row]
            rows = stored.slice(start, num_rows)
            for what, bad in _differences(rows, tokens, values, dataset, config):
                where = f"{name}, {named('row', (np.flatnonzero(bad) + start).tolist())}"
                yield Problem(where, what)
        row += num_rows
    yield from _lost_tokens(found.held(), tokens, manifest)


def _differences(
    rows: pa.Table,
    tokens: dict[str, TokenColumn],
    values: dict[str, pa.Array],
    dataset: Dataset,
    config: TokenConfig,
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield how rows differ from the source, and bool[rows], which of them."""
    segments = table_token_segments(rows)
    row_of = np.repeat(np.arange(len(segments)), np.diff(segments.offsets))

    def rows_with(bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
        found = np.zeros(len(segments), np.bool_)
        found[row_of[bad]] = True
        return found

    for name in tokens:
        kind, expected = rows.schema.field(name).type.value_type, value_type(dataset.features, name)
        if kind != expected:
            yield f"{name} are {kind}, those of the source {expected}", rows_with(row_of >= 0)
            return
    example, starts = segments.example_index, segments.fragment.astype(np.int64) * config.seq_len
    column = next(iter(tokens.values()))
    outside = (example < 0) | (example >= len(column.lens))
    known = np.where(outside, 0, example)
    outside |= starts + segments.seq_lens > (column.lens[known] if len(column.lens) else 0)
    if outside.any():
        yield "a piece that its sequence does not have", rows_with(outside)
        return
    expected_tokens = fill_tokens(segments, starts, tokens, config)
    held = lengths_of(rows, next(iter(tokens)))
    for name, expected in expected_tokens.items():
        differing = flat_tokens(rows, name) != expected
        if differing.any():
            bad = np.zeros(len(segments), np.bool_)
            bad[np.repeat(np.arange(len(segments)), held)[differing]] = True
            yield f"{name} are not those of the source", bad
    for name, value in values.items():
        expected = value.take(pa.array(example))
        stored = rows.column(name).combine_chunks().flatten()
        if not stored.equals(expected):
            same = pc.fill_null(pc.equal(stored, expected), False).to_numpy(zero_copy_only=False)
            same |= np.asarray(stored.is_null()) & np.asarray(expected.is_null())
            yield f"{name} is not that of the source", rows_with(~same)


def _lost_tokens(
    held: Held, tokens: dict[str, TokenColumn], manifest: dict[str, Any]
) -> Iterator[Problem]:
    """Yield which sequences have other numbers of tokens in rows than they should."""
    lens = next(iter(tokens.values())).lens
    example = held.example_index
    inside = (example >= 0) & (example < len(lens))
    found = np.bincount(example[inside], held.seq_lens[inside], len(lens)).astype(np.int64)
    if manifest["config"]["overflow"] == "truncate":
        lens = np.minimum(lens, manifest["config"]["seq_len"])
    if manifest.get("longest"):
        lens = np.minimum(lens, manifest["longest"])
    wrong = np.flatnonzero((found != lens) & (found > 0))
    if len(wrong):
        what = f"{found[wrong[0]]} tokens in rows, expected {lens[wrong[0]]}"
        what += ", the first of them" * (len(wrong) > 1)
        yield Problem(named("example", wrong.tolist()), what)


def _token_names(manifest: dict[str, Any]) -> list[str]:
    """Return the stored columns of tokens."""
    names = list(manifest["token_columns"])
    if config_of(manifest["config"]).mask_first_label and "labels" not in names:
        names.append("labels")
    return names
