"""Background workers. Batches come back in order, whichever worker made them."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.images.watch import STILL_SECONDS, Progress, Watch, run_time
from packpipe.philox import Key
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import Rows

if TYPE_CHECKING:
    from packpipe.loading.batch import Batch

# The packs that a rank takes at a step, and their places in its batch.
Part: TypeAlias = tuple[Any, NDArray[np.int64]]


class Packs(Protocol):
    """Where packs come from: `StoredPacks`, `StoredPairs`, `EpochPacks` or `PackedStream`."""

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""

    def fingerprint(self, key: Key) -> str:
        """Return a text that is equal for epochs whose packs hold the same."""

    def rows(self, key: Key, packs: Any) -> Rows | PairRows:
        """Return the rows of some packs."""


@dataclass(frozen=True)
class Fill:
    """Makes a batch of a `Part`.

    Attributes:
        packs: where packs come from.
        batch_of: makes a batch of rows and their max_segments: `packpipe.loading.batch.batch_of`,
            or `batch_columns`, which needs no torch.
        key: (seed, epoch) of all random choices.
        batch_size: rows of a batch; those without a pack are empty.
        max_segments: S of the batch.
        pin_memory: whether the batch is put into page-locked memory.
    """

    packs: Packs
    batch_of: Callable[..., Any]
    key: Key
    batch_size: int
    max_segments: int
    pin_memory: bool

    def rows(self, part: Part) -> Any:
        """Return the batch of a part, in ordinary memory."""
        packs, places = part
        rows = self.packs.rows(self.key, packs)
        # At a padded last step a rank has fewer packs than rows; the other rows stay empty.
        if len(places) < self.batch_size:
            rows = rows.spread(places, self.batch_size)
        # Not copied again: these rows are in memory of their own, or read-only and copied anyway.
        return self.batch_of(rows, self.max_segments, copy=False)

    def __call__(self, part: Part) -> Any:
        """Return the batch of a part."""
        batch = self.rows(part)
        return batch.pin_memory() if self.pin_memory else batch


def in_threads(
    fill: Fill, parts: Iterator[Part], num_workers: int, prefetch: int
) -> Iterator[Batch]:
    """Yield the batches in order. Threads fill them ahead, and end when the loop is left."""
    waiting: deque[Future[Batch]] = deque()
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="packpipe")
    try:
        # This thread alone takes parts, so that a stream is read in order. A limited number is
        # begun ahead, since every batch takes memory.
        for part in parts:
            waiting.append(executor.submit(fill, part))
            if len(waiting) > num_workers * prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Reached, too, when the caller leaves its loop, which closes this generator.
        executor.shutdown(wait=True, cancel_futures=True)


def in_processes(
    fill: Fill,
    parts: Iterator[Part],
    num_workers: int,
    prefetch: int,
    *,
    still_seconds: float = STILL_SECONDS,
) -> Iterator[Batch]:
    """Yield the batches in order, filled ahead by the workers of torch's own DataLoader.

    Args:
        fill: makes a batch.
        parts: what it is made of.
        num_workers: processes.
        prefetch: batches that each fills ahead.
        still_seconds: how long a process may stand still while a batch is waited for.

    Raises:
        RuntimeError: a process was killed, or stood still (see `packpipe.images.watch`).
    """
    import torch
    from torch.utils.data import DataLoader

    # Parts are small arrays of numbers, so all of an epoch's fit into memory.
    steps: Any = _Steps(fill, list(parts))
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,  # a step is a whole batch already
        sampler=range(len(steps.parts)),
        num_workers=num_workers,
        prefetch_factor=prefetch,
        pin_memory=fill.pin_memory,  # here, since a worker has no GPU
        collate_fn=as_it_is,
        generator=torch.Generator(),  # else it draws a seed from the one that models use, too
    )
    yield from _watched(iter(loader), still_seconds)


def _watched(batches: Any, seconds: float) -> Iterator[Batch]:
    """Yield the batches of a DataLoader's workers; one that stands still is an error."""
    waits_for: int | None = None  # number of the batch that is waited for
    still: list[Any] = []

    # A worker that has nothing to do looks every five seconds whether this process is alive, so
    # that only one that is stopped, or hangs, is not run at all.
    def progress() -> Progress:
        workers = [] if waits_for is None else batches._workers
        return {worker.pid: (waits_for, run_time(worker.pid)) for worker in workers}

    def end(process: Any) -> None:
        still.append(process)
        os.kill(process, signal.SIGKILL)  # torch notices it, and ends the wait

    watch = Watch(progress, end, seconds)
    try:
        for number in count():
            waits_for = number
            batch = next(batches, None)
            waits_for = None
            if batch is None:
                return
            yield batch
    except RuntimeError as error:
        if not still:
            raise
        # Others that are stopped would not heed torch's SIGTERM, nor let this process end.
        for worker in batches._workers:
            worker.kill()
        name, found = f"progress of worker process {still[0]}", f"none within {seconds:g} s"
        remedy = "look for what stopped it, or a file system that hangs; go on from the last state"
        raise RuntimeError(checks.sentence(name, found, "some", remedy)) from error
    finally:
        watch.close()


@dataclass(frozen=True)
class _Steps:
    """A dataset to torch, of batches: item i is the batch of step i, in ordinary memory."""

    fill: Fill
    parts: list[Part]

    def __getitem__(self, step: int) -> Any:
        return self.fill.rows(self.parts[step])


def as_it_is(batch: Any) -> Any:
    """Return the batch: a ``collate_fn`` of batches that are made already."""
    return batch
