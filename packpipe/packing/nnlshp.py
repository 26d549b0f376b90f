"""NNLSHP: plans of at most three examples a pack, by non-negative least squares.

All ways to write the capacity as a sum of at most three lengths are candidate patterns. Their
repeat counts are fitted to the histogram and rounded, and what is left over is covered by pairs.
Kept for comparison: "optimal" finds fewer packs in less time.

Source: Krell 3.1 and its packedBERT code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packpipe.packing import patterns as pattern_lists
from packpipe.packing.patterns import Pattern, Patterns

MAX_SEGMENTS = 3
# The matrix is dense, capacity x capacity² / 12 numbers: 90 MB for 512, 730 MB for 1024.
MAX_CAPACITY = 1024
# Krell's weight for errors at lengths up to 8; at other lengths it is 1.
_SHORT, _SHORT_WEIGHT = 8, 0.09


def plan(counts: NDArray[np.int64]) -> Patterns:
    """Return a plan for int64[capacity + 1] counts; capacity at most MAX_CAPACITY."""
    from scipy.optimize import nnls  # takes longer to load than most plans to make

    capacity = len(counts) - 1
    candidates = _sums(capacity)
    held = np.zeros((capacity, len(candidates)))
    for column, pattern in enumerate(candidates):
        for length, copies in pattern:
            held[length - 1, column] = copies
    weights = np.where(np.arange(1, capacity + 1) <= _SHORT, _SHORT_WEIGHT, 1.0)
    fitted, _ = nnls(held * weights[:, None], counts[1:] * weights, maxiter=100 * len(candidates))
    # Rounded repeats give too many or too few slots of a length; `fill_slots` settles both.
    slots = pattern_lists.from_pairs(
        zip(np.rint(fitted).astype(np.int64).tolist(), candidates, strict=True)
    )
    filled, left = pattern_lists.fill_slots(slots, counts)
    # A length left over is paired with what fills the pack; that slot takes a shorter one or none.
    pairs = [
        (number, pattern_lists.pattern_of([length, capacity - length]))
        for length, number in enumerate(left.tolist())
        if number
    ]
    rest, _ = pattern_lists.fill_slots(pattern_lists.from_pairs(pairs), left)
    return pattern_lists.joined([filled, rest])


def _sums(total: int) -> list[Pattern]:
    """Return every way to write total as a sum of one, two or three lengths."""
    found = [[total]]
    found += [[one, total - one] for one in range(1, total // 2 + 1)]
    for one in range(1, total // 3 + 1):
        found += [[one, two, total - one - two] for two in range(one, (total - one) // 2 + 1)]
    return [pattern_lists.pattern_of(lengths) for lengths in found]
