"""Background workers. Batches come back in order, whichever worker made them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from packpipe.loading.batch import PackedBatch, TokenBatch
from packpipe.rows.rows import Rows, TokenRows, spread, spread_tokens

Batch: TypeAlias = PackedBatch | TokenBatch

# The packs a rank takes at a step, and their places in its batch.
Part: TypeAlias = tuple[Any, NDArray[np.int64]]


class Packs(Protocol):
    """Where packs come from: `StoredPacks`, `EpochPacks` or `PackedStream`.

    The first two also have ``num_packs`` and ``work``, and their packs are places in an epoch's
    order; a stream has ``stream_packs``, and its packs are what that yields.
    """

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""

    def fingerprint(self, seed: int, epoch: int) -> str:
        """Return what two epochs share if their packs hold the same."""

    def rows(self, seed: int, epoch: int, packs: Any) -> Rows | TokenRows:
        """Return the rows of some packs."""


@dataclass(frozen=True)
class Fill:
    """Makes the batch of a part.

    Attributes:
        packs: where packs come from.
        key: (seed, epoch).
        batch_size: rows of a batch; those without a pack are empty.
        max_segments: S of the batch.
        pin_memory: whether it is put into page-locked memory.
    """

    packs: Packs
    key: tuple[int, int]
    batch_size: int
    max_segments: int
    pin_memory: bool

    def rows(self, part: Part) -> Batch:
        """Return the batch of a part, in ordinary memory."""
        packs, places = part
        rows = self.packs.rows(*self.key, packs)
        if isinstance(rows, TokenRows):
            if len(places) < self.batch_size:
                rows = spread_tokens(rows, places, self.batch_size)
            return TokenBatch.from_rows(rows, max_segments=self.max_segments)
        if len(places) < self.batch_size:
            rows = spread(rows, places, self.batch_size)
        return PackedBatch.from_rows(rows, max_segments=self.max_segments, copy=False)

    def __call__(self, part: Part) -> Batch:
        """Return the batch of a part."""
        batch = self.rows(part)
        return batch.pin_memory() if self.pin_memory else batch


def in_threads(
    fill: Fill, parts: Iterator[Part], num_workers: int, prefetch: int
) -> Iterator[Batch]:
    """Yield the batches in order, filled ahead by threads that stop when nobody wants more."""
    waiting: deque[Future[Batch]] = deque()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="packpipe")
    try:
        for part in parts:
            waiting.append(executor.submit(fill, part))
            if len(waiting) > num_workers * prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def in_processes(
    fill: Fill, parts: Iterator[Part], num_workers: int, prefetch: int
) -> Iterator[Batch]:
    """Yield the batches in order, filled ahead by the workers of torch's own DataLoader."""
    steps = _Steps(fill, list(parts))
    yield from DataLoader(
        steps,
        batch_size=None,
        sampler=range(len(steps.parts)),
        num_workers=num_workers,
        prefetch_factor=prefetch,
        pin_memory=fill.pin_memory,  # here, since a worker has no GPU
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # it would draw a seed from torch's own, which models use
    )


@dataclass(frozen=True)
class _Steps(Dataset[Batch]):
    """Batches by step."""

    fill: Fill
    parts: list[Part]

    def __getitem__(self, step: int) -> Batch:
        return self.fill.rows(self.parts[step])


def _as_it_is(batch: Any) -> Any:
    return batch
