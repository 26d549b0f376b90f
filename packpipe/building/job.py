"""What a build writes: a plan, and a function that fills its packs."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe.packing.quality import Quality
from packpipe.rows.rejects import Reject


class Batch(NamedTuple):
    """Some stored rows, and what became of the examples that were meant for them."""

    rows: pa.Table
    rejects: list[Reject]
    num_examples: int


class Planned(Protocol):
    """The packs of a build, before they are filled."""

    @property
    def num_packs(self) -> int:
        """How many there are."""

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""

    @property
    def quality(self) -> Quality:
        """Fill, bound, gap and the other figures."""

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32[segments], tokens of each, in no order that matters."""

    @property
    def rejects(self) -> list[Reject]:
        """Examples that are in no pack."""

    @property
    def what(self) -> str:
        """What is packed, for a reader."""

    @property
    def unit(self) -> str:
        """What an example is called."""

    def num_examples(self, packs: range) -> int:
        """Return how many examples are in some packs."""

    def stored_bytes(self, packs: list[range]) -> int:
        """Return about how many bytes some packs take on the disk."""

    def batches(self, packs: list[range]) -> Generator[Batch, None, None]:
        """Yield the rows of packs, one batch for each range of them."""

    def counts(self, rejects: list[Reject]) -> dict[str, int]:
        """Return the manifest's counts of packs, tokens and what was changed."""


class Contents(Protocol):
    """What a build is to make: rows of one kind from one source."""

    @property
    def num_examples(self) -> int:
        """Examples of the source."""

    @property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""

    @property
    def features(self) -> Features:
        """Features of the stored rows."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that are worth counting."""

    def plan(self) -> Planned:
        """Return the packs."""

    def opened(self, stored: Dataset, on_error: str) -> Dataset:
        """Return the stored rows as the caller gets them."""
