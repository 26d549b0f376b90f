"""Plans an epoch of token sequences: which piece of which sequence is in which pack.

From lengths alone, before any token is read. A sequence that fits is one piece; ``overflow`` in the
configuration says what is done with one that does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.packing.limits import Limits
from packpipe.packing.packs import Packs
from packpipe.packing.quality import Quality
from packpipe.packing.windows import pack_windows
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.token_config import TokenConfig


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """What every pack holds: pieces of sequences; ``plan[p]`` are their source rows in pack p.

    Attributes:
        config, seed, epoch: what the plan was made from, in addition to the lengths.
        index: int64[pieces], row of the piece's sequence in its source.
        seq_lens: int32[pieces], tokens of each piece.
        fragments: int32[pieces], number of the piece within its sequence, from 0.
        order: int64[pieces], positions in the arrays above, pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        dropped: int64[sequences], rows of those that ``overflow="drop"`` leaves out.
        num_cut: number of sequences that were split or truncated.
        num_truncated_tokens: tokens that ``overflow="truncate"`` left out.
    """

    config: TokenConfig
    seed: int
    epoch: int
    index: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    fragments: NDArray[np.int32]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    dropped: NDArray[np.int64]
    num_cut: int
    num_truncated_tokens: int

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64[pieces], the place of each piece's first token in its sequence."""
        return piece_starts(self.fragments, self.config.seq_len)

    @cached_property
    def packs(self) -> Packs:
        """The packs, of positions in the arrays above."""
        limits = Limits(self.config.seq_len, self.config.max_segments)
        return Packs(self.order, self.offsets, limits, None, chunks=[self.seq_lens])

    @property
    def quality(self) -> Quality:
        """The figures; the bound is that of packing all examples at once, without windows."""
        return self.packs.quality

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = self.index[self.packs[pack]]
        return rows

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, a hash of which piece is where in which pack."""
        digest = hashlib.sha256()
        for array in (self.index, self.seq_lens, self.fragments, self.order, self.offsets):
            digest.update(f"{array.dtype} {len(array)} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        found = self.quality
        return (
            f"TokenPlan({len(self.index)} pieces, {found.num_tokens} tokens in {len(self)} packs "
            f"of {found.seq_len}: padding {found.padding:.2%}, gap {found.gap}; "
            f"seed {self.seed}, epoch {self.epoch})"
        )

    def _repr_html_(self) -> str:
        return self.packs._repr_html_()


def plan_tokens(
    lengths: ArrayLike,
    config: TokenConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
) -> TokenPlan:
    """Return the plan of an epoch: every piece in exactly one pack of at most seq_len tokens.

    Plan order is a seeded permutation of the pieces, cut into windows of almost equal size. Each
    window is packed by itself, from its lengths, and its packs are put in seeded order.

    Args:
        lengths: int[sequences], tokens of each, 1 or more.
        config: the options.
        seed: seed of the permutations of pieces and packs, 0..2**64-1.
        epoch: 0..2**64-1; each epoch has other permutations.
        index: int64[sequences], each sequence's row in its source; 0, 1, ... if None.

    Raises:
        TypeError: lengths hold no integers.
        ValueError: a length is below 1, or above seq_len with ``overflow="error"``.

    >>> plan = plan_tokens([14, 7, 5, 2, 3], TokenConfig(seq_len=8, overflow="split"))
    >>> plan
    TokenPlan(6 pieces, 31 tokens in 4 packs of 8: padding 3.12%, gap 0; seed 0, epoch 0)
    >>> plan.fragments.tolist(), plan.num_cut
    ([0, 1, 0, 0, 0, 0], 1)

    Source: Ding 3.
    """
    key = philox.checked_key(seed, epoch)
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
    # After truncating or dropping, every sequence left is one piece, so only "split" cuts here.
    num_pieces = -(-lens // seq_len)
    # Pieces are counted on through all sequences; less the first of its own, it is a fragment.
    firsts = np.cumsum(num_pieces) - num_pieces
    fragments = np.arange(num_pieces.sum()) - np.repeat(firsts, num_pieces)
    left = np.repeat(lens, num_pieces) - fragments * seq_len
    pieces = np.minimum(left, seq_len).astype(np.int32)
    # Pieces of one sequence are shuffled apart from each other, so numbers are of pieces.
    numbers = np.arange(len(pieces))
    order = philox.permutation(key, index=numbers, stream=philox.EXAMPLE_ORDER)
    order, offsets = pack_windows(pieces, order, config, key)
    return TokenPlan(
        config=config,
        seed=key.seed,
        epoch=key.epoch,
        index=np.repeat(rows, num_pieces),
        seq_lens=pieces,
        fragments=fragments.astype(np.int32),
        order=order,
        offsets=offsets,
        dropped=dropped,
        num_cut=0 if config.overflow == "drop" else num_long,
        num_truncated_tokens=lost,
    )


def piece_starts(fragments: NDArray[np.int32], seq_len: int) -> NDArray[np.int64]:
    """Return int64[pieces], the place of each piece's first token in its sequence."""
    # Every piece but the last of its sequence has seq_len tokens; int32 might not hold the place.
    return fragments.astype(np.int64) * seq_len


def accompanying(
    plan: EpochPlan, lengths: NDArray[np.int64], longest: int, config: TokenConfig
) -> TokenPlan:
    """Return the plan of the texts that belong to the images of a plan: same packs, same order.

    Args:
        plan: plan of the images, made with the texts as a second limit.
        lengths: int64[rows of the source], tokens of each text.
        longest: texts are truncated to this many tokens.
        config: the options of the texts.
    """
    whole = lengths[plan.index]
    lens = np.minimum(whole, longest)
    return TokenPlan(
        config=config,
        seed=plan.seed,
        epoch=plan.epoch,
        index=plan.index,
        seq_lens=lens.astype(np.int32),
        fragments=np.zeros(len(lens), np.int32),
        order=plan.order,
        offsets=plan.offsets,
        dropped=np.empty(0, np.int64),
        num_cut=int((whole > lens).sum()),
        num_truncated_tokens=int((whole - lens).sum()),
    )
