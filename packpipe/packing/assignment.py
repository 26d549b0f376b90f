"""`Assignment`, the base class of packings: an order of examples, cut into packs."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packpipe.packing import picture
from packpipe.packing.limits import Limits
from packpipe.packing.quality import Figures, Quality, attention_work


class Assignment(Figures):
    """Examples assigned to packs; the base class of `Packs`, `EpochPlan` and `TokenPlan`.

    ``len(packs)`` counts the packs, iteration yields each pack's examples, and a notebook shows a
    small picture.

    Attributes:
        order: int[examples], positions of the examples, pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        limits: the limits of every pack.
        lengths: int[examples], tokens of each, by position.
    """

    order: NDArray[Any]
    offsets: NDArray[np.int64]

    if TYPE_CHECKING:  # fields of some subclasses, computed by others

        @property
        def limits(self) -> Limits: ...  # noqa: D102

        @property
        def lengths(self) -> NDArray[Any]: ...  # noqa: D102

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def members(self, pack: int) -> NDArray[Any]:
        """Return the positions of the examples in a pack."""
        # A range checks the bounds and counts negative numbers from the end, as a list does.
        pack = range(len(self))[operator.index(pack)]
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __getitem__(self, pack: int) -> NDArray[Any]:
        return self.members(pack)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[pack] for pack in range(len(self)))

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""
        return self.limits.seq_len

    @cached_property
    def quality(self) -> Quality:
        """The figures; the bound is that of packing all examples at once, without windows."""
        # Tokens, not units: the plans that use this property have no segment_multiple.
        counts = np.bincount(self.lengths, minlength=self.seq_len + 1).astype(np.int64)
        return Quality(
            num_examples=len(self.order),
            num_tokens=int(self.lengths.sum(dtype=np.int64)),
            num_packs=len(self),
            seq_len=self.seq_len,
            bound=self.limits.bound(counts),
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

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of each figure, ready to print."""
        return self.quality.rows()

    def _repr_html_(self) -> str:
        return picture.html(self.rows(), self.lengths[self.order], self.offsets, self.seq_len)
