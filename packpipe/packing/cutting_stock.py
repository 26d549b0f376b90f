"""Finds near-optimal plans with a proof of how near: column generation over patterns.

The fewest packs are the fewest patterns that cover the histogram (the cutting-stock problem).
Its linear relaxation is solved over a growing set of patterns: an LP (SciPy's HiGHS) gives each
length a price, a knapsack kernel adds the patterns worth most at these prices, and so on until no
pattern is worth more than a pack. Fractional repeats are then rounded and the rest solved again.

The proof is integer arithmetic and does not rely on the LP: if no possible pack is worth more
than V at whole-number prices, every packer needs at least ceil(worth of all examples / V) packs.
Any prices give a valid bound; good ones a tight one.

Source: Gilmore and Gomory, A Linear Programming Approach to the Cutting-Stock Problem (1961);
Farley, A Note on Bounding a Class of Linear Programming Problems (1990) for the bound; Valerio
de Carvalho, Using Extra Dual Cuts to Accelerate Column Generation (2005) for slots that
shorter examples may take; Wentges, Weighted Dantzig-Wolfe Decomposition (1997) for the
smoothed prices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from packpipe.packing import decreasing
from packpipe.packing import patterns as pattern_lists
from packpipe.packing.patterns import Pattern, Patterns

_ONE = 2**40  # worth of a pack as a whole number: prices keep 40 binary places
# Share of the best prices so far in the prices tried. Without smoothing the Wikipedia histogram
# converged in 1.2 s, but with 3 or 4 segments a pack not in 5 s; with 0.5 to 0.9 all did.
_SMOOTHING = 0.9
# The least speed of the knapsack kernel. A kernel cannot be stopped, so it is not started when it
# might end after the deadline.
_STEPS_A_SECOND = 3e8
_MOST_CELLS = 2**25  # cells of its two tables, 8 + 4 bytes each: 400 MB


@dataclass(frozen=True, eq=False)
class Certificate:
    """A proof that every packer needs at least ``bound`` packs, and how the search for it ended.

    Attributes:
        bound: ⌈worth of all examples ÷ pack_worth⌉, a lower bound on the packs of any packer.
        prices: int64[capacity + 1], what an example of each length (in units) is worth.
        pack_worth: the most that any allowed pack can be worth at these prices.
        relaxation: packs of the last linear program, a fractional plan.
        converged: whether no further pattern could improve that fractional plan.
        seconds: duration of the whole search.
    """

    bound: int
    prices: NDArray[np.int64]
    pack_worth: int
    relaxation: float
    converged: bool
    seconds: float


@njit(cache=True)
def most_worth(lengths, prices, worth, last):  # type: ignore[no-untyped-def]
    """Fill worth[k, room], the most that up to k examples in that room can be worth.

    Dynamic programming for the unbounded knapsack: any number of examples of each length.
    Invariant: all cells with less room in this row, and all earlier rows, are final.
    O(rows * capacity * lengths).

    Args:
        lengths: int64[lengths], rising.
        prices: int64[lengths], whole numbers.
        worth: int64[slots + 1, capacity + 1], its first row and column zeros; or
            int64[1, capacity + 1] for any number of examples.
        last: int32 in the shape of worth: index of the length put in last, or -1 for a free unit.
    """
    # Without a limit on examples there is one row, and an example leads to the same row again.
    limited = 1 if worth.shape[0] > 1 else 0
    for k in range(limited, worth.shape[0]):
        for room in range(1, worth.shape[1]):
            # Leaving one unit free is always possible, so worth never falls as room grows.
            best = worth[k, room - 1]
            chosen = -1
            for i in range(lengths.shape[0]):
                if lengths[i] > room:
                    break
                value = worth[k - limited, room - lengths[i]] + prices[i]
                if value > best:
                    best = value
                    chosen = i
            worth[k, room] = best
            last[k, room] = chosen


@njit(cache=True)
def walk_back(lengths, last, first, held):  # type: ignore[no-untyped-def]
    """Write the lengths of the most valuable pack that holds a given length; return its size.

    Args:
        lengths: int64[lengths], rising.
        last: int32[rows, capacity + 1], filled by `most_worth`.
        first: index of the length that the pack must hold.
        held: int64[slots], written: indices into lengths, `first` at the front.
    """
    limited = 1 if last.shape[0] > 1 else 0
    # The given length takes its tokens, and one slot if slots are limited; `last` fills the rest.
    k = last.shape[0] - 1 - limited
    room = last.shape[1] - 1 - lengths[first]
    held[0] = first
    size = 1
    while room > 0:
        number = last[k, room]
        if number < 0:
            room -= 1
        else:
            held[size] = number
            size += 1
            room -= lengths[number]
            k -= limited
    return size


class _Master:
    """The linear program (the master problem): the fewest patterns whose slots cover the examples.

    A slot takes an example of its own length or a shorter one. The columns that express this keep
    the price of a longer example at or above that of a shorter one; without them prices jump about.
    """

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths
        self.row_of = {length: row for row, length in enumerate(lengths.tolist())}
        self.columns: dict[Pattern, None] = {}  # an ordered set

    def add(self, patterns: Iterable[Pattern]) -> bool:
        """Add patterns; return whether any was new. Known patterns keep their column."""
        before = len(self.columns)
        self.columns.update(dict.fromkeys(patterns))
        return len(self.columns) > before

    def worth(self, pattern: Pattern, prices: NDArray[np.float64]) -> float:
        """Return what a pattern is worth at a price for each length."""
        return float(sum(prices[self.row_of[length]] * copies for length, copies in pattern))

    def solve(
        self, demand: NDArray[np.int64], seconds: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return (repeats of each column, price of each length), or None if time ran out."""
        # Imported here, since loading SciPy takes longer than making most plans.
        from scipy import sparse
        from scipy.optimize import linprog

        entries = [entry for pattern in self.columns for entry in pattern]
        ends = np.cumsum([0, *map(len, self.columns)])
        rows = [self.row_of[length] for length, _ in entries]
        num_rows, num_columns = len(self.lengths), len(self.columns)
        held = sparse.csc_array(
            ([copies for _, copies in entries], rows, ends), shape=(num_rows, num_columns)
        )
        # Column j of `shift` turns a slot of length j + 1 into one of length j, at no cost.
        shift = sparse.diags_array(
            [1.0, -1.0], offsets=[0, -1], shape=(num_rows, num_rows - 1), dtype=np.float64
        )
        found: Any = linprog(
            np.repeat([1.0, 0.0], [num_columns, num_rows - 1]),
            # linprog takes upper bounds only: slots >= demand is negated here, the prices below.
            A_ub=-sparse.hstack([held, shift], format="csc"),
            b_ub=-demand.astype(np.float64),
            method="highs-ds",
            # An infinite budget is no time limit at all.
            options={"time_limit": max(seconds, 0.0)} if seconds < 1e9 else {},
        )
        if found.status != 0:
            return None
        return found.x[:num_columns], np.maximum(-found.ineqlin.marginals, 0.0)


def improve(
    counts: NDArray[np.int64],
    capacity: int,
    max_segments: int,
    *,
    starts: list[Patterns],
    bound: int,
    deadline: float,
) -> tuple[Patterns, Certificate | None]:
    """Return a plan of as few packs as are found in time, and a proof of a lower bound.

    The plan never has more packs than the best of the starts. That one is returned at once,
    without a proof, if it meets the bound, or if one pricing would take more than the time left
    or 400 MB. Deterministic if the search ends before its deadline; a pricing or a linear program
    that began in time may end a little after it.

    Args:
        counts: int64[capacity + 1], examples of each length, not all zero.
        capacity: units a pack holds.
        max_segments: most examples a pack may hold.
        starts: plans by other rules.
        bound: a known lower bound on the number of packs.
        deadline: when to stop, on `time.perf_counter`.
    """
    began = time.perf_counter()

    def seconds_left() -> float:
        return deadline - time.perf_counter()

    best = min(starts, key=lambda plan: plan.num_packs)
    lengths = np.flatnonzero(counts)
    demand = counts[lengths]
    # `most`: examples in a pack of the shortest ones, which no pack exceeds. A limit on segments
    # above it never binds, and then one row of the knapsack's table is enough.
    tokens = np.cumsum(lengths * demand)
    full = int(np.searchsorted(tokens, capacity, side="right"))
    most = int(demand[:full].sum())
    if full < len(lengths):
        most += (capacity - int(tokens[full - 1] if full else 0)) // int(lengths[full])
    limited = max_segments < most
    shape = (max_segments + 1 if limited else 1, capacity + 1)
    pricing_s = shape[0] * capacity * len(lengths) / _STEPS_A_SECOND
    if shape[0] * shape[1] > _MOST_CELLS or seconds_left() < pricing_s:
        return best, None
    worth, last = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    one = min(_ONE, 2**62 // (capacity + 1))  # the knapsack's sums stay below 2**62
    master = _Master(lengths)
    for start in starts:
        master.add(start[pattern][1] for pattern in range(len(start)))
    centre = lengths / capacity
    # The first prices: a unit is worth one, so a pack is worth its capacity at most.
    certificate = _certificate(demand, lengths, lengths, capacity, capacity)
    repeats = None
    while best.num_packs > bound and seconds_left() > pricing_s:
        solved = master.solve(demand, seconds_left())
        if solved is None:
            break
        repeats, prices = solved
        relaxation = float(repeats.sum())
        # Smoothed prices may miss a pattern that would help. Then less smoothing is tried, and last
        # the prices of the LP itself: only they decide whether the search has converged.
        for share in (_SMOOTHING, _SMOOTHING / 2, 0.0):
            smooth = share * centre + (1 - share) * prices
            whole = np.floor(smooth * one).astype(np.int64)
            most_worth(lengths, whole, worth, last)
            proof = _certificate(demand, lengths, whole, int(worth[-1, -1]), capacity)
            if proof.bound > certificate.bound:
                certificate = proof
                # Scaled back so that the best pack is worth one at these prices.
                centre = smooth * (one / proof.pack_worth)
            found = [
                pattern
                for pattern in _patterns_with_each(lengths, last)
                # It helps if it is worth more than the pack it costs; 1e-9 is for the LP's
                # rounding.
                if master.worth(pattern, prices) > 1 + 1e-9
            ]
            if found or seconds_left() < pricing_s:
                break
        bound = max(bound, certificate.bound)
        converged = not found and share == 0.0
        certificate = replace(certificate, relaxation=relaxation, converged=converged)
        # More patterns only lower the relaxation, so at the bound they can prove nothing more.
        if converged or relaxation <= bound or not master.add(found):
            break
    if repeats is None:
        return best, None
    best = _rounded(master, repeats, counts, max_segments, best, bound, seconds_left)
    return best, replace(certificate, seconds=time.perf_counter() - began)


def _certificate(
    demand: NDArray[np.int64],
    lengths: NDArray[np.int64],
    whole: NDArray[np.int64],
    pack_worth: int,
    capacity: int,
) -> Certificate:
    """Return the bound that whole-number prices prove; Python's integers cannot overflow."""
    total = sum(n * price for n, price in zip(demand.tolist(), whole.tolist(), strict=True))
    prices = np.zeros(capacity + 1, np.int64)
    prices[lengths] = whole
    bound = -(-total // max(pack_worth, 1))
    return Certificate(bound, prices, pack_worth, math.inf, converged=False, seconds=0.0)


def _patterns_with_each(lengths: NDArray[np.int64], last: NDArray[np.int32]) -> list[Pattern]:
    """Return for each length the most valuable pattern that holds it; each pattern once."""
    held = np.empty(last.shape[1] // int(lengths[0]) + 1, np.int64)
    values = lengths.tolist()
    found: dict[Pattern, None] = {}
    for first in range(len(values)):
        copies: dict[int, int] = {}
        for number in held[: walk_back(lengths, last, first, held)].tolist():
            copies[values[number]] = copies.get(values[number], 0) + 1
        found[tuple(sorted(copies.items(), reverse=True))] = None
    return list(found)


def _rounded(
    master: _Master,
    repeats: NDArray[np.float64],
    counts: NDArray[np.int64],
    max_segments: int,
    best: Patterns,
    bound: int,
    seconds_left: Callable[[], float],
) -> Patterns:
    """Return the best plan found by diving: round repeats, fix them, solve for the rest, repeat.

    After each round the rest is also packed by first-fit-decreasing, so that there is a whole plan
    whenever the time runs out.
    """
    columns = list(master.columns)
    used = _Master(master.lengths)
    used.add(columns[column] for column in np.flatnonzero(repeats > 1e-9))
    repeats = repeats[repeats > 1e-9]
    parts: list[Patterns] = []
    left = counts
    while left.any():
        # 1e-6: a whole number may come out of the LP a little too small.
        whole = np.floor(repeats + 1e-6)
        if parts:
            # The first round rounds down only. Later ones also round the largest remainders up, a
            # tenth of the packs lost by rounding down but at least one, so that every round fixes
            # something.
            remainders = repeats - whole
            raised = max(1, int(remainders.sum() / 10))
            whole[np.argsort(-remainders, kind="stable")[:raised]] += 1
        slots = pattern_lists.from_pairs(
            zip(whole.astype(np.int64).tolist(), used.columns, strict=True)
        )
        part, left = pattern_lists.fill_slots(slots, left)
        parts.append(part)
        if left.any():
            steps, groups = decreasing.first_fit_decreasing(left, max_segments)
            rest = [pattern_lists.from_steps(steps, groups)]
        else:
            rest = []
        plan = pattern_lists.joined([*parts, *rest])
        if plan.num_packs < best.num_packs:
            best = plan
        if best.num_packs == bound or seconds_left() < 0:
            break
        solved = used.solve(left[master.lengths], seconds_left())
        if solved is None:
            break
        repeats = solved[0]
    return best
