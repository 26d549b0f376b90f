"""The packer: every example to exactly one pack (floor 0).

Knows lengths only: it decides which examples share a pack, from the vector of lengths
alone, and says how far the result is from the proven optimum. The kernels are in rules.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import bounds, checks, rules

STRATEGIES = ("ffd", "next_fit")

# A rule plans on a histogram of seq_len + 1 counts: 128 MiB at this length.
MAX_SEQ_LEN = 2**24


@dataclass(frozen=True, eq=False)
class Packs:
    """An assignment of examples to packs; ``packs[p]`` are the examples of pack p.

    ``len(packs)`` counts the packs, iteration yields each pack's examples.

    Attributes:
        order: int64[examples], example positions pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        seq_len: tokens a pack holds.
        num_tokens: tokens of all examples.
        bound: packs below which no packer can go.
    """

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    seq_len: int
    num_tokens: int
    bound: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        pack = range(len(self))[operator.index(pack)]
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))

    @property
    def fill(self) -> float:
        """Real tokens ÷ slots; 1.0 when there are no packs."""
        return fill(self.num_tokens, len(self), self.seq_len)

    @property
    def padding(self) -> float:
        """Share of slots that hold no token."""
        return 1.0 - self.fill

    @property
    def gap(self) -> int:
        """Packs above the proven lower bound."""
        return len(self) - self.bound

    def __repr__(self) -> str:
        return (
            f"Packs({len(self.order)} examples in {len(self)} packs of {self.seq_len} tokens: "
            f"padding {self.padding:.2%}, at most {self.gap} packs above the optimum)"
        )


def fill(num_tokens: int, num_packs: int, seq_len: int) -> float:
    """Return real tokens ÷ slots; 1.0 when there are no packs."""
    return num_tokens / (num_packs * seq_len) if num_packs else 1.0


def pack_lengths(
    lengths: ArrayLike, seq_len: int, *, strategy: str = "ffd", max_segments: int | None = None
) -> Packs:
    """Assign every example to exactly one pack of at most seq_len tokens.

    Deterministic: ``"ffd"`` takes the longest first, ties by position, and puts each into
    the first pack with room; ``"next_fit"`` takes them as given and keeps one pack open (the
    baseline). Holds no randomness.

    Args:
        lengths: int[examples], tokens per example, each in 1..seq_len.
        seq_len: tokens a pack holds, 1..2**24.
        strategy: the packing rule, ``"ffd"`` or ``"next_fit"``.
        max_segments: most examples a pack may hold; None for no limit.

    Returns:
        Packs: ``order`` and ``offsets``, in order of the packs' creation.

    Raises:
        TypeError: lengths or a limit are no integers.
        ValueError: a length lies outside 1..seq_len (the message names the first), or an
            argument is out of range.

    >>> packs = pack_lengths([5, 3, 4, 2, 2], seq_len=8)
    >>> [pack.tolist() for pack in packs]
    [[0, 1], [2, 3, 4]]
    >>> packs
    Packs(5 examples in 2 packs of 8 tokens: padding 0.00%, at most 0 packs above the optimum)

    Source: NaViT A.3; Krell 3.1; Johnson, Near-Optimal Bin Packing Algorithms (1973).
    """
    seq_len = checks.whole_number("seq_len", seq_len, 1, MAX_SEQ_LEN, "choose a shorter pack")
    strategy = checks.choice("strategy", strategy, STRATEGIES, "choose a packing rule")
    if max_segments is None:
        max_segments = seq_len
    max_segments = checks.whole_number(
        "max_segments", max_segments, 1, 2**31, "raise it, or pass None for no limit"
    )
    array = _checked_lengths(lengths, seq_len)
    counts = np.bincount(array, minlength=seq_len + 1).astype(np.int64, copy=False)
    if strategy == "ffd":
        rows, used, num_packs = rules.first_fit_decreasing(
            counts, seq_len, max_segments, block_size_of(seq_len)
        )
        scratch = np.empty(len(array), np.int32 if len(array) < 2**31 else np.int64)
        order, offsets = rules.expand(array, counts, rows[:used], num_packs, scratch)
    else:
        offsets = rules.next_fit(array, seq_len, max_segments)
        order = np.arange(len(array))
    return Packs(
        order=order,
        offsets=offsets,
        seq_len=seq_len,
        num_tokens=int(counts @ np.arange(seq_len + 1)),
        bound=bounds.lower_bound(counts, seq_len, max_segments),
    )


def block_size_of(seq_len: int) -> int:
    """Return the runs a block of `rules.first_fit_decreasing`: √seq_len, 64 at least."""
    return max(64, math.isqrt(seq_len))


def _checked_lengths(lengths: ArrayLike, seq_len: int) -> NDArray[np.int32]:
    """Return lengths as int32[examples], the one dtype the kernels are compiled for."""
    array = checks.integer_array("lengths", lengths, 1, "pass tokens per example")
    if array.size and not (array.min() >= 1 and array.max() <= seq_len):
        where = int(np.flatnonzero((array < 1) | (array > seq_len))[0])
        raise ValueError(
            f"lengths[{where}] is {array[where]}, expected 1..{seq_len} (seq_len); "
            "raise seq_len, or shorten or reject the example"
        )
    return np.ascontiguousarray(array, dtype=np.int32)
