"""More slow twins, with the rules of naive.py: streams, two limits, steps of equal work."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from naive import random_word, seeded_order


def online(
    lengths: Sequence[int],
    seq_len: int,
    *,
    strategy: str = "best_fit",
    open_packs: int = 64,
    max_segments: int | None = None,
    max_wait: int | None = None,
    state: dict[str, Any] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """(packs in the order they are closed, packs left open in the order they were opened).

    With a state of `OnlinePacker`, the stream goes on from there.
    """
    max_wait = 32 * open_packs if max_wait is None else max_wait
    places: list[list[int]] = [[] for _ in range(open_packs)]
    rooms = [seq_len] * open_packs
    closed_before = [0] * open_packs  # packs closed when the one at this place was opened
    came, closed_already = 0, 0
    if state is not None:
        came, closed_already = state["num_examples"], state["counters"][1]
        for place, room in enumerate(state["rooms"]):
            if room:
                rooms[place], (_, number, closed_before[place]) = room, state["table"][place]
                waiting = zip(state["waiting"], state["waiting_in"], strict=True)
                places[place] = [i for i, pack in waiting if pack == number]
    closed: list[list[int]] = []

    def close(place: int) -> None:
        closed.append(places[place])
        places[place], rooms[place] = [], seq_len

    for i, length in enumerate(lengths, came):
        fitting = [place for place, pack in enumerate(places) if pack and rooms[place] >= length]
        free = [place for place, pack in enumerate(places) if not pack]
        if fitting:
            place = min(fitting, key=rooms.__getitem__) if strategy == "best_fit" else fitting[0]
        else:
            if free:
                place = free[0]
            else:
                place = min(range(open_packs), key=rooms.__getitem__)
                close(place)
            closed_before[place] = closed_already + len(closed)
        places[place].append(i)
        rooms[place] -= length
        if rooms[place] == 0 or len(places[place]) == max_segments:
            close(place)
        while overdue := [
            place
            for place, pack in enumerate(places)
            if pack and closed_already + len(closed) - closed_before[place] >= max_wait
        ]:
            close(min(overdue, key=lambda place: places[place][0]))
    return closed, sorted(pack for pack in places if pack)


def two_limits(
    lengths: Sequence[int],
    costs: Sequence[int],
    seq_len: int,
    limit: int,
    strategy: str,
    max_segments: int | None = None,
) -> list[list[int]]:
    """Each example, the largest share of either limit first, into a pack with room for both."""

    def turn(i: int) -> tuple[int, int, int]:
        return -max(lengths[i] * limit, costs[i] * seq_len), -lengths[i], i

    packs: list[list[int]] = []
    rooms: list[int] = []
    purses: list[int] = []
    for i in sorted(range(len(lengths)), key=turn):
        fitting = [
            p
            for p, pack in enumerate(packs)
            if rooms[p] >= lengths[i] and purses[p] >= costs[i] and len(pack) != max_segments
        ]
        if not fitting:
            packs.append([])
            rooms.append(seq_len)
            purses.append(limit)
            p = len(packs) - 1
        elif strategy == "ffd":
            p = fitting[0]
        else:
            p = min(fitting, key=lambda p: (rooms[p], -purses[p], p))
        packs[p].append(i)
        rooms[p] -= lengths[i]
        purses[p] -= costs[i]
    return packs


def fewest_packs(lengths: Sequence[int], costs: Sequence[int], seq_len: int, limit: int) -> int:
    """The fewest packs under two limits, by trying every assignment; for seven examples or so."""

    def fewest(i: int, packs: list[tuple[int, int]]) -> int:
        if i == len(lengths):
            return len(packs)
        best = fewest(i + 1, [*packs, (lengths[i], costs[i])])
        for p, (used, spent) in enumerate(packs):
            if used + lengths[i] <= seq_len and spent + costs[i] <= limit:
                more = (used + lengths[i], spent + costs[i])
                best = min(best, fewest(i + 1, [*packs[:p], more, *packs[p + 1 :]]))
        return best

    return fewest(0, [])


def balanced_steps(
    work: Sequence[int], ranks: int, window: int, seed: int, epoch: int, *, shuffle: bool = True
) -> list[list[int]]:
    """The packs of each step: shuffled or not, sorted by work in each window, steps shuffled again.

    Stream 4 orders packs, stream 5 steps; a short step stays the last.
    """
    shuffled = seeded_order(seed, epoch, range(len(work)), 4) if shuffle else [*range(len(work))]
    while window % ranks:
        window += 1
    steps: list[list[int]] = []
    for start in range(0, len(work), window):
        some = shuffled[start : start + window]
        by_work = sorted(some, key=lambda pack: work[pack])  # sorted() is stable
        here = []
        for first in range(0, len(some), ranks):
            here.append(sorted(by_work[first : first + ranks], key=shuffled.index))
        words = [random_word(seed, epoch, len(steps) + k, 5) for k in range(len(here))]
        full = [k for k, step in enumerate(here) if len(step) == ranks]
        short = [k for k, step in enumerate(here) if len(step) < ranks]
        steps += [here[k] for k in sorted(full, key=lambda k: words[k]) + short]
    return steps


def waiting(work: Sequence[int], order: Sequence[int], ranks: int) -> Fraction:
    """Σ heaviest ÷ Σ mean over the full steps of an order, - 1."""
    heaviest, mean = Fraction(0), Fraction(0)
    for first in range(0, len(order) - ranks + 1, ranks):
        loads = [work[pack] for pack in order[first : first + ranks]]
        heaviest += max(loads)
        mean += Fraction(sum(loads), ranks)
    return heaviest / mean - 1 if mean else Fraction(0)
