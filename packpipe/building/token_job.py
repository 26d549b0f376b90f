"""Rows of tokens, for a build: lengths, then a plan, then one copy of every token."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe._version import __version__
from packpipe.building.job import Batch
from packpipe.packing.quality import Quality
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_config import TokenConfig
from packpipe.planning.token_plan import TokenPlan, accompanying, plan_tokens
from packpipe.rows.fill_tokens import (
    Memory,
    TokenColumn,
    packed_table,
)
from packpipe.rows.rejects import ASKED, Reject
from packpipe.sources.features import token_features
from packpipe.sources.token_source import rejected, token_column, usable

VERSION = 1


@dataclass(frozen=True)
class TokenContents:
    """What `pack` was asked to make of token sequences.

    Attributes:
        dataset: the source.
        token_columns: its columns of tokens; the first gives a sequence's length.
        value_columns: its columns with one value a sequence.
        config, seed, epoch: what the plan is made from.
        beside: the plan of the images whose rows these accompany, or None.
        longest: what their sequences are truncated to.
        rejects: the examples that are in no pack of that plan.
    """

    dataset: Dataset
    token_columns: list[str]
    value_columns: list[str]
    config: TokenConfig
    seed: int
    epoch: int
    beside: EpochPlan | None = None
    longest: int = 0
    rejects: tuple[Reject, ...] = ()

    @property
    def num_examples(self) -> int:
        """Sequences of the source."""
        return len(self.dataset)

    @property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""
        return {
            "token_schema_version": VERSION,
            "packpipe": __version__,
            "source_fingerprint": self.dataset._fingerprint,
            "token_columns": self.token_columns,
            "value_columns": self.value_columns,
            "config": self.config.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            **({} if self.beside is None else {"beside": self.beside.fingerprint}),
            **({"longest": self.longest} if self.longest else {}),
        }

    @property
    def features(self) -> Features:
        """Features of the stored rows."""
        return token_features(
            self.dataset.features, self.token_columns, self.value_columns, self.config
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a full row's tokens."""
        schema = self.features.arrow_schema
        # Columns of tokens, those that are made too, stand before those of segments.
        names = schema.names[: schema.get_field_index("seq_lens")]
        widths = [schema.field(name).type.value_type.bit_width // 8 for name in names]
        return self.config.seq_len * int(sum(widths))

    def read(self) -> tuple[dict[str, TokenColumn], list[Reject]]:
        """Return the token columns, and the examples that cannot be packed."""
        table = self.dataset.data
        columns = {name: token_column(table.column(name)) for name in self.token_columns}
        if self.dataset._indices is not None:
            rows = self.dataset._indices.column(0).to_numpy().astype(np.int64)
            columns = {name: column.take(rows) for name, column in columns.items()}
        return columns, rejected(columns)

    def plan(self) -> PlannedTokens:
        """Return the packs."""
        columns, bad = self.read()
        lens = columns[self.token_columns[0]].lens
        if self.beside is None:
            index = usable(self.num_examples, bad)
            plan = plan_tokens(
                lens[index], self.config, seed=self.seed, epoch=self.epoch, index=index
            )
        else:
            plan = accompanying(self.beside, lens, self.longest, self.config)
            bad = list(self.rejects)
        bad += too_long(plan, columns[self.token_columns[0]])
        return PlannedTokens(self, bad, columns, self.values(), plan)

    def opened(self, stored: Dataset, on_error: str) -> Dataset:
        """Return the stored rows."""
        del on_error
        return stored

    def values(self) -> dict[str, pa.Array]:
        """Return the other columns."""
        if not self.value_columns:
            return {}
        # `take` searches every chunk of a column.
        table = self.dataset.select_columns(self.value_columns).with_format("arrow")[:]
        return {name: table.column(name).combine_chunks() for name in self.value_columns}


@dataclass(frozen=True, eq=False)
class PlannedTokens:
    """Packs of tokens, before they are copied."""

    contents: TokenContents
    rejects: list[Reject]
    columns: dict[str, TokenColumn]
    values: dict[str, pa.Array]
    token_plan: TokenPlan
    unit: str = "sequence"

    @property
    def num_packs(self) -> int:
        """How many packs there are."""
        return len(self.token_plan)

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""
        return self.contents.config.seq_len

    @property
    def quality(self) -> Quality:
        """Fill, bound, gap and the other figures."""
        return self.token_plan.quality

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32[pieces], tokens of each."""
        return self.token_plan.seq_lens

    @property
    def what(self) -> str:
        """What is packed, for a reader."""
        name = "pieces of sequences" if self.token_plan.num_cut else "sequences"
        return f"{len(self.token_plan.index):,} {name} in {self.num_packs:,} rows"

    def num_examples(self, packs: range) -> int:
        """Return how many sequences, or pieces of them, are in some packs."""
        offsets = self.token_plan.offsets
        return int(offsets[packs.stop] - offsets[packs.start])

    def stored_bytes(self, packs: list[range]) -> int:
        """Return about how many bytes some packs take on the disk."""
        lists = 4 + 4 + 8 + 8 * len(self.values)  # a guess at those of the source
        segments = sum(map(self.num_examples, packs))
        return self.contents.row_bytes * sum(map(len, packs)) + lists * segments

    def batches(self, packs: list[range]) -> Generator[Batch, None, None]:
        """Yield the rows of packs, one batch for each range of them; the next overwrites it."""
        schema, memory = self.contents.features.arrow_schema, Memory()
        with ThreadPoolExecutor() as executor:
            for some in packs:
                rows = packed_table(
                    self.token_plan,
                    some,
                    self.columns,
                    self.values,
                    schema,
                    executor,
                    memory,
                )
                yield Batch(rows, [], self.num_examples(some))

    def counts(self, rejects: list[Reject]) -> dict[str, int]:
        """Return the manifest's counts of packs, tokens and what was cut."""
        del rejects  # all of them are known to the plan
        plan = self.token_plan
        return {
            "cut": plan.num_cut,
            "truncated_tokens": plan.num_truncated_tokens,
            "pieces": len(plan.index),
            "packs": len(plan),
            "bound": plan.quality.bound,
            "tokens": plan.quality.num_tokens,
        }


def too_long(plan: TokenPlan, column: TokenColumn) -> list[Reject]:
    """Return the sequences that a plan leaves out for their length."""
    what = f"expected at most {plan.config.seq_len} (seq_len), with overflow='drop'"
    return [
        Reject(row, ASKED, "too long", f"{column.lens[row]} tokens, {what}")
        for row in plan.dropped.tolist()
    ]
