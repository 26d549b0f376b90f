"""Checks a saved state of `OnlinePacker`, whose kernels do not check it again.

What passes keeps every invariant of a packer that has come there by itself, so it goes on by the
same rules: no pack grows beyond its limits and every example that waits comes out once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks
from packpipe.packing.limits import Limits

_MOST = 2**62  # of any number in a state: sums of two are within int64
_REMEDY = "pass a state_dict() as it was"


class OnlineState(NamedTuple):
    """The changing part of an `OnlinePacker`, in memory of its own.

    Attributes:
        counters: int64[3], packs opened, packs closed, and how many are closed when the oldest open
            one is to be looked at.
        rooms: uint32[open_packs], room of the pack at each place; 0 where none is open.
        table: int64[open_packs, 3], (free slots, number, packs closed when it was opened).
        waiting: int64[examples of open packs], their numbers in the stream.
        waiting_in: int64[examples of open packs], the number of each one's pack.
        num_examples, num_tokens: of the whole stream so far.
    """

    counters: NDArray[np.int64]
    rooms: NDArray[np.uint32]
    table: NDArray[np.int64]
    waiting: NDArray[np.int64]
    waiting_in: NDArray[np.int64]
    num_examples: int
    num_tokens: int


def checked_state(
    state: dict[str, Any], limits: Limits, open_packs: int, max_wait: int
) -> OnlineState:
    """Return a state if a packer with these options could go on from it.

    Raises:
        TypeError, ValueError: a field is missing, of another type or shape, or contradicts the
            others; the message names the field.
    """
    counters = _integers(state, "counters", (3,))
    rooms = _integers(state, "rooms", (open_packs,))
    table = _integers(state, "table", (open_packs, 3))
    waiting = _integers(state, "waiting", (None,))
    waiting_in = _integers(state, "waiting_in", waiting.shape)
    opened, closed, due = counters.tolist()
    # Places of the open packs, the first opened first.
    places = np.flatnonzero(rooms)
    if len(places) != opened - closed:
        name, expected = "np.count_nonzero(state['rooms'])", f"{opened - closed} (opened - closed)"
        raise ValueError(checks.sentence(name, len(places), expected, _REMEDY))
    places = places[np.argsort(table[places, 1], kind="stable")]
    slots, numbers, since = table[places].T
    # The packs opened before a pack were closed by then, or open beside it.
    most = np.minimum(since + open_packs, opened) - 1
    _within("table", numbers, np.maximum(_before(numbers, -1) + 1, since), most, places, "[1]")
    # A pack that waits for max_wait others is closed, and a later one is not opened before it.
    earliest = _before(since, max(0, closed - max_wait + 1))
    _within("table", since, earliest, closed, places, "[2]")
    latest = int(since[0]) if len(since) else closed
    _within("counters", due, max_wait, latest + max_wait, 2)

    num_waiting = len(waiting)
    low, high = closed + num_waiting, min(_MOST, closed * limits.slots + num_waiting)
    num_examples = _number(state, "num_examples", low, high)
    _within("waiting", waiting, _before(waiting, -1) + 1, num_examples - 1)
    rank = np.searchsorted(numbers, waiting_in)
    known = np.append(numbers, -1)
    _within("waiting_in", waiting_in, known[rank], known[rank])
    # Packs are opened one after the other, each by its first example.
    next_one = np.minimum(np.maximum.accumulate(_before(rank, -1)) + 1, len(numbers) - 1)
    _within("waiting_in", waiting_in, 0, known[next_one])
    held = np.bincount(rank, minlength=len(numbers))
    _within("table", slots, limits.slots - held, limits.slots - held, places, "[0]")
    _within("table", slots, 1, limits.slots - 1, places, "[0]")
    # Every example takes a token at least.
    _within("rooms", rooms[places], 1, limits.capacity - held, places)

    inside = int((limits.capacity - rooms[places]).sum())
    low, high = inside + num_examples - num_waiting, inside + closed * limits.capacity
    num_tokens = _number(state, "num_tokens", low, high)
    narrow = rooms.astype(np.uint32)
    return OnlineState(counters, narrow, table, waiting, waiting_in, num_examples, num_tokens)


def _integers(
    state: dict[str, Any], field: str, shape: tuple[int | None, ...]
) -> NDArray[np.int64]:
    """Return a field as an array of its own, of numbers in 0..2**62; None is any size."""
    name = _name(field)
    found = checks.integer_array(name, _value(state, field), len(shape), _REMEDY)
    if any(size not in (None, there) for size, there in zip(shape, found.shape, strict=True)):
        raise ValueError(checks.sentence(f"{name}.shape", found.shape, str(shape), _REMEDY))
    for place in np.argwhere((found < 0) | (found > _MOST)).tolist()[:1]:
        where = name + "".join(f"[{number}]" for number in place)
        value = int(found[tuple(place)])
        raise ValueError(checks.sentence(where, value, f"0..{_MOST}", _REMEDY))
    return found.astype(np.int64)


def _number(state: dict[str, Any], field: str, low: int, high: int) -> int:
    return checks.whole_number(_name(field), _value(state, field), low, high, _REMEDY)


def _value(state: dict[str, Any], field: str) -> Any:
    if field not in state:
        raise ValueError(checks.sentence(_name(field), "missing", "its numbers", _REMEDY))
    return state[field]


def _name(field: str) -> str:
    return f"state[{field!r}]"


def _before(values: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Return the value before each; for the first one, `first`."""
    return np.concatenate([[first], values])[: len(values)]


def _within(
    field: str,
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    places: ArrayLike | None = None,
    column: str = "",
) -> None:
    """Raise for the first value outside low..high; places and column say where it stands."""
    values, low, high = np.broadcast_arrays(np.atleast_1d(values), low, high)
    numbers = np.arange(len(values)) if places is None else np.atleast_1d(places)
    for bad in np.flatnonzero((values < low) | (values > high))[:1]:
        name = f"{_name(field)}[{numbers[bad]}]{column}"
        expected = str(low[bad]) if low[bad] == high[bad] else f"{low[bad]}..{high[bad]}"
        raise ValueError(checks.sentence(name, int(values[bad]), expected, _REMEDY))
