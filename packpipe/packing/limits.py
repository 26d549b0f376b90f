"""What a pack may hold, checked once: capacity, segments, alignment, ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packpipe import checks

# A rule plans on seq_len + 1 counts: 128 MiB at this length.
MAX_SEQ_LEN = 2**24


@dataclass(frozen=True)
class Limits:
    """The limits of every pack.

    Attributes:
        seq_len: tokens a pack holds.
        max_segments: most examples a pack may hold; None for no limit.
        segment_multiple: every segment takes a multiple of so many tokens.
        pack_multiple: the tokens taken in a pack are at most seq_len rounded down to a multiple.
        ranks: the number of packs is a multiple of it.
    """

    seq_len: int
    max_segments: int | None = None
    segment_multiple: int = 1
    pack_multiple: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
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
        """Units of segment_multiple tokens that a pack holds."""
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
        """Return int64[capacity + 1] of int64[seq_len + 1]: the histogram by units."""
        by_unit = counts[1 : self.longest + 1].reshape(self.capacity, self.segment_multiple)
        return np.concatenate([np.zeros(1, np.int64), by_unit.sum(axis=1)])

    def bound(self, unit_counts: NDArray[np.int64]) -> int:
        """Return the packs that any packer needs, as far as simple bounds prove."""
        return self.whole_ranks(lower_bound(unit_counts, self.capacity, self.slots))

    def whole_ranks(self, num_packs: int) -> int:
        """Return num_packs rounded up to a multiple of ranks."""
        return -(-num_packs // self.ranks) * self.ranks


def sum_bound(counts: NDArray[np.int64], seq_len: int) -> int:
    """Return ⌈tokens ÷ seq_len⌉ for a histogram counts: int64[seq_len + 1]."""
    tokens = int(counts @ np.arange(seq_len + 1))
    return -(-tokens // seq_len)


def martello_toth_bound(counts: NDArray[np.int64], seq_len: int) -> int:
    """Return the bound L2: never below `sum_bound`, often above it when long examples abound.

    For a threshold k, examples longer than seq_len - k and those longer than half a pack all
    need a pack of their own; of those from k to half, the tokens that do not fit beside the
    latter need more. The bound is the best over all k; O(seq_len).

    Source: Martello and Toth, Knapsack Problems (1990), 8.3.2.
    """
    lengths = np.arange(seq_len + 1)
    examples_to = np.cumsum(counts)  # examples of length <= l
    tokens_to = np.cumsum(counts * lengths)
    half = seq_len // 2
    k = np.arange(half + 1)
    alone = examples_to[seq_len] - examples_to[half]  # longer than half a pack
    long_examples = examples_to[seq_len - k] - examples_to[half]
    long_tokens = tokens_to[seq_len - k] - tokens_to[half]
    below_k = np.where(k > 0, tokens_to[np.maximum(k - 1, 0)], 0)
    short_tokens = tokens_to[half] - below_k
    unplaced = short_tokens - (long_examples * seq_len - long_tokens)
    return int(alone + np.maximum(0, -(-unplaced // seq_len)).max())


def lower_bound(counts: NDArray[np.int64], seq_len: int, max_segments: int) -> int:
    """Return the best proven bound: L2, or what the limit on segments asks for."""
    by_segments = -(-int(counts.sum()) // max_segments)
    return max(sum_bound(counts, seq_len), martello_toth_bound(counts, seq_len), by_segments)
