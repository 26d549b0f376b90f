"""Who fills a loader's batches: the caller when it asks, threads ahead, or processes ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from packpipe.loading.workers import Fill, Pass, Processes, Threads

if TYPE_CHECKING:
    from packpipe.loading.batch import Batch

WORKERS = ("threads", "processes")


@dataclass(eq=False)
class Filling:
    """Fills the batches of one pass after the other.

    Attributes:
        num_workers: workers that fill batches ahead; 0 fills each batch when it is asked for.
        workers: one of `WORKERS`.
        prefetch: batches that each worker fills ahead.
        persistent: whether processes wait for the next pass.
    """

    num_workers: int
    workers: str
    prefetch: int
    persistent: bool
    # That wait for the next pass.
    _processes: Processes | None = field(default=None, init=False)
    # That go on from pass to pass.
    _threads: Threads | None = field(default=None, init=False)

    def batches(
        self, fill: Fill, own: Pass, following: Callable[[], Pass] | None
    ) -> Iterator[Batch]:
        """Return the batches of a pass, in order.

        Args:
            fill: makes a batch.
            own: the pass.
            following: returns the pass that probably comes next; None where it is not known yet.
                Only threads within `over_passes` use it.
        """
        if not self.num_workers:
            return map(fill, own.parts)
        if self.workers == "threads":
            return self._threaded(fill, own, following)
        return self._processes_for(fill).batches(own.parts)

    @contextmanager
    def over_passes(self) -> Iterator[None]:
        """Within it, threads fill the first batches of the next pass while one ends."""
        has_threads = self.num_workers and self.workers == "threads"
        self._threads = threads = self._new_threads() if has_threads else None
        try:
            yield
        finally:
            self._threads = None
            if threads is not None:
                threads.close()

    def _threaded(
        self, fill: Fill, own: Pass, following: Callable[[], Pass] | None
    ) -> Iterator[Batch]:
        """Yield a pass's batches, by threads of its own or by those that go on."""
        if self._threads is not None:
            yield from self._threads.batches(fill, own, following)
            return
        threads = self._new_threads()
        try:
            yield from threads.batches(fill, own)
        finally:
            # Reached, too, when the caller leaves its loop, which closes this generator.
            threads.close()

    def _new_threads(self) -> Threads:
        return Threads(self.num_workers, self.prefetch)

    def _processes_for(self, fill: Fill) -> Processes:
        """Return the processes of the last pass if they can go on, others if not."""
        processes = self._processes
        if processes is None or not processes.can_go_on():
            self._processes = None  # ends the old ones, before there are others beside them
            del processes
            processes = Processes(fill, self.num_workers, self.prefetch)
        self._processes = processes if self.persistent else None
        return processes

    # A copy, or one that is sent to another process, starts workers of its own.
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_processes": None, "_threads": None}
