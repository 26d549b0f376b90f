"""Fills the rows of tokens: copies every sequence once, to its place in the plan."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import TokenPlan, piece_starts
from packpipe.rows.copy import copy_tokens, number_tokens
from packpipe.rows.rows import NO_LABEL, Rows
from packpipe.rows.schema import NUMBER_COLUMNS
from packpipe.rows.to_arrow import rows_table


class Buffers:
    """Arrays, by name, that are used again for every batch of rows."""

    # Copying 64 MB into new memory took 1.4 times as long as into memory that was written before:
    # the system clears each new page first.
    def __init__(self) -> None:
        self._kept: dict[str, NDArray[Any]] = {}

    def array(self, name: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of this size; it overwrites the last one of the same name."""
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = np.empty(size, dtype)
        return self._kept[name][:size]


def planned_pieces(plan: TokenPlan, packs: range, values: dict[str, Any]) -> Rows:
    """Return the pieces of sequences that a plan puts into some packs: rows without tokens yet.

    Args:
        plan: the plan.
        packs: the numbers of its packs.
        values: the source's other columns, one value a source row: Arrow arrays, or what takes rows
            as they do.
    """
    offsets = plan.offsets[packs.start : packs.stop + 1]
    members = plan.order[offsets[0] : offsets[-1]]
    example_index = plan.index[members]
    rows = pa.array(example_index)
    segments = {
        "seq_lens": plan.seq_lens[members],
        "fragment": plan.fragments[members],
        "example_index": example_index,
        **{name: column.take(rows) for name, column in values.items()},
    }
    return Rows(offsets - offsets[0], segments)


def token_places(rows: Rows, config: TokenConfig) -> NDArray[np.int64]:
    """Return int64[segments], the place of each one's first token, rows laid end to end."""
    if config.layout == "fixed":
        return rows.first_places(config.seq_len)
    places: NDArray[np.int64] = np.cumsum(rows.seq_lens, dtype=np.int64) - rows.seq_lens
    return places


def fill_tokens(
    planned: Rows,
    columns: dict[str, TokenColumn],
    config: TokenConfig,
    *,
    executor: Executor | None = None,
    buffers: Buffers | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the token columns of rows by name, rows laid end to end.

    Args:
        planned: rows without tokens; see `planned_pieces`.
        columns: the source's token columns by name, one list for each ``example_index``.
        config: the options; ``layout="fixed"`` adds segment_ids and position_ids.
        executor: threads that copy; None copies in this thread.
        buffers: memory to write to; None takes new memory.
    """
    buffers = Buffers() if buffers is None else buffers
    lens, places = planned.seq_lens, token_places(planned, config)
    fixed = config.layout == "fixed"
    size = len(planned) * config.seq_len if fixed else int(lens.sum(dtype=np.int64))
    starts = piece_starts(planned.fragment, config.seq_len)
    out: dict[str, NDArray[Any]] = {}

    def empty(name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return buffers.array(name, size, dtype)

    def pad(name: str) -> None:
        if fixed:
            _pad(out[name], planned, config.seq_len, padding_of(name, config))

    for name, column in columns.items():
        out[name] = empty(name, column.values.dtype)
        pad(name)  # writes padding alone; `copy_tokens` writes the rest
        firsts = column.starts[planned.example_index] + starts
        copy_tokens(column.values, firsts, lens, places, out[name], executor=executor)
    if config.mask_first_label:
        # A model that shifts labels would predict a segment's first label from the last token of
        # the segment before it.
        if "labels" not in out:
            out["labels"] = empty("labels", out["input_ids"].dtype)
            np.copyto(out["labels"], out["input_ids"])
            pad("labels")
        out["labels"][places] = NO_LABEL
    if fixed:
        for name in NUMBER_COLUMNS:
            out[name] = empty(name, np.dtype(np.int32))
            pad(name)
        ids, positions = (out[name] for name in NUMBER_COLUMNS)
        numbers = (planned.numbers + 1).astype(np.int32)
        number_tokens(lens, numbers, places, ids, positions, executor=executor)
    return out


def padding_of(name: str, config: TokenConfig) -> int:
    """Return the value of a token column in padding."""
    return {"labels": NO_LABEL, "input_ids": config.pad_token_id}.get(name, 0)


def _pad(flat: NDArray[Any], planned: Rows, seq_len: int, value: int) -> None:
    """Write a value into the padding of rows laid end to end."""
    before = np.concatenate([[0], np.cumsum(planned.seq_lens, dtype=np.int64)])
    filled = np.diff(before[planned.offsets])
    rows = flat.reshape(-1, seq_len)
    # A loop over rows that have padding, which packing leaves few of.
    for row in np.flatnonzero(filled < seq_len).tolist():
        rows[row, filled[row] :] = value


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """A list column: example i is ``values[starts[i] : starts[i] + lens[i]]``.

    Attributes:
        values: memory with the values of all lists. What no list points to must not be read: it
            may belong to others (`packpipe.sources.token_source.one_view`).
        starts: int64[examples].
        lens: int64[examples], 0 where there is no list.
        bad: bool[examples], whether the list or a value of it is null.
        owner: what keeps the memory alive.
    """

    values: NDArray[Any]
    starts: NDArray[np.int64]
    lens: NDArray[np.int64]
    bad: NDArray[np.bool_]
    owner: Any

    def take(self, rows: NDArray[np.int64]) -> TokenColumn:
        """Return the column of some examples; no value is copied."""
        return TokenColumn(
            self.values, self.starts[rows], self.lens[rows], self.bad[rows], self.owner
        )


def packed_table(
    plan: TokenPlan,
    packs: range,
    columns: dict[str, TokenColumn],
    values: dict[str, Any],
    schema: pa.Schema,
    *,
    numbers: NDArray[np.int64] | None = None,
    executor: Executor | None = None,
    buffers: Buffers | None = None,
) -> pa.Table:
    """Return some packs of a plan as rows.

    Args:
        plan: the plan.
        packs: the numbers of its packs.
        columns: the source's token columns.
        values: its other columns; see `planned_pieces`.
        schema: of the rows.
        numbers: int64[source rows], the ``example_index`` to store for each; None stores the row.
        executor: threads that copy; None copies in this thread.
        buffers: memory to write to; None takes new memory.
    """
    planned = planned_pieces(plan, packs, values)
    tokens = fill_tokens(planned, columns, plan.config, executor=executor, buffers=buffers)
    # Only after filling, which looks up tokens by the row that example_index holds until here.
    if numbers is not None:
        planned.segments["example_index"] = numbers[planned.example_index]
    return rows_table(replace(planned, tokens=tokens), schema)
