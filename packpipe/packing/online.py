"""`OnlinePacker`: packs a stream of lengths in bounded memory.

For sizes that are not known beforehand. A fixed number of packs is open. An example goes into an
open pack where it fits; if it fits nowhere, the fullest pack is closed and a new one opened.
The packs depend on the stream alone, not on how it is cut into calls.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from packpipe import checks
from packpipe.packing import lengths as fronts
from packpipe.packing import placement
from packpipe.packing.limits import Limits
from packpipe.packing.online_state import checked_state

STRATEGIES = ("best_fit", "first_fit")
MAX_OPEN_PACKS = 2**16
MAX_WAIT = 2**22
_VERSION = 1
_AT_ONCE = 2**16  # examples, so that the temporary arrays of a call stay in the cache
# Columns of the table of open packs, and of the counters.
_SLOTS, _NUMBER, _SINCE = range(3)
_OPENED, _CLOSED, _DUE = range(3)


@njit(cache=True)
def _close(place, rooms, table, counters, closed, num_closed):  # type: ignore[no-untyped-def]
    """Append the pack at a place to `closed` and free the place; return how many are closed."""
    rooms[place] = 0
    closed[num_closed] = table[place, _NUMBER]
    counters[_CLOSED] += 1
    return num_closed + 1


@njit(cache=True)
def _least_room(rooms, length):  # type: ignore[no-untyped-def]
    """Return (place, room - length) for the least room of at least length, if there is one.

    In unsigned numbers, room - length wraps around to a huge value where the room is too small.
    So a single minimum finds the place, and the compiler turns it into vector instructions; with
    a branch it does not, and takes three times as long.
    """
    least = np.uint32(0xFFFFFFFF)
    for place in range(rooms.shape[0]):
        least = min(least, np.uint32(rooms[place] - length))
    place = 0
    while np.uint32(rooms[place] - length) != least:
        place += 1
    return place, least


@njit(cache=True)
def stream(  # type: ignore[no-untyped-def]
    lengths, capacity, max_segments, max_wait, best, rooms, table, counters, numbers, closed
):
    """Put each length into an open pack; return how many packs were closed.

    Invariant: a place has room 0 if no pack is open there; an open pack has room and a free slot
    (a full one is closed at once), and fewer than max_wait packs were closed since it was opened.
    O(open packs) for each length.

    Args:
        lengths: int[examples].
        capacity: tokens a pack holds.
        max_segments: most examples a pack may hold.
        max_wait: an open pack is closed once this many others were closed since it was opened.
        best: True for best fit, False for first fit; ties go to the first place.
        rooms: uint32[open_packs], room of the pack at each place, changed.
        table: int64[open_packs, 3], (free slots, number, packs closed when opened), changed.
        counters: int64[3], changed: packs opened so far, packs closed so far, and the number of
            closed packs at which the oldest open one is to be looked at.
        numbers: int64[examples], written: the pack of each example.
        closed: int64[open_packs + 2 * examples], written: packs closed, in order.
    """
    num_closed = 0
    for i in range(lengths.shape[0]):
        length = np.uint32(lengths[i])
        if best:
            place, rest = _least_room(rooms, length)
            # A wrapped difference is above every capacity, since seq_len is at most 2**24.
            fits = rest <= np.uint32(capacity)
        else:
            place = 0
            while place < rooms.shape[0] and rooms[place] < length:
                place += 1
            fits = place < rooms.shape[0]
        if not fits:
            # The least room of all: 0 at a free place, or else that of the fullest pack.
            place, room = _least_room(rooms, np.uint32(0))
            if room:
                num_closed = _close(place, rooms, table, counters, closed, num_closed)
            rooms[place] = capacity
            table[place, _SLOTS] = max_segments
            table[place, _NUMBER] = counters[_OPENED]
            table[place, _SINCE] = counters[_CLOSED]
            counters[_OPENED] += 1
        numbers[i] = table[place, _NUMBER]
        rooms[place] -= length
        table[place, _SLOTS] -= 1
        if rooms[place] == 0 or table[place, _SLOTS] == 0:
            num_closed = _close(place, rooms, table, counters, closed, num_closed)
        # No open pack can be due before _DUE packs are closed, so the oldest, the one with the
        # smallest number, is looked for only then.
        while counters[_CLOSED] >= counters[_DUE]:
            oldest = -1
            for place in range(rooms.shape[0]):
                if rooms[place] and (oldest < 0 or table[place, _NUMBER] < table[oldest, _NUMBER]):
                    oldest = place
            counters[_DUE] = max_wait + (
                table[oldest, _SINCE] if oldest >= 0 else counters[_CLOSED]
            )
            if oldest >= 0 and counters[_CLOSED] >= counters[_DUE]:
                num_closed = _close(oldest, rooms, table, counters, closed, num_closed)
    return num_closed


class OnlinePacker:
    """Packs a stream of lengths: takes lengths and returns the packs that were closed.

    The packs do not depend on how the stream is cut into calls. Memory holds the examples of the
    open packs. A pack is closed at the latest when max_wait others were closed since it was opened,
    so at most max_wait + open_packs packs come out between an example's arrival and its pack.

    Args:
        seq_len: tokens a pack holds.
        strategy: "best_fit" (the open pack with the least room that suffices) or "first_fit" (the
            first open pack with room); ties go to the first place. If no pack has room and
            open_packs are open, the fullest is closed.
        open_packs: packs kept open, 1..65536; more pad less and take longer.
        max_segments: most examples a pack may hold; None for no limit.
        max_wait: a pack is closed at the latest when this many others were closed since it was
            opened, 1..2**22; packs that are due together are closed one after the other. None
            for 32 times open_packs.

    Raises:
        TypeError: a number is no integer.
        ValueError: an argument is out of range.

    >>> packer = OnlinePacker(8, open_packs=2)
    >>> order, offsets = packer.push([5, 4, 3, 6])
    >>> order.tolist(), offsets.tolist()
    ([0, 2], [0, 2])
    >>> order, offsets = packer.flush()
    >>> order.tolist(), offsets.tolist()
    ([1, 3], [0, 1, 2])

    Source: NaViT A.3, where sequences of a batch are filled as images come.
    """

    def __init__(
        self,
        seq_len: int,
        *,
        strategy: str = "best_fit",
        open_packs: int = 64,
        max_segments: int | None = None,
        max_wait: int | None = None,
    ) -> None:
        self._limits = Limits(seq_len, max_segments)
        self._strategy = checks.choice("strategy", strategy, STRATEGIES, "choose a packing rule")
        open_packs = checks.whole_number(
            "open_packs", open_packs, 1, MAX_OPEN_PACKS, "64 is usual; for more, use pack_lengths"
        )
        if max_wait is None:
            max_wait = 32 * open_packs
        self._max_wait = checks.whole_number(
            "max_wait", max_wait, 1, MAX_WAIT, "32 times open_packs costs next to nothing"
        )
        self._rooms = np.zeros(open_packs, np.uint32)
        self._table = np.zeros((open_packs, 3), np.int64)
        self._counters = np.array([0, 0, self._max_wait])
        # The examples of the open packs: their numbers in the stream, and their packs.
        self._waiting = np.empty(0, np.int64)
        self._waiting_in = np.empty(0, np.int64)
        self._num_examples = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        """Number of examples in open packs."""
        return len(self._waiting)

    @property
    def num_packs(self) -> int:
        """Packs closed so far."""
        return int(self._counters[_CLOSED])

    @property
    def fill(self) -> float:
        """Real tokens ÷ slots of the packs closed so far; 1.0 when there are none."""
        seq_len = self._limits.seq_len
        # Tokens of the open packs: what they hold is not counted yet.
        inside = np.count_nonzero(self._rooms) * seq_len - int(self._rooms.sum(dtype=np.int64))
        slots = self.num_packs * seq_len
        return (self._num_tokens - inside) / slots if slots else 1.0

    def push(self, lengths: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take lengths; return (order, offsets) of the packs that were closed.

        Args:
            lengths: int[examples], tokens per example, each in 1..seq_len; NumPy or Arrow.

        Returns:
            order: int64, examples pack by pack, numbered from the start of the stream, and
            offsets: int64[closed packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.

        Raises:
            TypeError: lengths hold no integers.
            ValueError: a length is null or outside 1..seq_len; then none of them is taken.
        """
        chunks = fronts.chunks_of(lengths)
        # All of them before the first is packed, so that an error changes nothing.
        fronts.check(chunks, self._limits.seq_len, self._limits.longest)
        self._num_tokens += sum(int(chunk.sum(dtype=np.int64)) for chunk in chunks)
        orders, ends = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for chunk in chunks:
            for start in range(0, len(chunk), _AT_ONCE):
                order, offsets = self._push_some(chunk[start : start + _AT_ONCE])
                orders.append(order)
                ends.append(offsets[1:] + ends[-1][-1])
        return np.concatenate(orders), np.concatenate(ends)

    def _push_some(self, lengths: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        numbers = np.empty(len(lengths), np.int64)
        # More than enough: a closed pack was open before, or one of the examples opened it.
        closed = np.empty(2 * len(lengths) + len(self._rooms), np.int64)
        num_closed = stream(
            fronts.kernel_view(lengths),
            self._limits.capacity,
            self._limits.slots,
            self._max_wait,
            self._strategy == "best_fit",
            self._rooms,
            self._table,
            self._counters,
            numbers,
            closed,
        )
        came = np.arange(self._num_examples, self._num_examples + len(lengths))
        self._num_examples += len(lengths)
        self._waiting = np.concatenate([self._waiting, came])
        self._waiting_in = np.concatenate([self._waiting_in, numbers])
        return self._hand_out(closed[:num_closed])

    def flush(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Close all open packs, the first opened first; return their (order, offsets)."""
        closed = np.sort(self._table[self._rooms > 0, _NUMBER])
        self._counters[_CLOSED] += len(closed)
        self._rooms[:] = 0
        return self._hand_out(closed)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain numbers, strings and lists, which JSON can hold."""
        return {
            **self._options(),
            "counters": self._counters.tolist(),
            "rooms": self._rooms.tolist(),
            "table": self._table.tolist(),
            "waiting": self._waiting.tolist(),
            "waiting_in": self._waiting_in.tolist(),
            "num_examples": self._num_examples,
            "num_tokens": self._num_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` of a packer with the same options returned.

        Raises:
            TypeError, ValueError: the state is no dict, of another version or of other options, or
                a field is missing, of another type, or contradicts the others. The message names
                the field; the packer is then unchanged.
        """
        if not isinstance(state, dict):
            kind = type(state).__name__
            raise TypeError(checks.sentence("state", kind, "a dict", "pass a state_dict()"))
        for name, value in self._options().items():
            found = state.get(name, "missing")
            # 8.0 and True are equal to integers and are none.
            if type(found) is not type(value) or found != value:
                remedy = "make the packer with the options of the state"
                raise ValueError(checks.sentence(name, found, repr(value), remedy))
        found = checked_state(state, self._limits, len(self._rooms), self._max_wait)
        self._counters, self._rooms, self._table = found.counters, found.rooms, found.table
        self._waiting, self._waiting_in = found.waiting, found.waiting_in
        self._num_examples, self._num_tokens = found.num_examples, found.num_tokens

    def _options(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "seq_len": self._limits.seq_len,
            "max_segments": self._limits.max_segments,
            "strategy": self._strategy,
            "open_packs": len(self._rooms),
            "max_wait": self._max_wait,
        }

    def _hand_out(self, closed: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Remove the examples of closed packs from those waiting; return (order, offsets)."""
        # Packs are numbered in order of opening. A table from the oldest pack that still holds
        # examples on says where each pack stands among the closed ones, or -1 if it is open.
        oldest = int(self._waiting_in.min(initial=int(self._counters[_OPENED])))
        place_of = np.full(int(self._counters[_OPENED]) - oldest, -1)
        place_of[closed - oldest] = np.arange(len(closed))
        places = place_of[self._waiting_in - oldest]
        leave = places >= 0
        leaving, places = self._waiting[leave], places[leave]
        self._waiting, self._waiting_in = self._waiting[~leave], self._waiting_in[~leave]
        offsets = np.zeros(len(closed) + 1, np.int64)
        np.cumsum(np.bincount(places, minlength=len(closed)), out=offsets[1:])
        order = np.empty(len(leaving), np.int64)
        # The kernel moves its offsets on, so it gets a copy.
        placement.group_by_pack(places, offsets[:-1].copy(), order)
        return leaving[order], offsets
