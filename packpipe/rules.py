"""Packing kernels: which pack every length goes to (floor 0).

A rule works on the histogram of lengths and returns *placements*, rows of

    (length, first pack, packs, examples a pack)

which read "put this many examples of this length into each of these packs". Examples of
one length are interchangeable, so the cost depends on the number of distinct lengths, not
of examples; `expand` then writes every example's place in one more pass. Each kernel has
a naive twin in tests/naive.py.

Compiled once a machine and kept in ``__pycache__`` (8 s for all kernels of the package, 0.4 s
from the cache). Numba compiles again when a kernel's own file has changed, but does not follow
calls into other files: so a kernel calls kernels of its own file only.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def _grown(rows):  # type: ignore[no-untyped-def]
    """Return rows with twice the capacity; a loop, since slices compile ten times slower."""
    larger = np.empty((2 * rows.shape[0], rows.shape[1]), rows.dtype)
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            larger[row, column] = rows[row, column]
    return larger


@njit(cache=True)
def _push(runs, num_runs, room, slots, packs):  # type: ignore[no-untyped-def]
    """Append a run, or widen the last one if it has the same room and slots."""
    if num_runs and runs[num_runs - 1, 0] == room and runs[num_runs - 1, 1] == slots:
        runs[num_runs - 1, 2] += packs
        return num_runs
    runs[num_runs, 0] = room
    runs[num_runs, 1] = slots
    runs[num_runs, 2] = packs
    return num_runs + 1


@njit(cache=True)
def _store(runs, blocks, block, block_size, source, start, stop):  # type: ignore[no-untyped-def]
    """Make source[start:stop] the runs of a block, and sum the block up."""
    most_room = 0
    packs = 0
    for i in range(start, stop):
        for column in range(3):
            runs[block * block_size + i - start, column] = source[i, column]
        most_room = max(most_room, source[i, 0])
        packs += source[i, 2]
    blocks[block, 0] = stop - start
    blocks[block, 1] = most_room
    blocks[block, 2] = packs


@njit(cache=True)
def first_fit_decreasing(counts, seq_len, max_segments, block_size):  # type: ignore[no-untyped-def]
    """Return (placements, how many, packs): exact first-fit-decreasing over a histogram.

    Invariant: the packs opened so far stand in order of creation as *runs* of (room, free
    slots, how many packs). First fit serves equal lengths pack by pack, so a run of m packs
    takes q = min(room // length, slots) of them a pack until they are spent: only the last
    run served is split. Packs nothing can enter any more are closed (room 0, slots 0), so
    that neighbours merge.

    Many distinct lengths leave many runs (tens of thousands for seq_len 131072), so these
    are kept in a linked list of blocks, each summed up as (runs, most room, packs, next): a
    block without room is skipped in one step. Without blocks the same plan took 14 times as
    long at seq_len 4096 (chat-like lengths) and over 100 times at 131072 (uniform ones).

    O(distinct lengths * (runs / block_size) + runs served * block_size), whatever the number
    of examples.

    Args:
        counts: int64[seq_len + 1], examples of each length; counts[0] is not read.
        seq_len: tokens a pack holds.
        max_segments: most examples a pack may hold.
        block_size: runs a block, 3 or more; changes the time alone. About √seq_len is best.
    """
    shortest = 1
    while shortest <= seq_len and counts[shortest] == 0:
        shortest += 1
    runs = np.empty((16 * block_size, 3), np.int64)
    blocks = np.empty((16, 4), np.int64)
    num_blocks = 0
    head, tail = -1, -1
    rewritten = np.empty((block_size + 2, 3), np.int64)
    placements = np.empty((256, 4), np.int64)
    num_placements = 0
    num_packs = 0

    for length in range(seq_len, shortest - 1, -1):
        left = counts[length]
        first = 0
        before, block = -1, head
        while left:
            while num_placements + block_size + 2 > placements.shape[0]:
                placements = _grown(placements)
            while num_blocks + 2 > blocks.shape[0]:
                blocks = _grown(blocks)
                runs = _grown(runs)
            if block >= 0 and blocks[block, 1] < length:
                following = blocks[block, 3]
                first += blocks[block, 2]
                if before >= 0 and blocks[block, 1] == 0 and blocks[before, 1] == 0:
                    # Two closed neighbours become one run of one block.
                    rewritten[0, 0] = 0
                    rewritten[0, 1] = 0
                    rewritten[0, 2] = blocks[before, 2] + blocks[block, 2]
                    _store(runs, blocks, before, block_size, rewritten, 0, 1)
                    blocks[before, 3] = following
                    tail = before if tail == block else tail
                else:
                    before = block
                block = following
                continue
            if block < 0:
                # Nothing open has room: a block of new packs, or the tail once more.
                block = tail
                if tail < 0 or blocks[tail, 0] > block_size - 2:
                    block = num_blocks
                    num_blocks += 1
                    blocks[block, 0] = 0
                    blocks[block, 3] = -1
                    if tail >= 0:
                        blocks[tail, 3] = block
                    else:
                        head = block
                    tail = block
                else:
                    first -= blocks[block, 2]
                per_pack = min(seq_len // length, max_segments)
                row = block * block_size + blocks[block, 0]
                runs[row, 0] = seq_len
                runs[row, 1] = max_segments
                runs[row, 2] = -(-left // per_pack)
                num_packs += runs[row, 2]
                blocks[block, 0] += 1
            size = 0
            for row in range(block * block_size, block * block_size + blocks[block, 0]):
                room, slots, packs = runs[row, 0], runs[row, 1], runs[row, 2]
                while packs:
                    per_pack = min(room // length, slots, left)
                    if per_pack == 0:
                        size = _push(rewritten, size, room, slots, packs)
                        first += packs
                        break
                    # As many packs as take per_pack each; what remains is looked at again.
                    filled = min(packs, left // per_pack)
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
                    size = _push(rewritten, size, room_after, slots_after, filled)
                    first += filled
                    packs -= filled
            if size <= block_size:
                _store(runs, blocks, block, block_size, rewritten, 0, size)
            else:
                half = size // 2
                _store(runs, blocks, block, block_size, rewritten, 0, half)
                _store(runs, blocks, num_blocks, block_size, rewritten, half, size)
                blocks[num_blocks, 3] = blocks[block, 3]
                blocks[block, 3] = num_blocks
                tail = num_blocks if tail == block else tail
                block = num_blocks
                num_blocks += 1
            before = block
            block = blocks[block, 3]
    return placements, num_placements, num_packs


@njit(cache=True)
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


@njit(cache=True)
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
