"""The place of a loader in its packs: what each step takes, and how a state is continued.

Packs are either planned, so that the numbers of an epoch's packs are known (`EpochCursor`), or they
come from a stream one after the other (`StreamCursor`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.loading.reading import Anchor, Reading
from packpipe.loading.steps import NO_PACK, even_places, num_steps, step_packs
from packpipe.loading.workers import PackSource, Part
from packpipe.philox import Key


class PlannedPacks(PackSource, Protocol):
    """Packs of an epoch whose number is known: `StoredPacks`, `StoredPairs`, `EpochPacks`.

    A pack is named by its place in the epoch's order.
    """

    def num_packs(self, key: Key) -> int:
        """Return the number of packs of an epoch."""

    def work(self, key: Key) -> NDArray[np.int64]:
        """Return int64[packs], the attention work of each."""


class StreamedPacks(PackSource, Protocol):
    """Packs of a stream, which come one after the other: `PackedStream`."""

    def stream_packs(self, key: Key, state: dict[str, Any] | None, num_packs: int) -> Reading:
        """Return an epoch's packs without the first num_packs; reading begins at state."""

    def check_resumable(self) -> None:
        """Raise ValueError if the stream cannot continue where it stopped."""


class Share(NamedTuple):
    """The part of every step that a rank takes: batch_size of the packs of all ranks."""

    batch_size: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Packs of a step, over all ranks."""
        return self.batch_size * self.world_size

    @property
    def own(self) -> slice:
        """Places of this rank's packs among those of a step."""
        return slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)


def checked_place(rank: Any, world_size: Any) -> tuple[int, int] | None:
    """Return (rank, world_size); None if neither is given.

    Raises:
        TypeError, ValueError: one alone is given, or there is no such rank.
    """
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        found, expected = (rank, world_size), "both or neither"
        raise ValueError(checks.sentence("(rank, world_size)", found, expected, "pass both"))
    world_size = checks.whole_number("world_size", world_size, 1, 2**31, "pass the ranks")
    return checks.whole_number("rank", rank, 0, world_size - 1, "ranks count from 0"), world_size


class Cursor(Protocol):
    """A loader's place in its packs, planned (`EpochCursor`) or streamed (`StreamCursor`)."""

    def steps(self, key: Key, share: Share) -> int | None:
        """Return the number of steps of an epoch; None if it is unknown until the end."""

    def beginning(self, key: Key) -> dict[str, Any]:
        """Return what a pass begins with, besides its key: the same on every rank."""

    def parts(self, key: Key, share: Share, start: int) -> Iterator[Part]:
        """Yield the packs of this rank, step by step, after the first start packs of all ranks."""

    def check(self, state: dict[str, Any], key: Key, share: Share) -> int:
        """Return how many packs a state of this epoch can have taken at most.

        Raises:
            ValueError: the state cannot be continued.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Move to the place of a checked state; an empty state is the beginning of an epoch."""

    def state(self, taken: int) -> dict[str, Any]:
        """Return the entries of a state besides the number of packs taken."""

    def passed(self, taken: int) -> None:
        """Free what is not needed any more once this many packs are taken."""


class EpochCursor:
    """Computes the steps of planned packs from their numbers.

    Args:
        packs: the packs.
        balance: whether packs of like attention work go into the same step.
        tail: what happens to packs that do not fill the last step; see `num_steps`.
    """

    def __init__(self, packs: PlannedPacks, balance: bool, tail: str) -> None:
        self._packs, self._balance, self._tail = packs, balance, tail

    def steps(self, key: Key, share: Share) -> int:
        """Return the number of steps of an epoch."""
        return num_steps(self._packs.num_packs(key), share.global_batch, self._tail)

    def beginning(self, key: Key) -> dict[str, Any]:
        """Return how many packs the epoch has."""
        return {"num_packs": self._packs.num_packs(key)}

    def parts(self, key: Key, share: Share, start: int) -> Iterator[Part]:
        """Yield the packs this rank takes at each step, and their places."""
        work = self._packs.work(key) if self._balance else None
        num_packs = self._packs.num_packs(key)
        steps = step_packs(num_packs, work, share.global_batch, self._tail, key)
        # Where packs can be planned here, other processes need no plan of their own to fill them.
        planned = getattr(self._packs, "planned", lambda _, numbers: numbers)
        # The steps of an epoch are one array of numbers, so continuing is a slice of it.
        for packs in steps[start // share.global_batch :, share.own]:
            there = np.flatnonzero(packs != NO_PACK)
            yield Part(key, planned(key, packs[there]), there)

    def check(self, state: dict[str, Any], key: Key, share: Share) -> int:  # noqa: ARG002
        """Return the number of packs of all steps."""
        return self.steps(key, share) * share.global_batch

    def load(self, state: dict[str, Any]) -> None:
        """Do nothing: planned packs are found by their numbers."""

    def state(self, taken: int) -> dict[str, Any]:  # noqa: ARG002
        """Return no entries: the number of packs taken is the whole place."""
        return {}

    def passed(self, taken: int) -> None:
        """Do nothing: planned packs hold no places."""


class StreamCursor:
    """Takes the next packs of a stream at each step.

    Args:
        packs: the stream.
        tail: what happens to packs that do not fill the last step; see `num_steps`.
    """

    def __init__(self, packs: StreamedPacks, tail: str) -> None:
        self._packs, self._tail = packs, tail
        self._from: dict[str, Any] | None = None  # where the next pass begins to read
        self._reading: Reading | None = None

    def steps(self, key: Key, share: Share) -> None:  # noqa: ARG002
        """Return None: the length of a stream is unknown."""
        return

    def beginning(self, key: Key) -> dict[str, Any]:  # noqa: ARG002
        """Return the place to read from."""
        return {"stream": self._from or Anchor(0, 0, None)._asdict()}

    def parts(self, key: Key, share: Share, start: int) -> Iterator[Part]:
        """Yield the packs this rank takes at each step, as they come, and their places."""
        self._reading = self._packs.stream_packs(key, self._from, start)
        packs, size = iter(self._reading), share.global_batch
        # Every rank takes the packs of all ranks and keeps its own, so ranks need not communicate.
        is_first = start == 0
        while some := list(islice(packs, size)):
            if len(some) < size and self._tail == "drop" and not is_first:
                return
            # Raises where a tail is an error, or where there is nothing but one that is dropped.
            num_steps(len(some), size, self._tail)
            is_first = False
            places = even_places(len(some), size) if len(some) < size else np.arange(size)
            own = np.flatnonzero((places >= share.own.start) & (places < share.own.stop))
            yield Part(key, [some[place] for place in own], places[own] - share.own.start)

    def check(self, state: dict[str, Any], key: Key, share: Share) -> int:  # noqa: ARG002
        """Return the largest allowed number, since the length of a stream is unknown.

        Raises:
            ValueError: the stream shuffles in a buffer, or the state is not that of a stream.
        """
        self._packs.check_resumable()
        stream, num_packs = state.get("stream"), state.get("packs")
        try:
            found = None if stream is None else Anchor(**stream)
        except TypeError:  # other fields than an anchor's; -1 is refused below, by name
            found = Anchor(-1, -1, None)
        if found is not None:
            remedy = "pass what state_dict returned"
            most = num_packs if isinstance(num_packs, int) else 0
            name = "state['stream']['num_packs']"
            checks.whole_number(name, found.num_packs, 0, most, remedy)
            name = "state['stream']['num_examples']"
            checks.whole_number(name, found.num_examples, 0, 2**62, remedy)
            name = "state['stream']['num_bad']"
            checks.whole_number(name, found.num_bad, 0, found.num_examples, remedy)
            name = "state['stream']['bad_in_a_row']"
            checks.whole_number(name, found.bad_in_a_row, 0, found.num_bad, remedy)
        return checks.MAX_WORD

    def load(self, state: dict[str, Any]) -> None:
        """Begin the next pass at the place of a state."""
        self._from, self._reading = state.get("stream"), None

    def state(self, taken: int) -> dict[str, Any]:
        """Return the place to read from to continue after some packs."""
        return {"stream": self._from if self._reading is None else self._reading.state(taken)}

    def passed(self, taken: int) -> None:
        """Free the places before the one to continue from."""
        if self._reading is not None:
            self._reading.forget(taken)
