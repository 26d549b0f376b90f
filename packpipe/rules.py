"""Packing kernels: which pack every length goes to (floor 0).

A rule works on the histogram of lengths and returns *placements*, rows of

    (length, first pack, packs, examples a pack)

which read "put this many examples of this length into each of these packs". Examples of
one length are interchangeable, so the cost depends on the number of distinct lengths, not
of examples; `expand` then writes every example's place in one more pass. Each kernel has
a naive twin in tests/naive.py.

Compiled when first called (no cache on disk, hence nothing stale): about two seconds a process.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def _grown(rows):  # type: ignore[no-untyped-def]
    """Return rows with twice the capacity; a loop, since slices compile ten times slower."""
    larger = np.empty((2 * rows.shape[0], rows.shape[1]), rows.dtype)
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            larger[row, column] = rows[row, column]
    return larger


@njit
def _push(runs, num_runs, room, slots, packs):  # type: ignore[no-untyped-def]
    """Append a run, or widen the last one if it has the same room and slots."""
    if num_runs and runs[num_runs - 1, 0] == room and runs[num_runs - 1, 1] == slots:
        runs[num_runs - 1, 2] += packs
        return num_runs
    runs[num_runs, 0] = room
    runs[num_runs, 1] = slots
    runs[num_runs, 2] = packs
    return num_runs + 1


@njit
def first_fit_decreasing(counts, seq_len, max_segments):  # type: ignore[no-untyped-def]
    """Return (placements, how many, packs): exact first-fit-decreasing over a histogram.

    Invariant: `runs` lists the packs opened so far in order of creation as (room, free
    slots, how many packs). First fit serves equal lengths pack by pack, so a run of m packs
    takes q = min(room // length, slots) of them a pack until they are spent: only the last
    run served is split. Packs nothing can enter any more are closed (room 0, slots 0), so
    that neighbours merge and the list stays short (3 to 1,500 runs for seq_len up to 2048).

    O(distinct lengths * runs), whatever the number of examples.

    Args:
        counts: int64[seq_len + 1], examples of each length; counts[0] is not read.
        seq_len: tokens a pack holds.
        max_segments: most examples a pack may hold.
    """
    shortest = 1
    while shortest <= seq_len and counts[shortest] == 0:
        shortest += 1
    runs = np.empty((64, 3), np.int64)
    served = np.empty((64, 3), np.int64)
    num_runs = 0
    placements = np.empty((256, 4), np.int64)
    num_placements = 0
    num_packs = 0

    for length in range(seq_len, shortest - 1, -1):
        left = counts[length]
        if left == 0:
            continue
        # A run at the end stands for the packs this length would have to open.
        while num_runs + 4 > runs.shape[0]:
            runs = _grown(runs)
        per_pack = min(seq_len // length, max_segments)
        runs[num_runs, 0] = seq_len
        runs[num_runs, 1] = max_segments
        runs[num_runs, 2] = -(-left // per_pack)
        while served.shape[0] < runs.shape[0]:
            served = _grown(served)
        num_served = 0
        first = 0
        run = 0
        while run < num_runs or (run == num_runs and left):
            room, slots, packs = runs[run, 0], runs[run, 1], runs[run, 2]
            per_pack = min(room // length, slots, left)
            if per_pack == 0:
                num_served = _push(served, num_served, room, slots, packs)
                first += packs
                run += 1
                continue
            # Of this run, as many packs as take per_pack each; what remains is looked at again.
            filled = min(packs, left // per_pack)
            while num_placements >= placements.shape[0]:
                placements = _grown(placements)
            placements[num_placements, 0] = length
            placements[num_placements, 1] = first
            placements[num_placements, 2] = filled
            placements[num_placements, 3] = per_pack
            num_placements += 1
            left -= filled * per_pack
            room_after = room - per_pack * length
            slots_after = slots - per_pack
            if room_after < shortest or slots_after == 0:
                room_after = 0
                slots_after = 0
            num_served = _push(served, num_served, room_after, slots_after, filled)
            first += filled
            runs[run, 2] -= filled
            if runs[run, 2] == 0:
                run += 1
        num_packs = first
        runs, served = served, runs
        num_runs = num_served
    return placements, num_placements, num_packs


@njit
def expand(lengths, counts, placements, num_packs, longest_first):  # type: ignore[no-untyped-def]
    """Return (order, offsets): the examples of pack p are order[offsets[p]:offsets[p + 1]].

    Placements must list lengths longest first and, for one length, packs in rising order;
    then examples of one length fill them by position, and within a pack the longest stands
    first. A stable counting sort, then one gather: O(examples + packs).

    Args:
        lengths: int32[examples].
        counts: int64[seq_len + 1], their histogram.
        placements: int64[placements, 4], as a rule returns them.
        num_packs: packs those use.
        longest_first: int[examples], written over: as narrow as can be, since the sort is bound
            by memory (int32 in place of int64 took 15 % off the whole packer).
    """
    next_place = np.empty(counts.shape[0], np.int64)
    place = 0
    for length in range(counts.shape[0] - 1, -1, -1):
        next_place[length] = place
        place += counts[length]
    for i in range(lengths.shape[0]):
        length = lengths[i]
        longest_first[next_place[length]] = i
        next_place[length] += 1

    offsets = np.zeros(num_packs + 1, np.int64)
    for row in range(placements.shape[0]):
        for pack in range(placements[row, 1], placements[row, 1] + placements[row, 2]):
            offsets[pack + 1] += placements[row, 3]
    for pack in range(num_packs):
        offsets[pack + 1] += offsets[pack]

    order = np.empty(lengths.shape[0], np.int64)
    cursor = offsets[:-1].copy()
    i = 0
    for row in range(placements.shape[0]):
        for pack in range(placements[row, 1], placements[row, 1] + placements[row, 2]):
            for _ in range(placements[row, 3]):
                order[cursor[pack]] = longest_first[i]
                cursor[pack] += 1
                i += 1
    return order, offsets


@njit
def next_fit(lengths, seq_len, max_segments):  # type: ignore[no-untyped-def]
    """Return offsets of the packs when examples are taken as they come, one pack open.

    Invariant: `room` and `slots` are what the last pack has left. O(examples).
    """
    offsets = np.empty(lengths.shape[0] + 1, np.int64)
    num_packs = 0
    room = 0
    slots = 0
    for i in range(lengths.shape[0]):
        if lengths[i] > room or slots == 0:
            offsets[num_packs] = i
            num_packs += 1
            room = seq_len
            slots = max_segments
        room -= lengths[i]
        slots -= 1
    offsets[num_packs] = lengths.shape[0]
    return offsets[: num_packs + 1].copy()
