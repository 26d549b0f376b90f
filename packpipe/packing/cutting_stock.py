"""Near-optimal plans with a certificate: column generation over patterns.

The fewest packs are the fewest patterns that cover the histogram (the cutting-stock problem).
Its linear relaxation is solved over a growing set of patterns: an LP (SciPy's HiGHS) prices
each length, a knapsack kernel finds the patterns worth most at these prices, and so on until none
is worth more than a pack. Fractional repeats are then rounded, the rest solved again, and so on.

The certificate is integer arithmetic and needs no trust in the LP: if every pack that could be
made is worth at most V at whole-number prices, no packer needs fewer than
ceil(worth of all examples / V) packs. Any prices give a valid bound; good ones a tight one.

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

_ONE = 2**40  # the worth of a pack, in whole numbers
# Share of the best prices so far in the prices tried. Without it the Wikipedia histogram
# converged in 1.2 s, but with 3 or 4 segments a pack not in 5 s; with 0.5 to 0.9 all did.
_SMOOTHING = 0.9
# What the knapsack kernel does at the least (it cannot be stopped, so it is not begun late).
_STEPS_A_SECOND = 3e8
_MOST_CELLS = 2**25  # of its tables, 12 bytes each


@dataclass(frozen=True, eq=False)
class Certificate:
    """A proof that no packer needs fewer than so many packs, and what finding it took.

    Attributes:
        bound: packs below which no packer can go: ⌈worth of all examples ÷ pack_worth⌉.
        prices: int64[capacity + 1], what an example of each length (in units) is worth.
        pack_worth: the most that any allowed pack can be worth at these prices.
        relaxation: packs of the last linear program, a fractional plan.
        converged: whether no pattern could improve that fractional plan any more.
        seconds: time the whole search took.
    """

    bound: int
    prices: NDArray[np.int64]
    pack_worth: int
    relaxation: float
    converged: bool
    seconds: float


@njit(cache=True)
def most_worth(lengths, prices, worth, last):  # type: ignore[no-untyped-def]
    """Fill worth[k, room], the most that up to k examples in so much room can be worth.

    A knapsack with any number of each length. O(rows * capacity * lengths).

    Args:
        lengths: int64[lengths], rising.
        prices: int64[lengths], whole numbers.
        worth: int64[slots + 1, capacity + 1], its first row and column zeros; or
            int64[1, capacity + 1] for any number of examples.
        last: int32, like worth: the number of the length to put in, or -1 to leave a unit free.
    """
    limited = 1 if worth.shape[0] > 1 else 0
    for k in range(limited, worth.shape[0]):
        for room in range(1, worth.shape[1]):
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
    """Write the numbers of the lengths in the pack worth most that holds one; return how many.

    Args:
        lengths: int64[lengths], rising.
        last: as `most_worth` leaves it.
        first: the number of the length that the pack holds in any case.
        held: int64[slots], written; the first one stands first.
    """
    limited = 1 if last.shape[0] > 1 else 0
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
    """The linear program: the fewest patterns whose slots cover the examples.

    A slot takes its own length or a shorter one. The columns that say so make a longer example
    worth no less than a shorter one, without which prices jump about.
    """

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths
        self.row_of = {length: row for row, length in enumerate(lengths.tolist())}
        self.columns: dict[Pattern, None] = {}  # an ordered set

    def add(self, patterns: Iterable[Pattern]) -> bool:
        """Add patterns; return whether any was new. Old ones stay where they are."""
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
        # Imported here, since SciPy takes longer to load than most plans to make.
        from scipy import sparse
        from scipy.optimize import linprog

        entries = [entry for pattern in self.columns for entry in pattern]
        ends = np.cumsum([0, *map(len, self.columns)])
        rows = [self.row_of[length] for length, _ in entries]
        num_rows, num_columns = len(self.lengths), len(self.columns)
        held = sparse.csc_array(
            ([copies for _, copies in entries], rows, ends), shape=(num_rows, num_columns)
        )
        shift = sparse.diags_array(
            [1.0, -1.0], offsets=[0, -1], shape=(num_rows, num_rows - 1), dtype=np.float64
        )
        found: Any = linprog(
            np.repeat([1.0, 0.0], [num_columns, num_rows - 1]),
            A_ub=-sparse.hstack([held, shift], format="csc"),
            b_ub=-demand.astype(np.float64),
            method="highs-ds",
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
    """Return a plan of as few packs as could be found in time, and a proof.

    Never more packs than the best of the starts, which is returned at once, without a proof, if
    it meets the bound, or if one pricing would take longer than there is time (or 400 MB).
    Deterministic if the search ends before its deadline; a pricing or a linear program that
    was begun in time may end a little after it.

    Args:
        counts: int64[capacity + 1], examples of each length, not all zero.
        capacity: units a pack holds.
        max_segments: most examples a pack may hold.
        starts: plans by other rules.
        bound: packs that are known to be needed.
        deadline: when to stop, on `time.perf_counter`.
    """
    began = time.perf_counter()

    def seconds_left() -> float:
        return deadline - time.perf_counter()

    best = min(starts, key=lambda plan: plan.num_packs)
    lengths = np.flatnonzero(counts)
    demand = counts[lengths]
    # No pack holds more examples than the shortest ones that there are, side by side.
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
    # To begin with a token is worth one, and a pack no more than its capacity.
    certificate = _certificate(demand, lengths, lengths, capacity, capacity)
    repeats = None
    while best.num_packs > bound and seconds_left() > pricing_s:
        solved = master.solve(demand, seconds_left())
        if solved is None:
            break
        repeats, prices = solved
        relaxation = float(repeats.sum())
        for share in (_SMOOTHING, _SMOOTHING / 2, 0.0):
            smooth = share * centre + (1 - share) * prices
            whole = np.floor(smooth * one).astype(np.int64)
            most_worth(lengths, whole, worth, last)
            proof = _certificate(demand, lengths, whole, int(worth[-1, -1]), capacity)
            if proof.bound > certificate.bound:
                certificate = proof
                centre = smooth * (one / proof.pack_worth)
            found = [
                pattern
                for pattern in _patterns_with_each(lengths, last)
                if master.worth(pattern, prices) > 1 + 1e-9
            ]
            if found or seconds_left() < pricing_s:
                break
        bound = max(bound, certificate.bound)
        converged = not found and share == 0.0
        certificate = replace(certificate, relaxation=relaxation, converged=converged)
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
    """Return what whole-number prices prove, in Python's integers, which cannot overflow."""
    total = sum(n * price for n, price in zip(demand.tolist(), whole.tolist(), strict=True))
    prices = np.zeros(capacity + 1, np.int64)
    prices[lengths] = whole
    bound = -(-total // max(pack_worth, 1))
    return Certificate(bound, prices, pack_worth, math.inf, converged=False, seconds=0.0)


def _patterns_with_each(lengths: NDArray[np.int64], last: NDArray[np.int32]) -> list[Pattern]:
    """Return for each length the pattern worth most of those that hold it, without repeats."""
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
    """Return the best plan found by diving: round down, round the largest remainders up, repeat.

    What is left after each dive is also packed by first fit, so that the time may run out.
    """
    columns = list(master.columns)
    used = _Master(master.lengths)
    used.add(columns[column] for column in np.flatnonzero(repeats > 1e-9))
    repeats = repeats[repeats > 1e-9]
    parts: list[Patterns] = []
    left = counts
    while left.any():
        whole = np.floor(repeats + 1e-6)
        if parts:
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
