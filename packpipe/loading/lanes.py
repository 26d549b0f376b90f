"""Lanes: several places at which an epoch's windows are read at once, and who reads which.

The packs of all windows, one window after the other, are cut into as many equal runs as there are
lanes. Every step takes the next few packs of each lane, so that a global batch is those of lane 0,
then of lane 1, and so on. Ranks take equal parts of it. So the batches laid end to end are the same
for any number of ranks, and where that number divides the lanes, each rank reads windows of its
own, but for those that two lanes share: one for each lane after the first, at most.

A window is read when it will soon be needed, and dropped after its last pack. Which windows those
are is arithmetic, so that a pass begins anywhere without those before.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.loading.cursors import Share
from packpipe.loading.steps import even_places, num_steps
from packpipe.loading.workers import PackSource, Part
from packpipe.philox import Key
from packpipe.planning.block_windows import EpochWindows

log = logging.getLogger(__name__)

W = TypeVar("W")

# Windows that are read at once.
_READERS = 8


class WindowedPacks(PackSource, Protocol):
    """Packs that are planned window by window: `WindowPacks`."""

    @property
    def lanes(self) -> int:
        """How many lanes there are."""

    def windows(self, key: Key) -> EpochWindows:
        """Return the windows of an epoch."""

    def opened(self, key: Key, window: int) -> Any:
        """Return a window, planned and read."""

    def taken(self, key: Key, windows: list[tuple[Any, NDArray[np.int64]]]) -> Any:
        """Return packs as `rows` takes them, given some windows and the packs of each."""


class Step(NamedTuple):
    """What a rank takes at a step.

    Attributes:
        packs: int64[packs], their places among those of the epoch.
        places: int64[packs], their places in the rank's batch.
        windows: int64[packs], the window that each is in.
    """

    packs: NDArray[np.int64]
    places: NDArray[np.int64]
    windows: NDArray[np.int64]


def packs_of_step(
    step: int, num_packs: int, lanes: int, share: Share
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the packs that a rank takes at a step, and their places in its batch.

    Packs that do not fill a step are left over at the end of the last lane. The step after all full
    ones has them, spread evenly.

    Args:
        step: 0, 1, ...
        num_packs: packs of the epoch.
        lanes: how many lanes there are; they divide the global batch.
        share: what is the rank's.

    >>> [packs_of_step(step, 13, 2, Share(4, 0, 1))[0].tolist() for step in range(4)]
    [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12]]
    """
    size, full = share.global_batch, num_packs // share.global_batch
    if step < full:
        places = np.arange(share.own.start, share.own.stop)
        each = size // lanes
        packs = (places // each * full + step) * each + places % each
        return packs, places - share.own.start
    rest = num_packs - full * size
    places = even_places(rest, size)
    own = np.flatnonzero((places >= share.own.start) & (places < share.own.stop))
    return full * size + own, places[own] - share.own.start


def check_lanes(lanes: int, share: Share) -> None:
    """Raise ValueError if lanes do not divide the global batch."""
    size = share.global_batch
    if size % lanes:
        remedy = "choose another batch size, or fewer lanes"
        expected = f"a divisor of {size} (batch_size times world_size)"
        raise ValueError(checks.sentence("lanes", lanes, expected, remedy))


class LaneCursor:
    """Takes packs lane by lane, of windows that are read ahead: a `Cursor`.

    Args:
        packs: the packs.
        balance: must be False.
        tail: what happens to packs that do not fill the last step; see `num_steps`.

    Raises:
        ValueError: packs are to be balanced, for which all of them have to be known.
    """

    def __init__(self, packs: WindowedPacks, balance: bool, tail: str) -> None:
        if balance:
            remedy = "packs of like work are found among those of all windows: pass a Dataset"
            raise ValueError(checks.sentence("balance", balance, "False with windows", remedy))
        self._packs, self._tail = packs, tail
        self._has_warned = False

    def steps(self, key: Key, share: Share) -> int:
        """Return the number of steps of an epoch.

        Raises:
            ValueError: lanes do not divide the global batch.
        """
        check_lanes(self._packs.lanes, share)
        num_packs = self._packs.windows(key).num_packs
        return num_steps(num_packs, share.global_batch, self._tail)

    def beginning(self, key: Key) -> dict[str, Any]:
        """Return how many packs the epoch has."""
        return {"num_packs": self._packs.windows(key).num_packs}

    def parts(self, key: Key, share: Share, start: int) -> Iterator[Part]:
        """Yield the packs this rank takes at each step, and their places."""
        self._warn(share)
        num, windows = self.steps(key, share), self._packs.windows(key)
        lanes = self._packs.lanes

        def step_of(number: int) -> Step:
            packs, places = packs_of_step(number, windows.num_packs, lanes, share)
            return Step(packs, places, windows.window_of(packs))

        steps = map(step_of, range(start // share.global_batch, num))
        # Half of the steps that a lane spends in a window: by then half of the next one's time is
        # left to read it.
        ahead = windows.num_packs // len(windows.blocks) // (share.global_batch // lanes) // 2
        for step, opened in read_ahead(steps, lambda w: self._packs.opened(key, w), 1 + ahead):
            some = [
                (one, step.packs[step.windows == window] - windows.first_pack(window))
                for window, one in opened.items()
            ]
            yield Part(key, self._packs.taken(key, some), step.places)

    def _warn(self, share: Share) -> None:
        """Log once, by the first rank, that the source is read more than once an epoch."""
        lanes, ranks = self._packs.lanes, share.world_size
        if lanes % ranks and share.rank == 0 and not self._has_warned:
            self._has_warned = True
            text = "lanes is %d with %d ranks: %s, so that windows are read by several ranks each; "
            what = f"{ranks} does not divide {lanes}"
            log.warning(text + "pass lanes=%d, or a multiple", lanes, ranks, what, ranks)

    def check(self, state: dict[str, Any], key: Key, share: Share) -> int:  # noqa: ARG002
        """Return the number of packs of all steps."""
        return self.steps(key, share) * share.global_batch

    def load(self, state: dict[str, Any]) -> None:
        """Do nothing: packs are found by their numbers."""

    def state(self, taken: int) -> dict[str, Any]:  # noqa: ARG002
        """Return no entries: the number of packs taken is the whole place."""
        return {}

    def passed(self, taken: int) -> None:
        """Do nothing: a pass drops its windows itself."""


def read_ahead(
    steps: Iterator[Step], opened: Callable[[int], W], ahead: int
) -> Iterator[tuple[Step, dict[int, W]]]:
    """Yield steps, and the windows of each, in the order of its packs.

    Args:
        steps: in order.
        opened: returns a window; called in threads.
        ahead: how many steps before it is needed a window is opened.
    """
    waiting: deque[Step] = deque()
    reading: dict[int, Future[W]] = {}
    uses: Counter[int] = Counter()  # steps that wait for a window
    executor = ThreadPoolExecutor(_READERS, thread_name_prefix="packpipe-windows")

    def look(number: int) -> None:
        for step in islice(steps, number):
            for window in dict.fromkeys(step.windows.tolist()):
                uses[window] += 1
                if window not in reading:
                    reading[window] = executor.submit(opened, window)
            waiting.append(step)

    try:
        look(1 + ahead)
        while waiting:
            step = waiting.popleft()
            needed = list(dict.fromkeys(step.windows.tolist()))
            yield step, {window: reading[window].result() for window in needed}
            look(1)  # before windows are dropped, which it may need, too
            for window in needed:
                uses[window] -= 1
                if not uses[window]:
                    del uses[window], reading[window]
    finally:
        # Also when the loop is left early: what is being read is dropped when it comes.
        executor.shutdown(wait=False, cancel_futures=True)
