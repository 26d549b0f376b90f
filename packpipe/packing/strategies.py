"""`patterns_of` runs the strategy of a name ("ffd", "optimal", ...): a histogram to patterns."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.packing import cutting_stock, decreasing, nnlshp
from packpipe.packing import patterns as pattern_lists
from packpipe.packing.cutting_stock import Certificate
from packpipe.packing.limits import Limits
from packpipe.packing.patterns import Patterns

STRATEGIES = ("ffd", "bfd", "spfhp", "nnlshp", "balanced", "optimal")


def patterns_of(
    counts: NDArray[np.int64], limits: Limits, strategy: str, budget_s: float
) -> tuple[Patterns, Certificate | None]:
    """Return what the packs hold with a strategy, and for "optimal" the proof it found.

    Args:
        counts: int64[capacity + 1], examples of each length in units.
        limits: the limits of every pack; the caller makes the packs a multiple of ranks.
        strategy: one of STRATEGIES.
        budget_s: seconds that "optimal" may take.
    """
    if not counts.any():
        return pattern_lists.from_pairs([]), None
    if strategy == "optimal":
        # Before the starts are made, so that they count as part of the budget.
        deadline = time.perf_counter() + budget_s
        # All are quick. Their patterns start the search, and the best of them is kept if it finds
        # none.
        starts = (_tightest, _roomiest, _first_fit, _balanced)
        return cutting_stock.improve(
            counts,
            limits.capacity,
            limits.slots,
            starts=[rule(counts, limits) for rule in starts],
            bound=limits.bound(counts),
            deadline=deadline,
        )
    rule = {
        "ffd": _first_fit,
        "bfd": _tightest,
        "spfhp": _roomiest,
        "nnlshp": _fitted,
        "balanced": _balanced,
    }[strategy]
    return rule(counts, limits), None


def _first_fit(counts: NDArray[np.int64], limits: Limits) -> Patterns:
    return pattern_lists.from_steps(*decreasing.first_fit_decreasing(counts, limits.slots))


def _tightest(counts: NDArray[np.int64], limits: Limits) -> Patterns:
    return _shelved(counts, limits, tight_below=limits.capacity + 1)


def _roomiest(counts: NDArray[np.int64], limits: Limits) -> Patterns:
    return _shelved(counts, limits, tight_below=0)


def _shelved(
    counts: NDArray[np.int64], limits: Limits, *, tight_below: int, num_packs: int = 0
) -> Patterns:
    """Return the patterns of `decreasing.shelved`; none if num_packs packs are too few."""
    return pattern_lists.from_steps(
        *decreasing.shelved(counts, limits.slots, tight_below=tight_below, num_packs=num_packs)
    )


def _balanced(counts: NDArray[np.int64], limits: Limits) -> Patterns:
    """Longest first into the least loaded of B packs, B the fewest that bisection finds.

    The shortest examples, fewer than one per pack, go where they fit tightest instead. If they too
    went to the least loaded pack, loads would end up alike and no pack full (padding is 0.2 %
    instead of 0.9 % on chat-like lengths and 2.1 % on Wikipedia's).
    """
    most = limits.bound(counts)
    # All shorter lengths together are fewer examples than the packs of the lower bound.
    tight_below = int(np.searchsorted(np.cumsum(counts), most))
    # Invariant: `too_few` packs do not suffice. Steps double until `most` packs do; the first is a
    # ten-thousandth, since as a rule hardly more packs than the bound are needed.
    too_few = most - limits.ranks
    step = limits.whole_ranks(max(1, most // 10_000))
    best = _shelved(counts, limits, tight_below=tight_below, num_packs=most)
    while not len(best):
        too_few, most, step = most, most + step, 2 * step
        best = _shelved(counts, limits, tight_below=tight_below, num_packs=most)
    # Bisection in multiples of ranks, so that as a rule no pack has to be cut in two afterwards.
    while most - too_few > limits.ranks:
        middle = too_few + limits.whole_ranks((most - too_few) // 2)
        plan = _shelved(counts, limits, tight_below=tight_below, num_packs=middle)
        if len(plan):
            best, most = plan, middle
        else:
            too_few = middle
    return best


def _fitted(counts: NDArray[np.int64], limits: Limits) -> Patterns:
    if limits.capacity > nnlshp.MAX_CAPACITY:
        raise ValueError(
            f"seq_len is {limits.seq_len}, expected at most {nnlshp.MAX_CAPACITY} units for "
            "'nnlshp', which needs a dense matrix; choose 'optimal'"
        )
    if (limits.max_segments or nnlshp.MAX_SEGMENTS) < nnlshp.MAX_SEGMENTS:
        expected = f"{nnlshp.MAX_SEGMENTS} or more for 'nnlshp'"
        raise ValueError(
            checks.sentence("max_segments", limits.max_segments, expected, "choose 'optimal'")
        )
    return nnlshp.plan(counts)
