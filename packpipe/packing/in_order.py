"""Packing kernels that take examples in the order given.

Each writes the pack number of every example and returns how many packs there are; packs are
numbered in order of creation. Naive twins are in tests/naive.py. A kernel calls kernels of this
file only, since numba's cache does not notice changes in other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def next_fit(lengths, capacity, max_segments, numbers):  # type: ignore[no-untyped-def]
    """Put each example into the last pack, or open the next if it does not fit. O(examples).

    Invariant: `room` and `slots` are what the last pack has left.
    """
    num_packs = 0
    room = 0
    slots = 0
    for i in range(lengths.shape[0]):
        if lengths[i] > room or slots == 0:
            num_packs += 1
            room = capacity
            slots = max_segments
        room -= lengths[i]
        slots -= 1
        numbers[i] = num_packs - 1
    return num_packs


@njit(cache=True)
def first_fit(lengths, capacity, max_segments, numbers):  # type: ignore[no-untyped-def]
    """Put each example into the first pack with room; O(examples * log(packs)).

    Invariant: a tree over the packs holds the most room below each node (0 for a pack without a
    free slot), so the first pack that suffices is found from the root.
    """
    # Node n has the children 2n and 2n + 1; pack p is leaf `leaves + p`. Packs that are not open
    # yet have room 0, so a search never finds them.
    leaves = 1024
    room = np.zeros(2 * leaves, np.int32)
    slots = np.empty(leaves, np.int32)
    num_packs = 0
    for i in range(lengths.shape[0]):
        if num_packs == leaves and room[1] < lengths[i]:
            # Twice as many leaves: over all examples the copies cost O(packs). Copied one by one,
            # since array slices made compiling several times as slow.
            larger = np.zeros(4 * leaves, np.int32)
            for leaf in range(leaves):
                larger[2 * leaves + leaf] = room[leaves + leaf]
            for node in range(2 * leaves - 1, 0, -1):
                larger[node] = max(larger[2 * node], larger[2 * node + 1])
            more = np.empty(2 * leaves, np.int32)
            for leaf in range(leaves):
                more[leaf] = slots[leaf]
            room, slots, leaves = larger, more, 2 * leaves
        if room[1] < lengths[i]:
            node = leaves + num_packs
            room[node] = capacity
            slots[num_packs] = max_segments
            num_packs += 1
        else:
            node = 1
            while node < leaves:
                # The left child if it has enough room; else the right one must have it.
                node *= 2
                if room[node] < lengths[i]:
                    node += 1
        pack = node - leaves
        numbers[i] = pack
        slots[pack] -= 1
        room[node] = room[node] - lengths[i] if slots[pack] else 0
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return num_packs


@njit(cache=True)
def best_fit(lengths, capacity, max_segments, numbers):  # type: ignore[no-untyped-def]
    """Put each example into the fullest pack with room; O(examples * log(capacity)).

    Open packs with the same room are on one stack, a shelf, the last one changed on top (which
    decides ties). A tree whose nodes say whether a shelf below holds a pack finds the next one.
    """
    # Shelves are linked lists: `shelves[room]` is the top pack, `below[pack]` the next, -1 the end.
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.bool_)
    shelves = np.full(capacity + 1, np.int32(-1))
    below = np.empty(1024, np.int32)
    slots = np.empty(1024, np.int32)
    num_packs = 0
    for i in range(lengths.shape[0]):
        # The first shelf from lengths[i] on: up until a right neighbour holds packs, then down to
        # its leftmost one. The search ends at the root (1) if no open pack has enough room.
        node = leaves + lengths[i]
        if not tree[node]:
            while node > 1 and (node % 2 or not tree[node + 1]):
                node //= 2
            if node > 1:
                node += 1
                while node < leaves:
                    node *= 2
                    if not tree[node]:
                        node += 1
        if node == 1:
            if num_packs == below.shape[0]:
                below = np.concatenate((below, np.empty_like(below)))
                slots = np.concatenate((slots, np.empty_like(slots)))
            pack = np.int32(num_packs)
            num_packs += 1
            slots[pack] = max_segments
            room = capacity
        else:
            room = node - leaves
            pack = shelves[room]
            shelves[room] = below[pack]
            if below[pack] < 0:
                tree[node] = False
                while node > 1:
                    node //= 2
                    tree[node] = tree[2 * node] or tree[2 * node + 1]
        numbers[i] = pack
        slots[pack] -= 1
        room -= lengths[i]
        # A full pack goes on no shelf: nothing can enter it again.
        if room and slots[pack]:
            below[pack] = shelves[room]
            shelves[room] = pack
            node = leaves + room
            # Above a node that is on, all are on already.
            while node and not tree[node]:
                tree[node] = True
                node //= 2
    return num_packs
