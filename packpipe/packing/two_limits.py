"""Packs under two limits at once: tokens, and a second cost of each example.

The second cost is, for example, the text tokens of an image with a caption. Examples are taken by
their larger share of either limit. Two numbers per example make no histogram, so the cost is
O(examples * log(packs)), and more for first fit if packs with room for tokens only alternate with
packs with room for the second cost only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from packpipe import checks
from packpipe.packing import lengths as fronts

STRATEGIES = ("ffd", "bfd")


@njit(cache=True)
def _doubled(values):  # type: ignore[no-untyped-def]
    """Return an array twice as long, zeros after the old values."""
    larger = np.zeros(2 * values.shape[0], np.int64)
    for i in range(values.shape[0]):
        larger[i] = values[i]
    return larger


@njit(cache=True)
def first_fit(lengths, costs, capacity, limit, max_segments, numbers):  # type: ignore[no-untyped-def]
    """Put each example into the first pack with room for both; return the number of packs.

    Invariant: a tree over the packs holds the most room for tokens and the most room for the second
    cost (purse) below each node; a branch with too little of one is not searched. A pack that has
    no free slot has room -1.
    """
    # -1, not 0, is what packs have that are not open: a cost of 0 would fit into a purse of 0.
    leaves = 1024
    room = np.full(2 * leaves, -1)
    purse = np.full(2 * leaves, -1)
    slots = np.zeros(leaves, np.int64)
    stack = np.empty(128, np.int64)
    num_packs = 0
    for i in range(lengths.shape[0]):
        # Depth first, left before right. The most room and the most purse of a node may be those
        # of different packs, so a search may have to turn back; the stack holds the branches left.
        found = -1
        depth = 1
        stack[0] = 1
        while depth and found < 0:
            depth -= 1
            node = stack[depth]
            if room[node] < lengths[i] or purse[node] < costs[i]:
                continue
            if node >= leaves:
                found = node
            else:
                stack[depth] = 2 * node + 1
                stack[depth + 1] = 2 * node
                depth += 2
        if found < 0:
            if num_packs == leaves:
                more_room, more_purse = np.full(4 * leaves, -1), np.full(4 * leaves, -1)
                for pack in range(leaves):
                    more_room[2 * leaves + pack] = room[leaves + pack]
                    more_purse[2 * leaves + pack] = purse[leaves + pack]
                for node in range(2 * leaves - 1, 0, -1):
                    more_room[node] = max(more_room[2 * node], more_room[2 * node + 1])
                    more_purse[node] = max(more_purse[2 * node], more_purse[2 * node + 1])
                room, purse, slots = more_room, more_purse, _doubled(slots)
                leaves *= 2
            found = leaves + num_packs
            room[found] = capacity
            purse[found] = limit
            slots[num_packs] = max_segments
            num_packs += 1
        numbers[i] = found - leaves
        slots[found - leaves] -= 1
        room[found] -= lengths[i]
        purse[found] -= costs[i]
        if slots[found - leaves] == 0:
            room[found] = -1
        while found > 1:
            found //= 2
            room[found] = max(room[2 * found], room[2 * found + 1])
            purse[found] = max(purse[2 * found], purse[2 * found + 1])
    return num_packs


@njit(cache=True)
def _meld(one, other, purse, child, sibling):  # type: ignore[no-untyped-def]
    """Join two pairing heaps; the root has the most purse, and of equals is the first opened."""
    if one < 0:
        return other
    if other < 0:
        return one
    if purse[other] > purse[one] or (purse[other] == purse[one] and other < one):
        one, other = other, one
    sibling[other] = child[one]
    child[one] = other
    return one


@njit(cache=True)
def best_fit(lengths, costs, capacity, limit, max_segments, numbers):  # type: ignore[no-untyped-def]
    """Put each example into the pack with the least room for tokens that has room for both.

    Of packs with equal room, the one with the most left of the second limit (purse) is taken,
    then the first opened. Invariant: open packs of equal room are a pairing heap, and a tree over
    the rooms holds the most purse below each node. Returns the number of packs.
    """
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    tree = np.full(2 * leaves, -1)
    heaps = np.full(capacity + 1, -1)
    purse = np.zeros(1024, np.int64)
    slots = np.zeros(1024, np.int64)
    child = np.zeros(1024, np.int64)
    sibling = np.zeros(1024, np.int64)
    num_packs = 0
    for i in range(lengths.shape[0]):
        # The first leaf from lengths[i] on with enough: up to a branch on the right, then down.
        node = leaves + lengths[i]
        if tree[node] < costs[i]:
            while node > 1 and (node % 2 or tree[node + 1] < costs[i]):
                node //= 2
            if node > 1:
                node += 1
                while node < leaves:
                    node *= 2
                    if tree[node] < costs[i]:
                        node += 1
        if node > 1:
            room = node - leaves
            pack = heaps[room]
            # Pop: meld the children two by two, then all into one.
            pairs = -1
            left = child[pack]
            while left >= 0:
                right = sibling[left]
                rest = sibling[right] if right >= 0 else -1
                sibling[left] = -1
                if right >= 0:
                    sibling[right] = -1
                both = _meld(left, right, purse, child, sibling)
                sibling[both] = pairs
                pairs = both
                left = rest
            heap = -1
            while pairs >= 0:
                rest = sibling[pairs]
                sibling[pairs] = -1
                heap = _meld(heap, pairs, purse, child, sibling)
                pairs = rest
            heaps[room] = heap
            tree[node] = purse[heap] if heap >= 0 else -1
            while node > 1:
                node //= 2
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
        else:
            if num_packs == purse.shape[0]:
                purse, slots = _doubled(purse), _doubled(slots)
                child, sibling = _doubled(child), _doubled(sibling)
            pack = num_packs
            num_packs += 1
            room = capacity
            purse[pack] = limit
            slots[pack] = max_segments
        numbers[i] = pack
        purse[pack] -= costs[i]
        slots[pack] -= 1
        room -= lengths[i]
        # A pack without tokens or slots left goes into no heap: nothing can enter it again.
        if slots[pack] and room:
            child[pack] = -1
            sibling[pack] = -1
            heaps[room] = _meld(heaps[room], pack, purse, child, sibling)
            node = leaves + room
            tree[node] = purse[heaps[room]]
            while node > 1:
                node //= 2
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return num_packs


def pack(
    lengths: NDArray[np.int64],
    costs: NDArray[np.int64],
    capacity: int,
    limit: int,
    max_segments: int,
    strategy: str,
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return (visited, numbers, packs): the examples in the order taken, and the pack of each.

    The order: by the larger of length ÷ capacity and cost ÷ limit, largest first; then the longest
    first; then by position. With costs of one, "ffd" is "ffd" with max_segments = limit.
    """
    # Shares are compared exactly, times capacity · limit; in Python's integers if int64 overflows.
    exact = np.int64 if capacity * limit < 2**62 else object
    shares = np.maximum(lengths.astype(exact) * limit, costs.astype(exact) * capacity)
    visited = np.lexsort((-lengths, -shares))
    numbers = np.empty(len(lengths), np.int64)
    rule = first_fit if strategy == "ffd" else best_fit
    num_packs = rule(lengths[visited], costs[visited], capacity, limit, max_segments, numbers)
    return visited, numbers, num_packs


def checked(also: Any, num_examples: int) -> tuple[NDArray[np.int64], int]:
    """Return the second cost as int64[examples] and its limit.

    Raises:
        TypeError: also is no pair, or holds no integers.
        ValueError: there is not one cost for each example, a cost is null or outside 0..limit, or
            the limit is below 1.
    """
    if not isinstance(also, tuple) or len(also) != 2:
        kind = f"{len(also)} values" if isinstance(also, tuple) else type(also).__name__
        raise TypeError(checks.sentence("also", kind, "a pair (cost, limit)", "pass a tuple"))
    limit = checks.whole_number("also[1]", also[1], 1, 2**62, "pass what a pack may hold")
    costs = fronts.joined(fronts.chunks_of(also[0], "also[0]", "pass the second cost per example"))
    if len(costs) != num_examples:
        expected = f"{num_examples} (examples)"
        raise ValueError(checks.sentence("len(also[0])", len(costs), expected, "one an example"))
    wrong = np.flatnonzero((costs < 0) | (costs > limit))
    if wrong.size:
        where = int(wrong[0])
        raise ValueError(
            checks.sentence(
                f"also[0][{where}]",
                int(costs[where]),
                f"0..{limit} (also[1])",
                "raise the limit, or leave the example out",
            )
        )
    return costs.astype(np.int64), limit
