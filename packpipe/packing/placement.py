"""Kernels that give every example its place in a plan made from a histogram.

A plan says which lengths each pack holds. Examples of one length are interchangeable; by
convention they fill their places pack by pack in the order given, and within a pack the longest
comes first. Each kernel is one pass; all are bound by memory, so indices are as narrow as possible.

Arrays: `counts` and `next_place` are int64[longest + 1] by length; `repeats` int64[patterns],
`offsets` int64[patterns + 1] and `entries` int64[entries, 2] of (length, copies) say what
the packs of each pattern hold, in pack order. `lengths` are read-only int32 or int64, so that
each kernel is compiled for two types and no more. Naive twins are in tests/naive.py.
"""

from __future__ import annotations

from numba import njit

# Packs written together: a tile of the order stays in the cache while each length of a pattern
# is written to it (16 to 1024 packs took the same time; without tiles up to three times as long).
_TILE = 128


@njit(cache=True)
def count(lengths, counts):  # type: ignore[no-untyped-def]
    """Add lengths to their histogram; return the index of the first that is out of range, or -1."""
    # Four histograms side by side were no faster (14 against 13 ms); np.bincount took 72 ms.
    for i in range(lengths.shape[0]):
        length = lengths[i]
        if length < 1 or length >= counts.shape[0]:
            return i
        counts[length] += 1
    return -1


@njit(cache=True)
def sort_by_length(lengths, start, next_place, members):  # type: ignore[no-untyped-def]
    """Write each position to the next place of its length in members, and move next_place on.

    A stable counting sort of the positions start, start + 1, ..., chunk by chunk.
    """
    for i in range(lengths.shape[0]):
        place = next_place[lengths[i]]
        members[place] = start + i
        next_place[lengths[i]] = place + 1


@njit(cache=True)
def fill_packs(repeats, offsets, entries, next_place, members, order):  # type: ignore[no-untyped-def]
    """Write the examples of every pack, pack by pack: order, as long as members.

    Args:
        repeats: int64[patterns], packs of each pattern.
        offsets: int64[patterns + 1], where its entries begin.
        entries: int64[entries, 2], (length, copies).
        next_place: int64[lengths], where in members each length's next example is; moves on.
        members: int[examples], positions sorted by length, as `sort_by_length` leaves them.
        order: int[examples], written.
    """
    start = 0
    for pattern in range(repeats.shape[0]):
        size = 0
        for entry in range(offsets[pattern], offsets[pattern + 1]):
            size += entries[entry, 1]
        for first in range(0, repeats[pattern], _TILE):
            packs = min(_TILE, repeats[pattern] - first)
            column = start
            for entry in range(offsets[pattern], offsets[pattern + 1]):
                place = next_place[entries[entry, 0]]
                copies = entries[entry, 1]
                for pack in range(packs):
                    for copy in range(copies):
                        order[column + pack * size + copy] = members[place + pack * copies + copy]
                next_place[entries[entry, 0]] = place + packs * copies
                column += copies
            start += packs * size


@njit(cache=True)
def end_packs(repeats, num_segments, offsets):  # type: ignore[no-untyped-def]
    """Write where each pack ends: offsets[p + 1], after offsets[0] = 0."""
    offsets[0] = 0
    pack = 0
    for pattern in range(repeats.shape[0]):
        for _ in range(repeats[pattern]):
            offsets[pack + 1] = offsets[pack] + num_segments[pattern]
            pack += 1


@njit(cache=True)
def number_places(first_row, rows, skip, take, numbers):  # type: ignore[no-untyped-def]
    """Write the pack number of each place, length by length: skip some places, then take some.

    Args:
        first_row: int64[lengths + 1], where the rows of each length begin.
        rows: int64[rows, 3], (first pack, packs, copies), the packs of a length rising.
        skip: int64[lengths], places to leave out: those of examples in earlier shards.
        take: int64[lengths], places wanted after those.
        numbers: int[sum of take], written.
    """
    # A table of places and a second pass (`look_up`) took 97 to 137 ms; a state machine for each
    # length 67 to 137 ms, but it does not serve shards.
    place = 0
    for length in range(take.shape[0]):
        skipped = skip[length]
        end = place + take[length]
        row = first_row[length]
        while place < end:
            # A row whose places are all skipped is passed in one step; only the first row taken
            # may begin within a pack.
            packs, copies = rows[row, 1], rows[row, 2]
            if skipped < packs * copies:
                pack = rows[row, 0] + skipped // copies
                used = skipped % copies
                skipped = 0
                while place < end and pack < rows[row, 0] + packs:
                    numbers[place] = pack
                    place += 1
                    used += 1
                    if used == copies:
                        used = 0
                        pack += 1
            else:
                skipped -= packs * copies
            row += 1


@njit(cache=True)
def look_up(lengths, next_place, numbers, out):  # type: ignore[no-untyped-def]
    """Write each example's pack number: the next of its length in numbers; next_place moves on."""
    for i in range(lengths.shape[0]):
        place = next_place[lengths[i]]
        out[i] = numbers[place]
        next_place[lengths[i]] = place + 1


@njit(cache=True)
def shuffle(members, ends, group, start, uniforms):  # type: ignore[no-untyped-def]
    """Continue a Fisher-Yates shuffle within each group of members; return the group reached.

    The member at place i changes places with one of i .. end of its group - 1, chosen by
    uniforms[i - start]. Groups of one length fit into the cache; all members together would not.

    Args:
        members: int[examples], changed.
        ends: int64[groups], where each group ends, in rising order.
        group: the group that place start is in, or one before it.
        start: the first place of this call.
        uniforms: float64[places], in [0, 1).
    """
    for i in range(start, start + uniforms.shape[0]):
        while ends[group] <= i:
            group += 1
        # A uniform number is at most 1 - 2**-53, so even after rounding the product stays below the
        # number of places, and `other` within the group.
        other = i + int(uniforms[i - start] * (ends[group] - i))
        members[i], members[other] = members[other], members[i]
    return group


@njit(cache=True)
def group_by_pack(numbers, offsets, order):  # type: ignore[no-untyped-def]
    """Write order from the pack number of each example; offsets[p] moves to the end of pack p."""
    for i in range(numbers.shape[0]):
        place = offsets[numbers[i]]
        order[place] = i
        offsets[numbers[i]] = place + 1
