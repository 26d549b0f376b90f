"""Packing kernels on a histogram, longest example first: what every pack holds.

Examples of one length are interchangeable, so a rule works on counts and its cost depends on
the number of distinct lengths, not of examples. Packs that took the same examples so far are kept
together as a *group*. A rule returns

* steps, int64[steps, 3]: (length, copies, the step before or -1): after the step before, each
  pack of the group took `copies` examples of this length;
* groups, int64[groups, 3]: (first pack, packs, last step). Packs are numbered in order of
  creation and every pack is in one group.

From a group's last step backwards, the steps say what its packs hold; `contents` lists it.
Each kernel has a naive twin in tests/naive.py.

Kernels are compiled on first use and kept in ``__pycache__``. Numba compiles again when a kernel's
own file has changed, but does not follow calls into other files: so a kernel calls kernels of
its own file only.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Columns of the table of runs (or groups) while a rule works. Tables are made with NumPy and passed
# in: kernels that allocate their own took 8 s to compile in all, these take 4 to 5.
_ROOM, _SLOTS, _FIRST, _PACKS, _LAST, _BELOW = range(6)


@njit(cache=True)
def _copy(table, source, target):  # type: ignore[no-untyped-def]
    """Copy a row of a table."""
    # Number by number: array slices made compiling the kernels that use them six times as slow.
    for column in range(table.shape[1]):
        table[target, column] = table[source, column]


@njit(cache=True)
def _serve(table, group, length, per_pack, shortest, steps, num_steps):  # type: ignore[no-untyped-def]
    """Put per_pack examples into each pack of a group, and record the step.

    A group that no later example can enter gets room 0.
    """
    steps[num_steps, 0] = length
    steps[num_steps, 1] = per_pack
    steps[num_steps, 2] = table[group, _LAST]
    table[group, _LAST] = num_steps
    table[group, _SLOTS] -= per_pack
    # Every later example has at least `shortest` tokens, so less room than that is of no use.
    room = table[group, _ROOM] - per_pack * length
    table[group, _ROOM] = room if room >= shortest and table[group, _SLOTS] else 0


@njit(cache=True)
def _open(table, group, room, slots, first, packs):  # type: ignore[no-untyped-def]
    """Make a row of the table a group of empty packs."""
    table[group, _ROOM] = room
    table[group, _SLOTS] = slots
    table[group, _FIRST] = first
    table[group, _PACKS] = packs
    table[group, _LAST] = -1


@njit(cache=True)
def _sum_up(places, place, runs, start, num_runs):  # type: ignore[no-untyped-def]
    """Store a block's number of runs and the most room among them."""
    places[place, 1] = num_runs
    places[place, 2] = 0
    for row in range(start, start + num_runs):
        places[place, 2] = max(places[place, 2], runs[row, _ROOM])


@njit(cache=True)
def _first_fit_decreasing(  # type: ignore[no-untyped-def]
    counts, shortest, max_segments, block_size, runs, places, steps
):
    """Fill runs, places and steps; return (steps, blocks) used, or (-1, -1) if a table is full.

    The tables are int64: runs [blocks * block_size, 5], places [blocks, 3] of (block, runs in it,
    most room) in order of creation, steps [steps, 3].
    """
    capacity = counts.shape[0] - 1
    num_blocks = 0
    num_steps = 0
    num_packs = 0

    for length in range(capacity, shortest - 1, -1):
        left = counts[length]
        place = 0
        while left:
            while place < num_blocks and places[place, 2] < length:
                place += 1
            # Checked once a visit: it adds at most a step for each run, and at most two blocks.
            if num_steps + block_size > steps.shape[0] or num_blocks + 2 > places.shape[0]:
                return -1, -1
            if place == num_blocks:
                # Nothing open has room: a run of new packs, at the end of the last block.
                if num_blocks == 0 or places[place - 1, 1] > block_size - 3:
                    places[place, 0] = num_blocks
                    places[place, 1] = 0
                    num_blocks += 1
                else:
                    place -= 1
                # Enough new packs for all that is left, each filled with as many as it takes.
                packs = -(-left // min(capacity // length, max_segments))
                row = places[place, 0] * block_size + places[place, 1]
                _open(runs, row, capacity, max_segments, num_packs, packs)
                places[place, 1] += 1
                num_packs += packs
            start = places[place, 0] * block_size
            stop = start + places[place, 1]
            row = start
            while left and row < stop:
                if runs[row, _ROOM] >= length:
                    per_pack = min(runs[row, _ROOM] // length, runs[row, _SLOTS], left)
                    served = min(runs[row, _PACKS], left // per_pack)
                    if served < runs[row, _PACKS]:
                        # A part of the run is served: split it. The served packs come first, since
                        # first fit takes packs in order of creation.
                        for other in range(stop, row, -1):
                            _copy(runs, other - 1, other)
                        stop += 1
                        runs[row + 1, _FIRST] += served
                        runs[row + 1, _PACKS] -= served
                        runs[row, _PACKS] = served
                    _serve(runs, row, length, per_pack, shortest, steps, num_steps)
                    num_steps += 1
                    left -= served * per_pack
                row += 1
            if stop - start > block_size - 3:  # one visit adds two runs at most, a new one a third
                # Split the block. Runs move to a new block; `places` keeps the order of creation.
                half = start + (stop - start) // 2
                for other in range(num_blocks, place + 1, -1):
                    _copy(places, other - 1, other)
                for i in range(stop - half):
                    _copy(runs, half + i, num_blocks * block_size + i)
                places[place + 1, 0] = num_blocks
                _sum_up(places, place + 1, runs, num_blocks * block_size, stop - half)
                num_blocks += 1
                stop = half
            _sum_up(places, place, runs, start, stop - start)
    return num_steps, num_blocks


def first_fit_decreasing(
    counts: NDArray[np.int64], max_segments: int, block_size: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (steps, groups): each example, longest first, into the first pack with room.

    Invariant: the packs opened so far are runs of equal history, in order of creation. First fit
    fills packs one by one, so each pack of a run takes q = min(room // length, free slots)
    examples until none of this length is left: only the last run served is split.

    Many distinct lengths leave many runs (tens of thousands for a capacity of 131072), so runs
    are kept in blocks that store the most room among them, and a block without room is skipped in
    one step. A full block is split in two; `places` lists the blocks in order of creation.

    O(distinct lengths * runs / block_size + steps * block_size), whatever the number of
    examples. Runs with equal room but different histories are not merged: merging leaves fewer
    runs to visit, but took 13 ms instead of 5 on chat-like lengths.

    Args:
        counts: int64[capacity + 1], examples of each length; counts[0] is not read.
        max_segments: most examples a pack may hold.
        block_size: runs in a block, 4 or more; affects speed only. None: √capacity / 2, at least
            32. Of 16 to 362 that was the fastest for a capacity of 4096 and 16384, within 0.1 ms
            of the fastest for 512, and within the noise for 131072 (145 to 278 ms).
    """
    if block_size is None:
        block_size = max(32, math.isqrt(len(counts)) // 2)
    distinct = np.flatnonzero(counts)
    # A guess. If a table is too small, the kernel starts again with tables twice as large.
    num_blocks, num_steps = 16 + 4 * len(distinct) // block_size, 8 * len(distinct) + 8 * block_size
    while True:
        runs = np.empty((num_blocks * block_size, 5), np.int64)
        places = np.empty((num_blocks, 3), np.int64)
        steps = np.empty((num_steps, 3), np.int64)
        used, blocks = _first_fit_decreasing(
            counts, int(distinct[0]), max_segments, block_size, runs, places, steps
        )
        if used >= 0:
            break
        num_blocks, num_steps = 2 * num_blocks, 2 * num_steps
    sizes = places[:blocks, 1]
    # The rows of the runs in order of creation, without the unused rows at the end of each block.
    starts = places[:blocks, 0] * block_size - (np.cumsum(sizes) - sizes)
    rows = np.repeat(starts, sizes) + np.arange(sizes.sum())
    return steps[:used], runs[rows, _FIRST:]


@njit(cache=True)
def _mark(tree, leaf, on):  # type: ignore[no-untyped-def]
    """Switch a leaf of a binary tree on or off; an inner node is on if a leaf below it is."""
    # Stored as a heap: the root is 1, node n has the children 2n and 2n + 1, leaves fill the end.
    node = leaf + tree.shape[0] // 2
    tree[node] = on
    while node > 1:
        node //= 2
        tree[node] = tree[2 * node] or tree[2 * node + 1]


@njit(cache=True)
def _nearest(tree, leaf, side):  # type: ignore[no-untyped-def]
    """Return the nearest leaf that is on: this one, or to its right (side 1) or left (0); or -1."""
    size = tree.shape[0] // 2
    node = leaf + size
    if tree[node]:
        return leaf
    # Up, until the sibling (node ^ 1) lies on the wanted side and has a leaf that is on.
    while node > 1 and (node % 2 == side or not tree[node ^ 1]):
        node //= 2
    if node == 1:
        return -1
    node ^= 1
    # Down, by the child that is nearer to where the search began, if it is on.
    while node < size:
        node = 2 * node + 1 - side
        if not tree[node]:
            node ^= 1
    return node - size


@njit(cache=True)
def _shelve(table, group, shelves, tree):  # type: ignore[no-untyped-def]
    """Put a group on top of the stack (shelf) of groups with the same room."""
    room = table[group, _ROOM]
    if shelves[room] < 0:
        _mark(tree, room, True)
    table[group, _BELOW] = shelves[room]
    shelves[room] = group


@njit(cache=True)
def _shelved(  # type: ignore[no-untyped-def]
    counts, shortest, max_segments, tight_below, num_packs, table, steps, shelves, tree
):
    """Fill table [groups, 6] and steps [steps, 3], int64; return (steps, groups) used.

    (0, 0) if num_packs packs are too few, (-1, -1) if a table is full. At the start shelves,
    int64[capacity + 1], are all -1 and tree, bool[2 * leaves], is all False.
    """
    capacity = counts.shape[0] - 1
    num_groups = 0
    num_steps = 0
    fixed = num_packs > 0
    if fixed:
        _open(table, 0, capacity, max_segments, 0, num_packs)
        _shelve(table, 0, shelves, tree)
        num_groups = 1

    for length in range(capacity, shortest - 1, -1):
        left = counts[length]
        highest = capacity
        most_room = length >= tight_below
        while left:
            if num_steps == steps.shape[0] or num_groups == table.shape[0]:
                return -1, -1
            # Serving only lowers room, so no shelf above `highest` holds a group any more.
            room = _nearest(tree, highest, 0) if most_room else _nearest(tree, length, 1)
            if room < length:
                if fixed:
                    return 0, 0
                # By most room, a new pack takes one example of this length and no second one.
                per_pack = 1 if most_room else min(capacity // length, max_segments)
                packs = -(-left // per_pack)
                _open(table, num_groups, capacity, max_segments, num_packs, packs)
                _shelve(table, num_groups, shelves, tree)
                num_groups += 1
                num_packs += packs
                highest = capacity
                continue
            group = shelves[room]
            most = 1 if most_room else room // length
            per_pack = min(most, table[group, _SLOTS], left)
            served = min(table[group, _PACKS], left // per_pack)
            if served < table[group, _PACKS]:
                # A part is served: it becomes a new group, and the rest stays on its shelf.
                rest = group
                group = num_groups
                num_groups += 1
                _copy(table, rest, group)
                table[group, _PACKS] = served
                table[rest, _FIRST] += served
                table[rest, _PACKS] -= served
            else:
                shelves[room] = table[group, _BELOW]
                if shelves[room] < 0:
                    _mark(tree, room, False)
            _serve(table, group, length, per_pack, shortest, steps, num_steps)
            num_steps += 1
            left -= served * per_pack
            highest = room
            if table[group, _ROOM]:
                _shelve(table, group, shelves, tree)
    return num_steps, num_groups


def shelved(
    counts: NDArray[np.int64], max_segments: int, *, tight_below: int, num_packs: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (steps, groups): each example, longest first, into a pack chosen by its room.

    Open groups with the same room are on one stack, a *shelf*, the last one changed on top (which
    decides ties); a tree over the shelves finds the next one in O(log capacity). There are two
    rules, the first for lengths of tight_below and more, the second for shorter ones:

    * most room (SPFHP): each pack of a group takes one example, then the next shelf below is
      tried, so that packs opened for a length take no second example of it;
    * least room that suffices (best fit, LPFHP): each pack of a group takes as many as fit, since
      after the first example it is the tightest.

    With num_packs, that many packs are open from the start and no more are opened (balanced
    loads). O((distinct lengths + steps) * log(capacity)).

    Args:
        counts: int64[capacity + 1], examples of each length; counts[0] is not read.
        max_segments: most examples a pack may hold.
        tight_below: lengths below it go by least room: 0 for none, capacity + 1 for all.
        num_packs: number of packs, or 0 to open them as needed.

    Returns:
        Steps and groups as described at the top of the file; no groups if num_packs are too few.

    Source: Krell 3.1 and its packedBERT code.
    """
    distinct = np.flatnonzero(counts)
    size = 8 * len(distinct) + 256
    while True:
        table = np.empty((size, 6), np.int64)
        steps = np.empty((size, 3), np.int64)
        shelves = np.full(len(counts), -1)
        tree = np.zeros(2 << (len(counts) - 1).bit_length(), np.bool_)
        used, groups = _shelved(
            counts,
            int(distinct[0]),
            max_segments,
            tight_below,
            num_packs,
            table,
            steps,
            shelves,
            tree,
        )
        if used >= 0:
            break
        size *= 2
    found = table[:groups, _FIRST:_BELOW]
    found = found[found[:, 2] >= 0]  # some of num_packs may have stayed empty
    # Splitting gives the front packs of a group a later row, so rows are sorted by first pack.
    return steps[:used], found[np.argsort(found[:, 0])]


@njit(cache=True)
def _contents(steps, groups, offsets, entries):  # type: ignore[no-untyped-def]
    """Write offsets if entries is empty, or else entries from offsets."""
    for group in range(groups.shape[0]):
        # Steps lead from the shortest length back to the longest, so entries are written from the
        # end. Steps of one length follow each other and become one entry.
        entry = offsets[group + 1] if entries.shape[0] else 0
        length = 0
        step = groups[group, 2]
        while step >= 0:
            if steps[step, 0] != length:
                length = steps[step, 0]
                entry += -1 if entries.shape[0] else 1
                if entries.shape[0]:
                    entries[entry, 0] = length
            if entries.shape[0]:
                entries[entry, 1] += steps[step, 1]
            step = steps[step, 2]
        if not entries.shape[0]:
            offsets[group + 1] = offsets[group] + entry


def contents(
    steps: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (offsets, entries): what the packs of each group hold, longest first.

    entries is int64[entries, 2], (length, copies), with the lengths of a group in falling order
    and without repeats; group g holds entries[offsets[g]:offsets[g + 1]]. O(entries).
    """
    # Two passes, so that the second writes into a table of the right size.
    offsets = np.zeros(len(groups) + 1, np.int64)
    _contents(steps, groups, offsets, np.empty((0, 2), np.int64))
    entries = np.zeros((offsets[-1], 2), np.int64)
    _contents(steps, groups, offsets, entries)
    return offsets, entries
