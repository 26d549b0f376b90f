"""`Limits`, the checked limits of a pack, and lower bounds on the number of packs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packpipe import checks

# A rule plans on seq_len + 1 counts of 8 bytes: 128 MiB at this length.
MAX_SEQ_LEN = 2**24


@dataclass(frozen=True)
class Limits:
    """The limits of every pack.

    Attributes:
        seq_len: tokens a pack holds.
        max_segments: most examples a pack may hold; None for no limit.
        segment_multiple: every segment is rounded up to a multiple of this many tokens.
        pack_multiple: a pack holds at most seq_len rounded down to a multiple of this.
        ranks: the number of packs is a multiple of this.
    """

    seq_len: int
    max_segments: int | None = None
    segment_multiple: int = 1
    pack_multiple: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
        # seq_len comes first: it is checked before the limits that refer to it.
        remedies = {
            "seq_len": (MAX_SEQ_LEN, "choose a shorter pack"),
            "segment_multiple": (self.seq_len, "pass 1 for any length"),
            "pack_multiple": (self.seq_len, "pass 1 for any length"),
            "ranks": (2**20, "pass 1 for any number of packs"),
        }
        if self.max_segments is not None:
            remedies["max_segments"] = (2**31, "raise it, or pass None for no limit")
        for name, (high, remedy) in remedies.items():
            number = checks.whole_number(name, getattr(self, name), 1, high, remedy)
            object.__setattr__(self, name, number)
        # Each multiple may be fine alone, yet together they may leave no room for one segment.
        if self.capacity < 1:
            raise ValueError(
                checks.sentence(
                    "segment_multiple",
                    self.segment_multiple,
                    f"1..{self.seq_len // self.pack_multiple * self.pack_multiple} "
                    "(seq_len rounded down to pack_multiple)",
                    "lower it",
                )
            )

    @property
    def capacity(self) -> int:
        """Units that a pack holds; a unit is segment_multiple tokens."""
        return self.seq_len // self.pack_multiple * self.pack_multiple // self.segment_multiple

    @property
    def longest(self) -> int:
        """The longest example that fits, in tokens."""
        return self.capacity * self.segment_multiple

    @property
    def slots(self) -> int:
        """Most examples a pack may hold; no pack holds more than its units."""
        return self.capacity if self.max_segments is None else min(self.max_segments, self.capacity)

    def unit_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64[capacity + 1], a histogram by units, from int64[seq_len + 1] by tokens."""
        # Row u - 1 are the lengths that round up to u units. No example has length 0.
        by_unit = counts[1 : self.longest + 1].reshape(self.capacity, self.segment_multiple)
        return np.concatenate([np.zeros(1, np.int64), by_unit.sum(axis=1)])

    def bound(self, unit_counts: NDArray[np.int64]) -> int:
        """Return the `lower_bound` on the packs of any packer, rounded up to whole ranks."""
        return self.whole_ranks(lower_bound(unit_counts, self.capacity, self.slots))

    def whole_ranks(self, num_packs: int) -> int:
        """Return num_packs rounded up to a multiple of ranks."""
        return -(-num_packs // self.ranks) * self.ranks


def sum_bound(counts: NDArray[np.int64], seq_len: int) -> int:
    """Return ⌈tokens ÷ seq_len⌉ for a histogram counts: int64[seq_len + 1]."""
    tokens = int(counts @ np.arange(seq_len + 1))
    return -(-tokens // seq_len)


def martello_toth_bound(counts: NDArray[np.int64], seq_len: int) -> int:
    """Return the bound L2: never below `sum_bound`, often above it if many examples are long.

    Every example longer than half a pack needs a pack of its own. Take a threshold k: examples of
    k to half a pack fit beside long ones of at most seq_len - k tokens only, and those that
    do not fit there need more packs. The bound is the largest over all k; O(seq_len).

    Source: Martello and Toth, Knapsack Problems (1990), 8.3.2.
    """
    lengths = np.arange(seq_len + 1)
    examples_to = np.cumsum(counts)  # examples of length <= l
    tokens_to = np.cumsum(counts * lengths)
    half = seq_len // 2
    # Arrays over all k at once. `long` are those longer than half that leave room for k tokens.
    k = np.arange(half + 1)
    alone = examples_to[seq_len] - examples_to[half]  # longer than half a pack
    long_examples = examples_to[seq_len - k] - examples_to[half]
    long_tokens = tokens_to[seq_len - k] - tokens_to[half]
    # Shorter than k: left out of the sum. For k = 0 there is none, and -1 would index the end.
    below_k = np.where(k > 0, tokens_to[np.maximum(k - 1, 0)], 0)
    short_tokens = tokens_to[half] - below_k
    unplaced = short_tokens - (long_examples * seq_len - long_tokens)
    return int(alone + np.maximum(0, -(-unplaced // seq_len)).max())


def lower_bound(counts: NDArray[np.int64], seq_len: int, max_segments: int) -> int:
    """Return the largest of the lower bounds: by tokens, L2, and by the limit on segments."""
    by_segments = -(-int(counts.sum()) // max_segments)
    return max(sum_bound(counts, seq_len), martello_toth_bound(counts, seq_len), by_segments)
