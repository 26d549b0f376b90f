"""The plan of token sequences: which piece of which sequence lies in which pack.

From lengths alone, before any token is read. A sequence that fits is one piece; what becomes of
one that does not is the configuration's ``overflow``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.packing.limits import Limits
from packpipe.packing.picture import html
from packpipe.packing.quality import Quality
from packpipe.packing.windows import pack_windows
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_config import TokenConfig


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """What every pack holds: pieces of sequences.

    Attributes:
        config, seed, epoch: what the plan was made from, besides the lengths.
        index: int64[pieces], row of the piece's sequence in its source.
        starts: int64[pieces], its first token's place in the sequence.
        seq_lens: int32[pieces], its tokens.
        fragments: int32[pieces], 0, 1, ... within the sequence.
        order: int64[pieces], positions in the arrays above, pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        dropped: int64[...], rows of the sequences that ``overflow="drop"`` leaves out.
        num_cut: sequences that were split or truncated.
        num_truncated_tokens: tokens that ``overflow="truncate"`` left out.
    """

    config: TokenConfig
    seed: int
    epoch: int
    index: NDArray[np.int64]
    starts: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    fragments: NDArray[np.int32]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    dropped: NDArray[np.int64]
    num_cut: int
    num_truncated_tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def quality(self) -> Quality:
        """Fill, bound (with these pieces in one window), gap and the other figures."""
        limits = Limits(self.config.seq_len, self.config.max_segments)
        counts = np.bincount(self.seq_lens, minlength=limits.seq_len + 1).astype(np.int64)
        return Quality(
            num_examples=len(self.index),
            num_tokens=int(self.seq_lens.sum(dtype=np.int64)),
            num_packs=len(self),
            seq_len=limits.seq_len,
            bound=limits.bound(counts),
            most_segments=int(np.diff(self.offsets).max(initial=0)),
        )

    def _repr_html_(self) -> str:
        return html(
            self.quality.rows(), self.seq_lens[self.order], self.offsets, self.config.seq_len
        )

    def __repr__(self) -> str:
        found = self.quality
        return (
            f"TokenPlan({len(self.index)} pieces, {found.num_tokens} tokens in {len(self)} packs "
            f"of {self.config.seq_len}: padding {found.padding:.2%}, gap {found.gap}; "
            f"seed {self.seed}, epoch {self.epoch})"
        )


def plan_tokens(
    lengths: ArrayLike,
    config: TokenConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
) -> TokenPlan:
    """Return the plan of an epoch: every piece in exactly one pack of at most seq_len tokens.

    Pieces share packs by their lengths in plan order, a seeded permutation of them, cut into
    windows as for images.

    Args:
        lengths: int[sequences], tokens of each, 1 or more.
        config: the options.
        seed: which permutation of pieces and packs; 0..2**64-1.
        epoch: likewise.
        index: int64[sequences], each one's row in its source; 0, 1, ... if None.

    Raises:
        TypeError: lengths hold no integers.
        ValueError: a length is below 1; or above seq_len, with ``overflow="error"``.

    >>> plan = plan_tokens([14, 7, 5, 2, 3], TokenConfig(seq_len=8, overflow="split"))
    >>> plan
    TokenPlan(6 pieces, 31 tokens in 4 packs of 8: padding 3.12%, gap 0; seed 0, epoch 0)
    >>> plan.fragments.tolist(), plan.num_cut
    ([0, 1, 0, 0, 0, 0], 1)

    Source: Ding 3.
    """
    seed, epoch = checks.seed_and_epoch(seed, epoch)
    remedy = "pass the tokens of each sequence"
    lens = checks.integer_array("lengths", lengths, 1, remedy).astype(np.int64)
    rows = np.arange(len(lens)) if index is None else np.asarray(index, np.int64)
    low = np.flatnonzero(lens < 1)
    if low.size:
        name = f"lengths[{rows[low[0]]}]"
        raise ValueError(checks.sentence(name, int(lens[low[0]]), "1 or more", "leave it out"))
    seq_len = config.seq_len
    long = lens > seq_len
    num_long, dropped, lost = int(long.sum()), np.empty(0, np.int64), 0
    if num_long and config.overflow == "error":
        first = int(np.flatnonzero(long)[0])
        name, expected = f"lengths[{rows[first]}]", f"at most {seq_len} (seq_len)"
        remedy = f"pass overflow='split', 'truncate' or 'drop' ({num_long} are too long)"
        raise ValueError(checks.sentence(name, int(lens[first]), expected, remedy))
    if config.overflow == "truncate":
        lost = int((lens[long] - seq_len).sum())
        lens = np.minimum(lens, seq_len)
    if config.overflow == "drop":
        dropped, rows, lens = rows[long], rows[~long], lens[~long]
    num_pieces = -(-lens // seq_len)
    firsts = np.cumsum(num_pieces) - num_pieces
    fragments = np.arange(num_pieces.sum()) - np.repeat(firsts, num_pieces)
    starts = fragments * seq_len
    pieces = np.minimum(np.repeat(lens, num_pieces) - starts, seq_len).astype(np.int32)
    numbers = np.arange(len(pieces))
    order = philox.permutation(seed=seed, epoch=epoch, index=numbers, stream=philox.EXAMPLE_ORDER)
    order, offsets = pack_windows(pieces, order, config, seed=seed, epoch=epoch)
    return TokenPlan(
        config=config,
        seed=seed,
        epoch=epoch,
        index=np.repeat(rows, num_pieces),
        starts=starts,
        seq_lens=pieces,
        fragments=fragments.astype(np.int32),
        order=order,
        offsets=offsets,
        dropped=dropped,
        num_cut=0 if config.overflow == "drop" else num_long,
        num_truncated_tokens=lost,
    )


def accompanying(
    plan: EpochPlan, lengths: NDArray[np.int64], longest: int, config: TokenConfig
) -> TokenPlan:
    """Return the plan whose packs hold the texts of the images in a plan's packs, in their order.

    Args:
        plan: of the images, made with the texts as a second limit.
        lengths: int64[rows of the source], tokens of each text.
        longest: what they are truncated to.
        config: the options of the texts.
    """
    whole = lengths[plan.index]
    lens = np.minimum(whole, longest)
    return TokenPlan(
        config=config,
        seed=plan.seed,
        epoch=plan.epoch,
        index=plan.index,
        starts=np.zeros(len(lens), np.int64),
        seq_lens=lens.astype(np.int32),
        fragments=np.zeros(len(lens), np.int32),
        order=plan.order,
        offsets=plan.offsets,
        dropped=np.empty(0, np.int64),
        num_cut=int((whole > lens).sum()),
        num_truncated_tokens=int((whole - lens).sum()),
    )
