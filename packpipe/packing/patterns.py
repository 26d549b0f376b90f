"""`Patterns`, packs in short form: which lengths a kind of pack holds, and its number of repeats.

A plan from a histogram has a few thousand patterns at most, whatever the number of packs. Lengths
here are in units: tokens, or multiples of segment_multiple tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from packpipe.packing import decreasing

Pattern = tuple[tuple[int, int], ...]  # (length, copies), longest first


@dataclass(frozen=True, eq=False)
class Patterns:
    """Runs of packs that hold the same lengths.

    Attributes:
        repeats: int64[patterns], packs of each pattern, one after the other.
        offsets: int64[patterns + 1]; pattern p holds ``entries[offsets[p]:offsets[p + 1]]``.
        entries: int64[entries, 2], (length, copies); longest first within a pattern, no length
            twice.
    """

    repeats: NDArray[np.int64]
    offsets: NDArray[np.int64]
    entries: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.repeats)

    def __getitem__(self, pattern: int) -> tuple[int, Pattern]:
        """Return (repeats, ((length, copies), ...)) of one pattern."""
        start, stop = self.offsets[pattern], self.offsets[pattern + 1]
        held = tuple((length, copies) for length, copies in self.entries[start:stop].tolist())
        return int(self.repeats[pattern]), held

    @property
    def num_packs(self) -> int:
        """Packs of all patterns."""
        return int(self.repeats.sum())

    @cached_property
    def num_segments(self) -> NDArray[np.int64]:
        """int64[patterns], segments of a pack of each pattern."""
        ends = np.concatenate([[0], np.cumsum(self.entries[:, 1])])
        return np.diff(ends[self.offsets])

    def counts(self, longest: int) -> NDArray[np.int64]:
        """Return int64[longest + 1], the histogram of all that the packs hold."""
        counts = np.zeros(longest + 1, np.int64)
        repeats = np.repeat(self.repeats, np.diff(self.offsets))
        np.add.at(counts, self.entries[:, 0], self.entries[:, 1] * repeats)
        return counts


def from_steps(steps: NDArray[np.int64], groups: NDArray[np.int64]) -> Patterns:
    """Return the patterns of (steps, groups), the result of a rule in decreasing.py."""
    offsets, entries = decreasing.contents(steps, groups)
    return Patterns(np.ascontiguousarray(groups[:, 1]), offsets, entries)


def from_pairs(pairs: Iterable[tuple[int, Iterable[tuple[int, int]]]]) -> Patterns:
    """Return the patterns of (repeats, ((length, copies), ...)); repeats of 0 are left out."""
    kept = [(repeats, tuple(held)) for repeats, held in pairs if repeats]
    entries = [entry for _, held in kept for entry in held]
    ends = np.cumsum([0, *(len(held) for _, held in kept)])
    return Patterns(
        np.array([repeats for repeats, _ in kept], np.int64),
        ends.astype(np.int64),
        np.array(entries, np.int64).reshape(-1, 2),
    )


def pattern_of(lengths: Iterable[int]) -> Pattern:
    """Return lengths as (length, copies), longest first; zeros are left out."""
    # dict.fromkeys drops repeats and keeps the order, longest first.
    kept = sorted((length for length in lengths if length), reverse=True)
    return tuple((length, kept.count(length)) for length in dict.fromkeys(kept))


def joined(parts: Sequence[Patterns]) -> Patterns:
    """Return the patterns of the parts, one part after the other."""
    shifts = np.cumsum([0, *(len(part.entries) for part in parts)])
    offsets = [part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=False)]
    return Patterns(
        np.concatenate([part.repeats for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([part.entries for part in parts]),
    )


def split_to_multiple(patterns: Patterns, multiple: int) -> Patterns:
    """Return the patterns with packs added until their number is a multiple.

    The last pack that holds two examples or more is cut in half, again and again; empty packs
    are added only if there are fewer examples than packs.
    """
    missing = -patterns.num_packs % multiple
    if not missing:
        return patterns
    pairs = [patterns[pattern] for pattern in range(len(patterns))]
    last = len(pairs) - 1
    while missing and last >= 0:
        repeats, held = pairs[last]
        lengths = [length for length, copies in held for _ in range(copies)]
        if len(lengths) < 2:
            last -= 1
            continue
        half = (len(lengths) + 1) // 2
        halves = [(1, pattern_of(lengths[:half])), (1, pattern_of(lengths[half:]))]
        # Only one pack of the run is cut. The search goes on at the second half, now the last pack.
        pairs[last : last + 1] = [(repeats - 1, held), *halves] if repeats > 1 else halves
        last += len(halves) if repeats > 1 else len(halves) - 1
        missing -= 1
    return from_pairs([*pairs, (missing, ())])


def fill_slots(patterns: Patterns, counts: NDArray[np.int64]) -> tuple[Patterns, NDArray[np.int64]]:
    """Give each slot of the patterns to an example or drop it; return what packs then hold.

    A slot takes an example of its own length or a shorter one. Longest first, each example
    takes the shortest slot that holds it, so as many examples as possible get a slot.

    Args:
        patterns: the slots; there may be more or fewer of a length than examples.
        counts: int64[longest + 1], examples of each length.

    Returns:
        Patterns of the same packs without those left empty, and int64[longest + 1], the
        examples of each length that got no slot.
    """
    slots = patterns.counts(len(counts) - 1)
    left = counts.copy()
    takers: dict[int, list[list[int]]] = {}  # of each slot length: [length, how many], in turn
    free: list[list[int]] = []  # [slot length, how many], shortest on top
    # From long to short: all slots in `free` are at least this long, the shortest on top.
    for length in range(len(counts) - 1, 0, -1):
        if slots[length]:
            takers[length] = []
            free.append([length, int(slots[length])])
        while left[length] and free:
            taken = min(int(left[length]), free[-1][1])
            takers[free[-1][0]].append([length, taken])
            left[length] -= taken
            free[-1][1] -= taken
            if not free[-1][1]:
                free.pop()
    # Slots without an example hold length 0, which is dropped below.
    for length, unused in free:
        takers[length].append([0, unused])

    filled: list[tuple[int, Pattern]] = []
    for pattern in range(len(patterns)):
        repeats, held = patterns[pattern]
        # For each slot of the pattern, runs of (length held, packs), first pack on top. Packs in
        # which no slot's run ends hold the same, and become one pattern.
        runs = [_take(takers[length], repeats) for length, copies in held for _ in range(copies)]
        while repeats:
            packs = min(run[-1][1] for run in runs)
            content: dict[int, int] = {}
            for run in runs:
                content[run[-1][0]] = content.get(run[-1][0], 0) + 1
                run[-1][1] -= packs
                if not run[-1][1]:
                    run.pop()
            content.pop(0, None)
            if content:
                filled.append((packs, tuple(sorted(content.items(), reverse=True))))
            repeats -= packs
    return from_pairs(filled), left


def _take(takers: list[list[int]], wanted: int) -> list[list[int]]:
    """Take `wanted` slots from [length, how many] runs; return the runs taken, first one on top."""
    taken = []
    while wanted:
        length, number = takers[0]
        some = min(number, wanted)
        taken.append([length, some])
        wanted -= some
        if some == number:
            takers.pop(0)
        else:
            takers[0][1] -= some
    return taken[::-1]
