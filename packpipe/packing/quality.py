"""`Quality`: the figures of a packing, computed from counts, and a short table of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def fill(num_tokens: int, num_packs: int, seq_len: int) -> float:
    """Return real tokens ÷ slots; 1.0 when there are no packs."""
    return num_tokens / (num_packs * seq_len) if num_packs else 1.0


def attention_work(
    seq_lens: NDArray[np.integer], offsets: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return int64[packs], Σ length² over a pack's segments: the cost of attention within them.

    Args:
        seq_lens: int[segments], tokens of each, pack by pack.
        offsets: int[packs + 1], where each pack begins in seq_lens.
    """
    # int64 before squaring: 46341 tokens squared are more than int32 holds.
    ends = np.concatenate([[0], np.cumsum(seq_lens.astype(np.int64) ** 2)])
    work: NDArray[np.int64] = np.diff(ends[offsets])
    return work


@dataclass(frozen=True)
class Quality:
    """The figures of a packing.

    Attributes:
        num_examples: examples placed.
        num_tokens: tokens of all examples, padding not counted.
        num_packs: packs they fill.
        seq_len: tokens a pack holds.
        bound: proven lower bound on the packs of any packer.
        most_segments: most examples in one pack.
    """

    num_examples: int
    num_tokens: int
    num_packs: int
    seq_len: int
    bound: int
    most_segments: int

    @property
    def fill(self) -> float:
        """Real tokens ÷ slots; 1.0 when there are no packs (Krell's efficiency)."""
        return fill(self.num_tokens, self.num_packs, self.seq_len)

    @property
    def padding(self) -> float:
        """Share of slots that hold no token."""
        return 1.0 - self.fill

    @property
    def gap(self) -> int:
        """Packs above the proven lower bound; the optimum has at most this many fewer."""
        return self.num_packs - self.bound

    @property
    def packing_factor(self) -> float:
        """Examples ÷ packs (Krell); 0.0 when there are no packs."""
        return self.num_examples / self.num_packs if self.num_packs else 0.0

    def rows(self, pack: str = "pack") -> list[tuple[str, str]]:
        """Return (name, value) of each figure, ready to print.

        Args:
            pack: what a pack is called: a row where rows are printed, too.
        """
        proven = f"at least {self.bound:,} needed, gap {self.gap:,}"
        return [
            ("examples", f"{self.num_examples:,}"),
            ("tokens", f"{self.num_tokens:,}"),
            (f"{pack}s", f"{self.num_packs:,} of {self.seq_len:,} tokens ({proven})"),
            ("padding", f"{self.padding:.3%}"),
            ("segments", f"{self.packing_factor:.2f} a {pack}, {self.most_segments:,} at most"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<9} {value}" for name, value in self.rows())
