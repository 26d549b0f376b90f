"""Lower bounds: how few packs any packer could do with (floor 0)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
