"""`pack_lengths`: assigns every example to exactly one pack, from the lengths alone.

Also says how far the result is from a proven lower bound. Rules that sort by length work on the
histogram (histogram.py, decreasing.py); rules that take examples in the order given are in
in_order.py, and those with a second limit in two_limits.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.packing import histogram, in_order, picture, placement, strategies, two_limits
from packpipe.packing import lengths as fronts
from packpipe.packing.histogram import HistogramPlan
from packpipe.packing.limits import Limits
from packpipe.packing.quality import Quality, attention_work

ARRIVAL_STRATEGIES = ("next_fit", "first_fit", "best_fit")
STRATEGIES = (*strategies.STRATEGIES, *ARRIVAL_STRATEGIES)


@dataclass(frozen=True, eq=False)
class Packs:
    """An assignment of examples to packs; ``packs[p]`` are the examples of pack p.

    ``len(packs)`` counts the packs, iteration yields each pack's examples, ``print(packs)`` shows
    a short table and a notebook a small picture.

    Attributes:
        order: int32[examples] (int64 from 2**31 on), example positions pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        limits: the limits of every pack.
        plan: the plan from the histogram, or None if examples were taken one by one.
        also_fill: share used of the second limit, or None if there is none.
        chunks: the lengths as given, not copied; see `lengths`.
        known_bound: lower bound on the packs from the second limit alone.
    """

    order: NDArray[np.integer]
    offsets: NDArray[np.int64]
    limits: Limits
    plan: HistogramPlan | None
    also_fill: float | None = None
    chunks: list[NDArray[Any]] = field(repr=False, default_factory=list)
    known_bound: int = field(repr=False, default=0)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[Any]:
        # A range checks the bounds and counts negative numbers from the end, as a list does.
        pack = range(len(self))[operator.index(pack)]
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[pack] for pack in range(len(self)))

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""
        return self.limits.seq_len

    @cached_property
    def lengths(self) -> NDArray[Any]:
        """int[examples], tokens per example, as given."""
        return fronts.joined(self.chunks)

    @cached_property
    def quality(self) -> Quality:
        """Fill, lower bound, gap and the other figures."""
        if self.plan is not None:
            return self.plan.quality
        seq_len = self.limits.seq_len
        counts = fronts.count(self.chunks, seq_len, self.limits.longest)
        return Quality(
            num_examples=len(self.order),
            num_tokens=int(counts @ np.arange(len(counts))),
            num_packs=len(self),
            seq_len=seq_len,
            bound=max(self.known_bound, self.limits.bound(self.limits.unit_counts(counts))),
            most_segments=int(self.segments_per_pack.max(initial=0)),
        )

    @property
    def segments_per_pack(self) -> NDArray[np.int64]:
        """int64[packs], examples in each pack."""
        return np.diff(self.offsets)

    @property
    def tokens_per_pack(self) -> NDArray[np.int64]:
        """int64[packs], tokens in each pack, padding not counted."""
        # Differences of one running sum. np.add.reduceat would give an empty pack (see `ranks` of
        # `pack_lengths`) the next pack's first example.
        ends = np.concatenate([[0], np.cumsum(self.lengths[self.order], dtype=np.int64)])
        return np.diff(ends[self.offsets])

    @property
    def attention_work(self) -> NDArray[np.int64]:
        """int64[packs], Σ length² over a pack's segments, the cost of attention within them."""
        return attention_work(self.lengths[self.order], self.offsets)

    @property
    def harmonic_fill(self) -> float | None:
        """Harmonic mean of the fill and of the second limit's, or None if there is none."""
        if self.also_fill is None:
            return None
        fill = self.quality.fill
        both = fill + self.also_fill
        return 2 * fill * self.also_fill / both if both else 0.0

    def redraw(self, *, seed: int, epoch: int = 0) -> Packs:
        """Return packs of the same shapes in which examples of equal length changed places.

        One pass without planning again: gives each epoch other packs. With segment_multiple,
        lengths are equal if they round up to the same multiple.

        Args:
            seed: seed of the shuffle, 0..2**64-1.
            epoch: epoch of the shuffle, 0..2**64-1; each epoch has another one.

        Raises:
            TypeError: seed or epoch is no integer.
            ValueError: the strategy takes examples in the order given; there is a second limit;
                the lengths, which are not copied, were changed; seed or epoch is out of range.
        """
        if self.plan is None:
            raise ValueError(
                "plan is None, expected a strategy that sorts by length, such as 'ffd', and no "
                "second limit; give the examples in a new order instead"
            )
        key = philox.checked_key(seed, epoch)
        # Counted again, since the lengths are the caller's memory and may have changed.
        counts = fronts.count(self.chunks, self.limits.seq_len, self.limits.longest)
        order, offsets = self.plan.place(self.chunks, counts, key)
        return Packs(order, offsets, self.limits, self.plan, chunks=self.chunks)

    def __repr__(self) -> str:
        found = self.quality
        return (
            f"Packs({found.num_examples} examples in {len(self)} packs of {found.seq_len} tokens: "
            f"padding {found.padding:.2%}, at most {found.gap} packs above the optimum)"
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of each figure, ready to print."""
        if self.also_fill is None:
            return self.quality.rows()
        second = f"{self.also_fill:.3%} filled, harmonic mean {self.harmonic_fill:.3%}"
        return [*self.quality.rows(), ("second", second)]

    def __str__(self) -> str:
        return "\n".join(f"{name:<9} {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        return picture.html(
            self.rows(), self.lengths[self.order], self.offsets, self.limits.seq_len
        )


def pack_lengths(
    lengths: Any,
    seq_len: int,
    *,
    strategy: str = "ffd",
    max_segments: int | None = None,
    segment_multiple: int = 1,
    pack_multiple: int = 1,
    ranks: int = 1,
    also: tuple[ArrayLike, int] | None = None,
    budget_s: float = 5.0,
) -> Packs:
    """Assign every example to exactly one pack of at most seq_len tokens.

    Deterministic, without randomness; only the result of "optimal" may depend on how much the
    machine does in its time. Each strategy is exactly the rule named: the tests compare it with a
    naive twin. Examples of one length fill their places pack by pack, in the order given.

    =============== =============================================================================
    ``"ffd"``       longest first, into the first pack with room (first-fit-decreasing)
    ``"bfd"``       longest first, into the pack with the least room that suffices (LPFHP)
    ``"spfhp"``     longest first, into the packs with the most room
    ``"balanced"``  longest first, into the least loaded of as few packs as bisection finds; the
                    shortest where they fit tightest: few and even numbers of segments a pack
    ``"optimal"``   column generation: as few packs as are found in budget_s, with a proven bound
    ``"nnlshp"``    at most three a pack, by non-negative least squares; slow, for comparison
    ``"next_fit"``  in the order given, into the last pack or a new one
    ``"first_fit"`` in the order given, into the first pack with room
    ``"best_fit"``  in the order given, into the pack with the least room that suffices
    =============== =============================================================================

    Beside lengths and the result, which is 4 bytes an example and 8 a pack, at most 4 more bytes an
    example are held at a time, whatever the lengths' integer type. The rules that take examples in
    the order given hold about 9, a second limit about 60. A Python list is copied first: 8 more.

    Args:
        lengths: int[examples], tokens per example, each in 1..seq_len: a sequence, NumPy array
            of any integer dtype, or Arrow array (chunked and sliced ones are not copied).
        seq_len: tokens a pack holds, 1..2**24.
        strategy: the packing rule, one of the above.
        max_segments: most examples a pack may hold; None for no limit.
        segment_multiple: each segment is rounded up to a multiple of this many tokens (for FP8
            kernels or context parallelism); the rounding takes room in the pack.
        pack_multiple: a pack holds at most seq_len rounded down to a multiple of this.
        ranks: the number of packs is a multiple of this: packs are cut in two as needed, and
            are empty only if there are fewer examples than packs.
        also: (cost, limit), a second limit: int[examples] costs, 0 or more, whose sum in a pack
            is at most limit. With "ffd" and "bfd" only, which then take first the examples with
            the largest share of either limit.
        budget_s: seconds that "optimal" may take; the best plan found by then is returned.

    Returns:
        Packs, in order of their creation.

    Raises:
        TypeError: lengths or a limit are no integers.
        ValueError: a length lies outside 1..seq_len (the message names the first), is null, or an
            argument is out of range.

    >>> packs = pack_lengths([5, 3, 4, 2, 2], seq_len=8)
    >>> [pack.tolist() for pack in packs]
    [[0, 1], [2, 3, 4]]
    >>> packs
    Packs(5 examples in 2 packs of 8 tokens: padding 0.00%, at most 0 packs above the optimum)
    >>> print(packs)
    examples  5
    tokens    16
    packs     2 of 8 tokens (at least 2 needed, gap 0)
    padding   0.000%
    segments  2.50 a pack, 3 at most

    Source: NaViT A.3; Krell 3.1; Johnson, Near-Optimal Bin Packing Algorithms (1973).
    """
    limits = Limits(seq_len, max_segments, segment_multiple, pack_multiple, ranks)
    checks.choice("strategy", strategy, STRATEGIES, "choose a packing rule")
    budget_s = histogram.checked_budget(budget_s)
    chunks = fronts.chunks_of(lengths)
    counts = fronts.count(chunks, limits.seq_len, limits.longest)
    if also is not None:
        return _pack_with_two_limits(chunks, limits, strategy, also)
    if strategy in strategies.STRATEGIES:
        plan = histogram.planned(counts, limits, strategy, budget_s)
        order, offsets = plan.place(chunks, counts)
        return Packs(order, offsets, limits, plan, chunks=chunks)
    rules = {
        "next_fit": in_order.next_fit,
        "first_fit": in_order.first_fit,
        "best_fit": in_order.best_fit,
    }
    # These rules need each example in turn, so several chunks are copied into one array.
    array = fronts.unit_view(fronts.joined(chunks), limits.segment_multiple)
    numbers = np.empty(len(array), fronts.index_dtype(len(array)))
    num_packs = rules[strategy](array, limits.capacity, limits.slots, numbers)
    order, offsets = grouped(numbers, num_packs, limits.ranks)
    return Packs(order, offsets, limits, None, chunks=chunks)


def grouped(
    numbers: NDArray[Any], num_packs: int, ranks: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (order, offsets) of int[examples] pack numbers, the packs a multiple of ranks.

    Missing packs are made by cutting the last pack of two examples or more in half, again and
    again, as `split_to_multiple` does with patterns. Empty packs come last.
    """
    offsets = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=num_packs))])
    order = np.empty(len(numbers), fronts.index_dtype(len(numbers)))
    placement.group_by_pack(numbers, offsets[:-1].copy(), order)
    missing = -num_packs % ranks
    cuts: list[int] = []
    parts: list[tuple[int, int]] = []  # of the pack being cut, the last on top
    while len(cuts) < missing and (parts or num_packs):
        if not parts:
            num_packs -= 1
            parts.append((int(offsets[num_packs]), int(offsets[num_packs + 1])))
        start, stop = parts.pop()
        if stop - start > 1:
            middle = (start + stop + 1) // 2
            cuts.append(middle)
            parts += [(start, middle), (middle, stop)]
    # A cut within a pack is one more offset, an empty pack an offset at the end.
    empty = [len(order)] * (missing - len(cuts))
    return order, np.sort(np.concatenate([offsets, np.array(cuts + empty, np.int64)]))


def _pack_with_two_limits(
    chunks: list[NDArray[Any]], limits: Limits, strategy: str, also: Any
) -> Packs:
    """Pack by tokens and by a second cost at once."""
    if strategy not in two_limits.STRATEGIES:
        raise ValueError(
            checks.sentence("strategy", strategy, "'ffd' or 'bfd' with also=...", "choose one")
        )
    lengths = fronts.joined(chunks)
    cost, limit = two_limits.checked(also, len(lengths))
    units = fronts.unit_view(lengths, limits.segment_multiple).astype(np.int64)
    visited, numbers, num_packs = two_limits.pack(
        units, cost, limits.capacity, limit, limits.slots, strategy
    )
    order, offsets = grouped(numbers, num_packs, limits.ranks)
    # Costs are at most limit each; Python's integers where their sum could overflow int64.
    exact = np.int64 if limit * max(len(cost), 1) < 2**63 else object
    spent = int(cost.sum(dtype=exact))
    return Packs(
        # Numbers are in the order taken, so `order` points into `visited`, not into the lengths.
        visited[order].astype(order.dtype),
        offsets,
        limits,
        None,
        also_fill=spent / (limit * (len(offsets) - 1)) if len(offsets) > 1 else 1.0,
        chunks=chunks,
        known_bound=limits.whole_ranks(-(-spent // limit)),
    )
