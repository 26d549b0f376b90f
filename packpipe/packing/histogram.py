"""Plans from a histogram of lengths: what every pack holds.

Examples of one length are interchangeable, so a plan is made from counts alone, in milliseconds
whatever the number of examples. It is a list of patterns with repeat counts, in pack order. A
separate pass gives each example its pack number, or writes (order, offsets). Histograms add: shards
are counted apart, planned as one, and numbered apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.packing import lengths as fronts
from packpipe.packing import patterns as pattern_lists
from packpipe.packing import placement, strategies
from packpipe.packing.cutting_stock import Certificate
from packpipe.packing.limits import Limits
from packpipe.packing.patterns import Patterns
from packpipe.packing.quality import Quality
from packpipe.philox import Key

_SHUFFLED_AT_ONCE = 2**18  # places; their random numbers take 2 MiB


@dataclass(frozen=True, eq=False)
class HistogramPlan:
    """What every pack of a plan from a histogram holds; ``len(plan)`` counts the packs.

    Examples of one length fill their places pack by pack, in the order given; within a
    pack the longest comes first.

    Attributes:
        limits: the limits of every pack.
        counts: int64[seq_len + 1], examples of each length.
        patterns: lengths and repeat counts in pack order, in units of ``segment_multiple`` tokens.
        certificate: the proof of ``"optimal"``, if a search was needed and there was time.
    """

    limits: Limits
    counts: NDArray[np.int64]
    patterns: Patterns
    certificate: Certificate | None = None

    def __len__(self) -> int:
        return self.patterns.num_packs

    @cached_property
    def quality(self) -> Quality:
        """Fill, lower bound, gap and the other figures."""
        proven = self.certificate.bound if self.certificate else 0
        return Quality(
            num_examples=int(self.counts.sum()),
            num_tokens=int(self.counts @ np.arange(len(self.counts))),
            num_packs=len(self),
            seq_len=self.limits.seq_len,
            bound=self.limits.whole_ranks(
                max(proven, self.limits.bound(self.limits.unit_counts(self.counts)))
            ),
            most_segments=int(self.patterns.num_segments.max(initial=0)),
        )

    def __repr__(self) -> str:
        found = self.quality
        return (
            f"HistogramPlan({found.num_examples} examples in {len(self)} packs of "
            f"{found.seq_len} tokens, {len(self.patterns)} patterns: "
            f"padding {found.padding:.2%}, at most {found.gap} packs above the optimum)"
        )

    def __str__(self) -> str:
        return str(self.quality)

    def expand(
        self, lengths: Any, *, seed: int | None = None, epoch: int = 0
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Return (order, offsets): pack p holds the examples ``order[offsets[p]:offsets[p + 1]]``.

        With a seed, examples of one length (after rounding up to segment_multiple) change
        places among themselves: each epoch gets other packs of the same shapes, without planning
        again.

        Args:
            lengths: int[examples], tokens per example; their histogram must be the plan's.
            seed: seed of the shuffle, 0..2**64-1; None for no shuffle.
            epoch: epoch of the shuffle, 0..2**64-1; each epoch has another one.

        Returns:
            order: int32[examples] (int64 from 2**31 examples on), and offsets: int64[packs + 1].

        Raises:
            TypeError: lengths hold no integers.
            ValueError: a length lies outside 1..seq_len, or the histogram is not the plan's.
        """
        chunks = fronts.chunks_of(lengths)
        counts = fronts.count(chunks, self.limits.seq_len, self.limits.longest)
        key = None if seed is None else philox.checked_key(seed, epoch)
        return self.place(chunks, counts, key)

    def place(
        self,
        chunks: list[NDArray[Any]],
        counts: NDArray[np.int64],
        key: Key | None = None,
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Return (order, offsets) as `expand` does, from chunks of lengths and their histogram."""
        # The kernels check no bounds: another histogram would write outside of the arrays.
        self._check(counts, self.counts, "")
        num_examples = sum(map(len, chunks))
        dtype = fronts.index_dtype(num_examples)
        members = np.empty(num_examples, dtype)
        # Longest first, so that reversed, as the shuffle needs them, the groups' ends rise.
        ends = self._longest_first()
        starts = ends - self.limits.unit_counts(self.counts)
        next_place = starts.copy()
        for start, units in fronts.pieces(chunks, self.limits.segment_multiple):
            placement.sort_by_length(units, start, next_place, members)
        if key is not None:
            _shuffle(members, ends[::-1], key)
        order = np.empty(num_examples, dtype)
        held = self.patterns
        # `starts` still marks the first example of each length; sorting moved `next_place` on.
        placement.fill_packs(held.repeats, held.offsets, held.entries, starts, members, order)
        # Before the offsets are allocated: at most 8 bytes an example at a time, unless packs hold
        # fewer than two.
        del members
        offsets = np.empty(len(self) + 1, np.int64)
        placement.end_packs(held.repeats, held.num_segments, offsets)
        return order, offsets

    def pack_numbers(self, lengths: Any, *, before: ArrayLike | None = None) -> NDArray[np.integer]:
        """Return the pack number of each example, in one pass and less memory than `expand`.

        Args:
            lengths: int[examples], tokens per example: all of them, or those of one shard.
            before: int[seq_len + 1], how many examples of each length earlier shards hold
                (the sum of their histograms); None if there are none.

        Returns:
            int32[examples] (int64 from 2**31 packs on).

        Raises:
            TypeError: lengths or before hold no integers.
            ValueError: a length lies outside 1..seq_len, or the plan has too few examples of it.
        """
        chunks = fronts.chunks_of(lengths)
        counts = fronts.count(chunks, self.limits.seq_len, self.limits.longest)
        skipped = (
            np.zeros_like(counts)
            if before is None
            else _checked_counts("before", before, self.limits)
        )
        self._check(skipped, self.counts, "at most ")
        self._check(counts, self.counts - skipped, "at most ")
        dtype = fronts.index_dtype(len(self))
        take, skip = self.limits.unit_counts(counts), self.limits.unit_counts(skipped)
        # `places` holds pack numbers, length by length; each example takes the next one of its
        # length.
        next_place = np.concatenate([[0], np.cumsum(take)[:-1]])
        places = np.empty(int(take.sum()), dtype)
        first_row, rows = self._rows_by_length
        placement.number_places(first_row, rows, skip, take, places)
        numbers = np.empty(len(places), dtype)
        for start, units in fronts.pieces(chunks, self.limits.segment_multiple):
            placement.look_up(units, next_place, places, numbers[start : start + len(units)])
        return numbers

    @cached_property
    def _rows_by_length(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each length's rows begin, and the rows: (first pack, packs, copies)."""
        held = self.patterns
        patterns = np.repeat(np.arange(len(held)), np.diff(held.offsets))
        # Stable, so that the rows of a length stay in pack order, as `number_places` needs them.
        by_length = np.argsort(held.entries[:, 0], kind="stable")
        first_pack = np.cumsum(held.repeats) - held.repeats
        of_entry = patterns[by_length]
        rows = np.stack(
            [first_pack[of_entry], held.repeats[of_entry], held.entries[by_length, 1]], axis=1
        )
        lengths = np.arange(self.limits.capacity + 2)
        return np.searchsorted(held.entries[by_length, 0], lengths), rows

    def _longest_first(self) -> NDArray[np.int64]:
        """Return int64[capacity + 1], where each length's examples end, longest first."""
        return np.cumsum(self.limits.unit_counts(self.counts)[::-1])[::-1].copy()

    def _check(self, counts: NDArray[np.int64], allowed: NDArray[np.int64], most: str) -> None:
        wrong = np.flatnonzero(counts > allowed if most else counts != allowed)
        if wrong.size:
            length = int(wrong[0])
            number = f"examples of length {length}"
            expected = f"{most}{allowed[length]} (the plan's)"
            remedy = "pass the lengths that were counted"
            raise ValueError(checks.sentence(number, int(counts[length]), expected, remedy))


def count_lengths(lengths: Any, seq_len: int) -> NDArray[np.int64]:
    """Return int64[seq_len + 1], how many examples there are of each length.

    Histograms add, so shards can be counted on different machines and planned as one.

    Args:
        lengths: int[examples], tokens per example, each in 1..seq_len; NumPy or Arrow.
        seq_len: tokens a pack holds, 1..2**24.

    Raises:
        TypeError: lengths hold no integers.
        ValueError: a length is null or outside 1..seq_len; the message names the first.

    >>> count_lengths([5, 3, 5, 1], seq_len=6).tolist()
    [0, 1, 0, 1, 0, 2, 0]
    """
    limits = Limits(seq_len)
    return fronts.count(fronts.chunks_of(lengths), limits.seq_len, limits.longest)


def plan_histogram(
    counts: ArrayLike,
    seq_len: int,
    *,
    strategy: str = "ffd",
    max_segments: int | None = None,
    segment_multiple: int = 1,
    pack_multiple: int = 1,
    ranks: int = 1,
    budget_s: float = 5.0,
) -> HistogramPlan:
    """Return a plan for a histogram of lengths: patterns with repeat counts.

    The cost depends on the number of distinct lengths, not of examples.

    Args:
        counts: int[lengths], examples of length 0, 1, 2, ...; none of length 0 or above seq_len.
        seq_len: tokens a pack holds, 1..2**24.
        strategy: "ffd", "bfd", "spfhp", "nnlshp", "balanced" or "optimal"; `pack_lengths` says
            what each does.
        max_segments: most examples a pack may hold; None for no limit.
        segment_multiple: each segment is rounded up to a multiple of this many tokens.
        pack_multiple: a pack holds at most seq_len rounded down to a multiple of this.
        ranks: the number of packs is a multiple of this.
        budget_s: seconds that "optimal" may take.

    Raises:
        TypeError: counts or a limit are no integers.
        ValueError: counts are negative or for lengths that do not fit, or an argument is out
            of range.

    >>> plan = plan_histogram([0, 0, 2, 4], seq_len=8)
    >>> [plan.patterns[pattern] for pattern in range(len(plan.patterns))]
    [(2, ((3, 2), (2, 1)))]
    >>> plan
    HistogramPlan(6 examples in 2 packs of 8 tokens, 1 patterns: padding 0.00%, at most 0 packs \
above the optimum)

    Source: NaViT A.3; Krell 3.1; Johnson, Near-Optimal Bin Packing Algorithms (1973).
    """
    limits = Limits(seq_len, max_segments, segment_multiple, pack_multiple, ranks)
    checks.choice(
        "strategy", strategy, strategies.STRATEGIES, "choose a packing rule for histograms"
    )
    budget_s = checked_budget(budget_s)
    return planned(_checked_counts("counts", counts, limits), limits, strategy, budget_s)


def planned(
    counts: NDArray[np.int64], limits: Limits, strategy: str, budget_s: float
) -> HistogramPlan:
    """Return the plan of `plan_histogram`; the arguments have been checked already."""
    patterns, certificate = strategies.patterns_of(
        limits.unit_counts(counts), limits, strategy, budget_s
    )
    patterns = pattern_lists.split_to_multiple(patterns, limits.ranks)
    return HistogramPlan(limits, counts, patterns, certificate)


def _shuffle(members: NDArray[Any], ends: NDArray[np.int64], key: Key) -> None:
    """Shuffle members within each group; place i takes word i % 4 of index i // 4."""
    # Four words an index are a whole block of Philox, so no word is made in vain; the pieces are
    # multiples of four, so that cutting into pieces changes no draw.
    group = 0
    for start in range(0, len(members), _SHUFFLED_AT_ONCE):
        stop = min(start + _SHUFFLED_AT_ONCE, len(members))
        words = philox.words(
            key,
            index=np.arange(start // 4, -(-stop // 4)),
            stream=philox.MEMBERS,
            num_words=4,
        )
        uniforms = philox.uniform_from(words.ravel()[: stop - start])
        group = placement.shuffle(members, ends, group, start, uniforms)


def _checked_counts(name: str, counts: ArrayLike, limits: Limits) -> NDArray[np.int64]:
    """Return counts as int64[seq_len + 1]."""
    remedy = f"pass examples of length 0, 1, ... {limits.longest}"
    array = checks.integer_array(name, counts, 1, remedy)
    wrong = np.flatnonzero(array < 0)
    if wrong.size:
        where = int(wrong[0])
        raise ValueError(
            checks.sentence(f"{name}[{where}]", int(array[where]), "0 or more", "counts only")
        )
    allowed = np.arange(len(array))
    wrong = np.flatnonzero((array != 0) & ((allowed < 1) | (allowed > limits.longest)))
    if wrong.size:
        where = int(wrong[0])
        expected = f"0, since lengths are 1..{limits.longest}"
        raise ValueError(checks.sentence(f"{name}[{where}]", int(array[where]), expected, remedy))
    # Added up as floats: an int64 sum could overflow before it is compared. Below 2**62, all later
    # int64 sums of tokens are safe.
    tokens = float(array.sum(dtype=np.float64)) * limits.seq_len
    if tokens >= 2.0**62:
        expected = f"below 2**62 / {limits.seq_len} (seq_len)"
        total = int(array.astype(object).sum())
        raise ValueError(checks.sentence(f"sum({name})", total, expected, "plan fewer at once"))
    padded = np.zeros(limits.seq_len + 1, np.int64)
    # Counts beyond seq_len are zeros here, so they may be cut off.
    padded[: len(array)] = array[: len(padded)]
    return padded


def checked_budget(budget_s: Any) -> float:
    """Return a time budget in seconds as a float above 0."""
    error = checks.sentence("budget_s", budget_s, "seconds above 0", "math.inf sets no limit")
    if isinstance(budget_s, bool) or not isinstance(budget_s, Real):
        raise TypeError(error)
    # Not `<= 0`, which NaN would pass.
    if not float(budget_s) > 0:
        raise ValueError(error)
    return float(budget_s)
