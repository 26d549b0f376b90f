"""A `Job`: what a build writes. `image_job` and `token_job` make one, `build` writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray

from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_plan import TokenPlan
from packpipe.rows.rejects import Reject


class FilledRows(NamedTuple):
    """Rows to store, the examples rejected while filling them, and how many were planned.

    ``flags`` counts examples that are in the rows though something is amiss with them, by a word.
    """

    rows: pa.Table
    rejects: list[Reject]
    num_examples: int
    flags: Counter[str]


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """The rows of a job before they are filled.

    Attributes:
        plan: which example is in which row.
        rejects: examples that are in no row.
        unit: word for an example, ``"image"`` or ``"sequence"``.
        what: text for the progress bar and errors, such as ``"991 images in 155 rows"``.
        cut_size: bytes by which rows are cut into files and batches: of a row's patches or tokens,
            or about all that it takes if neither is stored.
        row_size: about how many bytes a row takes on the disk.
        segment_size: about how many bytes each of its segments adds, without texts.
        varying_sizes: int64[rows], bytes of texts, or of encoded images, of each.
        fill: yields the rows of each range of packs. The next ones may overwrite their memory.
        counts: the manifest's counts, given all rejects and flags; no flags (None) are known before
            rows are filled.
        facts: what else the manifest says of the rows, given all rejects.
        fill_size: bytes that a row takes while it is filled, besides what is stored.
    """

    plan: EpochPlan | TokenPlan
    rejects: list[Reject]
    unit: str
    what: str
    cut_size: int
    row_size: int
    segment_size: int
    varying_sizes: NDArray[np.int64]
    fill: Callable[[list[range]], Generator[FilledRows, None, None]]
    counts: Callable[[list[Reject], Counter[str] | None], dict[str, int]]
    facts: Callable[[list[Reject]], dict[str, Any]] = lambda _: {}
    fill_size: int = 0

    def num_examples(self, packs: range) -> int:
        """Return how many examples, or pieces of them, are in some packs."""
        return int(self.plan.offsets[packs.stop] - self.plan.offsets[packs.start])

    def files(self, packs: range, most: int) -> list[range]:
        """Return consecutive ranges of packs of at most so many bytes, or of one pack.

        They depend on the plan and the sizes of what its rows hold alone, so that a build that is
        started again has the same ones. None without packs.
        """
        return cut_packs(packs, self.cut_size + self.varying_sizes, most)

    def batches(self, packs: range, most: int) -> list[range]:
        """Return such ranges of packs that take at most so many bytes while they are filled."""
        return cut_packs(packs, self.cut_size + self.varying_sizes + self.fill_size, most)

    def stored_bytes(self, packs: list[range]) -> int:
        """Return about how many bytes some packs take on the disk."""
        # An estimate to ask for room before a row is made: what Arrow adds to a batch is left out.
        segments = sum(map(self.num_examples, packs))
        varying = sum(int(self.varying_sizes[some.start : some.stop].sum()) for some in packs)
        return self.row_size * sum(map(len, packs)) + self.segment_size * segments + varying


@dataclass(frozen=True, eq=False)
class Job:
    """What a build writes.

    Attributes:
        record: returns everything the bytes of the folder depend on; the same object each time.
        features: of the stored rows.
        num_examples: examples of the source.
        plan: returns the planned rows, not filled yet; the same object each time.
        opened: returns the dataset that `pack` returns, given the stored rows and ``on_error``.
    """

    record: Callable[[], dict[str, Any]]
    features: Features
    num_examples: int
    # A function: a folder that is complete is opened without a plan.
    plan: Callable[[], PlannedRows]
    opened: Callable[[Dataset, str], Dataset]


def cut_packs(packs: range, sizes: NDArray[np.int64], most: int) -> list[range]:
    """Return consecutive ranges of at most so many bytes, or of one pack; none without packs.

    Args:
        packs: the numbers of the packs.
        sizes: int64[all packs], bytes of each.
        most: bytes of a range.
    """
    ends = np.cumsum(sizes[packs.start : packs.stop])
    cut: list[range] = []
    start, before = 0, 0
    while start < len(packs):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        cut.append(packs[start:stop])
        start, before = stop, int(ends[stop - 1])
    return cut
