"""Fills the rows of tokens: every sequence is copied once, to where the plan puts it."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import TokenPlan
from packpipe.rows.copy import gather, number_tokens
from packpipe.rows.rows import NO_LABEL, NUMBER_COLUMNS, TokenSegments
from packpipe.rows.schema import tokens_table


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
        for name in NUMBER_COLUMNS:
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


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """A list column: example i is ``values[starts[i] : starts[i] + lens[i]]``.

    Attributes:
        values: what lists hold; what no list points to is not to be touched.
        starts: int64[examples].
        lens: int64[examples], 0 where there is no list.
        bad: bool[examples], whether the list or a value of it is null.
        owner: keeps the memory.
    """

    values: NDArray[Any]
    starts: NDArray[np.int64]
    lens: NDArray[np.int64]
    bad: NDArray[np.bool_]
    owner: Any

    def take(self, rows: NDArray[np.int64]) -> TokenColumn:
        """Return the column of some examples; no value is moved."""
        return TokenColumn(
            self.values, self.starts[rows], self.lens[rows], self.bad[rows], self.owner
        )


def packed_table(
    plan: TokenPlan,
    packs: range,
    columns: dict[str, TokenColumn],
    values: dict[str, pa.Array],
    schema: pa.Schema,
    executor: ThreadPoolExecutor | None = None,
    memory: Memory | None = None,
) -> pa.Table:
    """Return some packs of a plan as rows.

    Args:
        plan: the plan.
        packs: which of its packs.
        columns: the source's token columns.
        values: its other columns.
        schema: of the rows.
        executor: copies with several threads.
        memory: what the rows are written into; None takes new memory.
    """
    segments, members = planned_segments(plan, packs, values)
    starts = plan.starts[members]
    tokens = fill_tokens(segments, starts, columns, plan.config, executor=executor, memory=memory)
    return tokens_table(segments, tokens, schema)
