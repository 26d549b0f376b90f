"""Rows of tokens, for `verify`: what they must be, and what their source gives (floor 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import token_build
from packpipe.invariants import has_nulls
from packpipe.problems import Broken, FoundRows, Held, Problem, named
from packpipe.token_build import TokenContents
from packpipe.token_columns import TokenColumn
from packpipe.token_config import TokenConfig
from packpipe.token_rows import (
    NO_LABEL,
    RESERVED,
    TokenSegments,
    fill_tokens,
    first_places,
    padding_of,
    table_token_segments,
    token_schema,
)
from packpipe.token_source import value_type

KEYS: tuple[str, ...] = ("token_columns", "value_columns")
VERSION_KEY, VERSION = "token_schema_version", token_build.VERSION


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
    """Yield what is wrong with which rows of a table, from what they say alone.

    Whatever else could be wrong with a row is not looked for once its segments are.
    """
    config, every = config_of(manifest["config"]), np.arange(rows.num_rows)
    names, of_segments = _token_names(manifest), [*manifest["value_columns"]]
    for name in [*names, *of_segments]:
        if not hasattr(rows.schema.field(name).type, "value_type"):
            what = f"column {name!r} is {rows.schema.field(name).type}, expected lists"
            yield Broken(what, every, False)
            return
    expected = token_schema(
        config,
        {name: rows.schema.field(name).type.value_type for name in names},
        {name: rows.schema.field(name).type.value_type for name in of_segments},
    )
    for field in expected:
        column, found = rows.column(field.name), rows.schema.field(field.name).type
        if found != field.type:
            yield Broken(f"column {field.name!r} is {found}, expected {field.type}", every, False)
            return
        # A value of the source may be null; a token may not.
        if column.null_count or (field.name not in of_segments and has_nulls(column)):
            yield Broken(f"column {field.name!r} holds nulls", every, False)
            return
    of_segments += [name for name in RESERVED if name in rows.column_names[len(names) :]]
    of_segments = [name for name in of_segments if not _is_fixed(rows, name)]
    lengths = np.stack([_lengths(rows, name) for name in of_segments])
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
            differing = _flat(rows, name) != expected
            yield f"{name} are not those of seq_lens", _any_by_row(differing, len(rows))
        for name in names:
            absent = padding_of(name, config)
            differing = (_flat(rows, name) != absent) & padding.reshape(-1)
            yield f"{name} are not {absent} in padding", _any_by_row(differing, len(rows))
    else:
        uneven = [_lengths(rows, name) != kept for name in names]
        yield "the tokens are not as many as seq_lens say", np.any(uneven, axis=0)
        if np.any(uneven):
            return
    if config.mask_first_label:
        unmasked = _flat(rows, "labels")[first_places(segments, config)] != NO_LABEL
        found = np.zeros(len(segments), np.bool_)
        found[row_of[unmasked]] = True
        yield f"the first label of a segment is not {NO_LABEL}", found


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
    lens = np.diff(_ends(rows, next(iter(tokens))))
    for name, expected in expected_tokens.items():
        differing = _flat(rows, name) != expected
        if differing.any():
            bad = np.zeros(len(segments), np.bool_)
            bad[np.repeat(np.arange(len(segments)), lens)[differing]] = True
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


def _is_fixed(rows: pa.Table, name: str) -> bool:
    return bool(pa.types.is_fixed_size_list(rows.schema.field(name).type))


def _lengths(rows: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(rows.column(name)))


def _ends(rows: pa.Table, name: str) -> NDArray[np.int64]:
    """Return int64[rows + 1], where each row's tokens begin among all."""
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), _lengths(rows, name)]))


def _flat(rows: pa.Table, name: str) -> NDArray[Any]:
    """Return the tokens of all rows, end to end."""
    flat: NDArray[Any] = rows.column(name).combine_chunks().flatten().to_numpy()
    return flat


def _any_by_row(flat: NDArray[np.bool_], num_rows: int) -> NDArray[np.bool_]:
    return np.asarray(flat.reshape(num_rows, -1).any(axis=1))
