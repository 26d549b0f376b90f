"""Background workers. Batches come back in order, whichever worker made them."""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.augmenting.augment import Augment
from packpipe.augmenting.rows import augmented
from packpipe.images.watch import STILL_SECONDS, Progress, Watch, run_time
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.rows.pairs import PairRows
from packpipe.rows.rows import Rows

if TYPE_CHECKING:
    from packpipe.loading.batch import Batch

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a rank takes at a step.

    Attributes:
        key: (seed, epoch) of all random choices.
        packs: the packs, named as `PackSource.rows` takes them.
        places: int64[packs], their places in the rank's batch.
    """

    key: Key
    packs: Any
    places: NDArray[np.int64]


class PackSource(Protocol):
    """Where packs come from.

    `StoredPacks`, `StoredPairs`, `EpochPacks`, `WindowPacks` or `PackedStream`.
    """

    @property
    def max_segments(self) -> int:
        """Most segments a pack may hold."""

    def fingerprint(self, key: Key) -> str:
        """Return a text that is equal for epochs whose packs hold the same."""

    def rows(self, key: Key, packs: Any) -> Rows | PairRows:
        """Return the rows of some packs, in memory that may be written to."""


@dataclass(frozen=True)
class Fill:
    """Makes a batch of a `Part`.

    Attributes:
        packs: where packs come from.
        batch_of: makes a batch of rows and their max_segments: `packpipe.loading.batch.batch_of`,
            or `batch_columns`, which needs no torch.
        batch_size: rows of a batch; those without a pack are empty.
        max_segments: S of the batch.
        pin_memory: whether the batch is put into page-locked memory.
        augment: what is drawn for each image of the batch; None draws nothing.
    """

    packs: PackSource
    batch_of: Callable[..., Any]
    batch_size: int
    max_segments: int
    pin_memory: bool
    augment: Augment | None = None

    def rows(self, part: Part) -> Any:
        """Return the batch of a part, in ordinary memory."""
        return self._batch_of(self.packs.rows(part.key, part.packs), part)

    def _batch_of(self, rows: Rows | PairRows, part: Part) -> Any:
        if self.augment is not None:
            rows = augmented(rows, self.augment, part.key)
        # At a padded last step a rank has fewer packs than rows; the other rows stay empty.
        if len(part.places) < self.batch_size:
            rows = rows.spread(part.places, self.batch_size)
        # Not copied again: these rows are in memory of their own, or read-only and copied anyway.
        return self.batch_of(rows, self.max_segments, copy=False)

    def __call__(self, part: Part) -> Any:
        """Return the batch of a part."""
        if not self.pin_memory:
            return self.rows(part)
        from packpipe.loading.page_locked import PageLocked

        locked = PageLocked()
        # Of packs of another class only their own `rows` says what they hold, and it may know
        # nothing of memory that it is given.
        memory = {"empty": locked.empty} if type(self.packs) is StoredPacks else {}
        return locked.batch(self._batch_of(self.packs.rows(part.key, part.packs, **memory), part))


class Threads:
    """Threads that fill batches ahead, those of the next pass, too, while a pass ends.

    Args:
        num_workers: threads.
        prefetch: batches that each fills ahead.
    """

    def __init__(self, num_workers: int, prefetch: int) -> None:
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="packpipe")
        self._most = num_workers * prefetch
        self._begun: Pass | None = None  # the pass that is begun ahead
        self._ahead: deque[Future[Batch]] = deque()  # its first batches

    def batches(
        self, fill: Fill, own: Pass, following: Callable[[], Pass] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of a pass in order.

        Args:
            fill: makes a batch.
            own: the pass.
            following: returns the pass that will probably come next; None begins none.
        """
        waiting, parts = self._taken_up(own), own.parts
        # The caller's thread alone takes parts, so that a stream is read in order. A limited number
        # is begun ahead, since every batch takes memory.
        for part in parts:
            waiting.append(self._executor.submit(fill, part))
            if len(waiting) > self._most:
                yield waiting.popleft().result()
        while waiting:
            if following is not None:
                self._begin(fill, following)
            yield waiting.popleft().result()

    def _taken_up(self, own: Pass) -> deque[Future[Batch]]:
        """Return the batches of a pass that are begun; others that are begun are given up."""
        begun, ahead = self._begun, self._ahead
        self._begun, self._ahead = None, deque()
        if begun is not None and begun.name == own.name:
            own.parts = begun.parts
            return ahead
        for future in ahead:
            future.cancel()
        return deque()

    def _begin(self, fill: Fill, following: Callable[[], Pass]) -> None:
        """Begin one batch more of the next pass."""
        if self._begun is None:
            self._begun = following()
        try:
            part = next(self._begun.parts, None)
        except Exception:  # noqa: BLE001  the next pass raises it itself, once this one is over
            self._begun, part = Pass(None, iter(())), None
        if part is not None:
            self._ahead.append(self._executor.submit(fill, part))

    def close(self) -> None:
        """End the threads; batches that are not begun are given up."""
        self._executor.shutdown(wait=True, cancel_futures=True)


@dataclass
class Pass:
    """A pass: what it is known by, and the parts that are left of it."""

    name: Any
    parts: Iterator[Part]


_LIVING: WeakSet[Processes] = WeakSet()


def _leave_to_the_parent() -> None:
    """In a process that was forked, leave the workers to its parent, which goes on with them."""
    for processes in _LIVING:
        processes._batches._shutdown = True


if hasattr(os, "register_at_fork"):  # where there is no fork, nothing is left to a parent
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class Processes:
    """Processes that fill batches ahead, the workers of torch's own DataLoader, for many passes.

    Each has a copy of the packs, from when it was started. What belongs to an epoch comes with each
    part, so that a later pass may be one through another epoch. They end when this object is gone,
    after an error, and at the interpreter's exit.

    Args:
        fill: makes a batch.
        num_workers: processes.
        prefetch: batches that each fills ahead.
        still_seconds: how long a process may stand still while it is waited for.
    """

    def __init__(
        self, fill: Fill, num_workers: int, prefetch: int, *, still_seconds: float = STILL_SECONDS
    ) -> None:
        import torch
        from torch.utils.data import DataLoader

        self._still_seconds = still_seconds
        self._parts = _PartsOfAPass()
        steps: Any = _Filled(fill)
        self._loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=None,  # a part is a whole batch already
            sampler=self._parts,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            pin_memory=fill.pin_memory,  # here, since a worker has no GPU
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else it draws a seed from the one that models use, too
            persistent_workers=True,
        )
        self._batches = cast(Any, iter(self._loader))  # starts them, with no part to fill yet
        self._wake = Finalize(self, _wake, [self._batches._workers], exitpriority=0)
        _LIVING.add(self)

    def can_go_on(self) -> bool:
        """Return whether a pass may begin: all processes live, and are this process's own."""
        if self._batches._shutdown:
            return False
        ended = [worker.pid for worker in self._batches._workers if not worker.is_alive()]
        if ended:
            log.warning("worker processes %s have ended between passes; others are started", ended)
        return not ended

    def batches(self, parts: Iterator[Part]) -> Iterator[Batch]:
        """Yield the batches of a pass in order; the pass before it is over then.

        Raises:
            RuntimeError: a process was killed, or stood still (see `packpipe.images.watch`).
        """
        waits_for: int | None = None  # number of the batch that is waited for
        still: list[Any] = []

        # A worker that has nothing to do looks every five seconds whether this process is alive, so
        # that only one that is stopped, or hangs, is not run at all.
        def progress() -> Progress:
            workers = [] if waits_for is None else self._batches._workers
            return {worker.pid: (waits_for, run_time(worker.pid)) for worker in workers}

        def end(process: Any) -> None:
            still.append(process)
            os.kill(process, signal.SIGKILL)  # torch notices it, and ends the wait

        self._parts.of_pass = parts
        watch = Watch(progress, end, self._still_seconds)
        try:
            waits_for = -1
            iter(self._loader)  # waits until every process has left the pass before
            for number in count():
                waits_for = number
                batch = next(self._batches, None)
                waits_for = None
                if batch is None:
                    return
                yield batch
        except GeneratorExit:  # the loop was left early; the next pass may begin
            raise
        except BaseException as error:
            self._end()
            if not still or not isinstance(error, RuntimeError):
                raise
            name = f"progress of worker process {still[0]}"
            found = f"none within {self._still_seconds:g} s"
            remedy = "look for what stopped it, or a file system that hangs; go on from the last "
            raise RuntimeError(checks.sentence(name, found, "some", remedy + "state")) from error
        finally:
            watch.close()

    def _end(self) -> None:
        """End the processes now, while a traceback may still refer to this object."""
        self._wake()
        self._batches._shutdown_workers()


def _wake(workers: list[Any]) -> None:
    """Let processes go on that are stopped.

    Else they would not heed that they are to end, nor let this process end, which waits for them.
    """
    for worker in workers:
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGCONT)


@dataclass
class _PartsOfAPass:
    """The sampler of a DataLoader: the parts of the pass that is begun next."""

    of_pass: Iterator[Part] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[Part]:
        parts, self.of_pass = self.of_pass, iter(())
        return parts


@dataclass(frozen=True)
class _Filled:
    """A dataset to torch, of batches by their parts, in ordinary memory."""

    fill: Fill

    def __getitem__(self, part: Part) -> Any:
        return self.fill.rows(part)


def as_it_is(batch: Any) -> Any:
    """Return the batch: a ``collate_fn`` of batches that are made already."""
    return batch
