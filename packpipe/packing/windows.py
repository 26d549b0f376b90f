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
    lens: NDArray[np.int32],
    order: NDArray[np.int64],
    config: Packing,
    key: Key,
    *,
    also: tuple[ArrayLike, int] | None = None,
    views: int = 1,
    together: bool = False,
    first_pack: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) of the packs of every window, one window after the other.

    Args:
        lens: int32[segments], tokens of each; segment s is a view of example s // views.
        order: int64[examples], positions of the examples in plan order.
        config: limits, strategy and window.
        key: (seed, epoch) of the order of the packs within a window.
        also: (cost, limit), a second limit of a pack, with int[examples] costs by position; packs
            are then found by "ffd".
        views: segments of each example.
        together: whether those of an example share a pack.
        first_pack: number of the first pack. By its number a pack finds its place in its window.

    Returns:
        int64[segments], positions in lens, pack by pack; and int64[packs + 1], where the packs
        begin in it.
    """
    # What is packed is a segment, or all segments of an example as one.
    parts = views if together else 1
    lengths = lens if parts == 1 else lens.reshape(-1, views).sum(1, dtype=np.int32)
    most = config.max_segments
    packed = np.empty(len(lens), np.int64)
    ends = [np.zeros(1, np.int64)]
    num_packs = first_pack
    num_windows = -(-len(order) // config.window)
    for window in range(num_windows):
        # Sizes of windows differ by one at most, so that none is a small remainder, which would pad
        # more.
        start = len(order) * window // num_windows
        stop = len(order) * (window + 1) // num_windows
        some = order[start:stop] if together else _all_parts(order[start:stop], views)
        packs = pack_lengths(
            lengths[some],
            config.seq_len,
            strategy=config.strategy if also is None else "ffd",
            max_segments=None if most is None else most // parts,
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
        found = _all_parts(some[packs.order[places]], parts)
        packed[start * views : stop * views] = found
        ends.append(end * parts + start * views)
    return packed, np.concatenate(ends)


def _all_parts(numbers: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Return the positions of all parts of some things, each of so many that lie side by side."""
    return numbers if parts == 1 else np.add.outer(numbers * parts, np.arange(parts)).ravel()
