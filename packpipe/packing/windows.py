"""Packs lengths window by window, and shuffles the packs within each window."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import philox
from packpipe.packing.packs import pack_lengths
from packpipe.philox import Key


class Packing(Protocol):
    """The options of a configuration that packing lengths needs."""

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""

    @property
    def max_segments(self) -> int | None:
        """Most examples a pack may hold."""

    @property
    def strategy(self) -> str:
        """The packing rule."""

    @property
    def window(self) -> int:
        """Most examples packed together."""


def pack_windows(
    num_keep: NDArray[np.int32],
    order: NDArray[np.int64],
    config: Packing,
    key: Key,
    *,
    also: tuple[ArrayLike, int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) of the packs of every window, one window after the other.

    Args:
        num_keep: int32[examples], tokens of each.
        order: int64[examples], positions of the examples in plan order.
        config: limits, strategy and window.
        key: (seed, epoch) of the order of the packs within a window.
        also: (cost, limit), a second limit of a pack, with int[examples] costs by position; packs
            are then found by "ffd".
    """
    packed = np.empty_like(order)
    ends = [np.zeros(1, np.int64)]
    num_packs = 0
    num_windows = -(-len(order) // config.window)
    for window in range(num_windows):
        # Sizes of windows differ by one at most, so that none is a small remainder, which would pad
        # more.
        start = len(order) * window // num_windows
        stop = len(order) * (window + 1) // num_windows
        some = order[start:stop]
        packs = pack_lengths(
            num_keep[some],
            config.seq_len,
            strategy=config.strategy if also is None else "ffd",
            max_segments=config.max_segments,
            also=None if also is None else (np.asarray(also[0])[some], also[1]),
        )
        # Numbered across windows, so that no two packs share a random word.
        numbers = np.arange(num_packs, num_packs + len(packs))
        num_packs += len(packs)
        turn = philox.permutation(key, index=numbers, stream=philox.PACK_ORDER)
        num_segments = packs.segments_per_pack[turn]
        end = np.cumsum(num_segments)
        # Where in packs.order each segment stands, with the packs in their new order.
        places = np.repeat(packs.offsets[turn] - end + num_segments, num_segments)
        places += np.arange(len(some))
        packed[start:stop] = some[packs.order[places]]
        ends.append(end + start)
    return packed, np.concatenate(ends)
