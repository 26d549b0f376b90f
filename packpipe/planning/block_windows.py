"""Plans a source of blocks by windows: runs of whole blocks, each planned by itself.

A permutation of all rows makes every file of packs read from everywhere in its source. Here the
blocks are put in seeded order and cut into windows of about as many rows. Images of one window
share packs, and of no two. So a window is read, planned and packed without any other one, by
whoever comes to it, and its blocks are read once. What it costs: an image has fewer others to
share a pack with, and rows that were sorted stay together as far as a block reaches.

A window of blocks is larger than, or as large as, the ``window`` of the options, which cuts what it
is given once more (`packpipe.packing.windows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.philox import Key
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch

# Images that are planned together: enough that a window pads as little as all images would, few
# enough that a machine holds their encoded bytes (2 GB at 120 kB an image).
WINDOW_ROWS = 16_384
_USUAL = "16,384 is usual"
# Packs of a window have numbers of their own; no window has as many.
_MOST_PACKS = 2**32
# Of a manifest, which may come from anywhere: a gigabyte of numbers.
_MOST_BLOCKS = 2**27


def checked_window_rows(window_rows: Any) -> int:
    """Return about how many rows are planned together, checked; None is `WINDOW_ROWS`.

    Raises:
        TypeError, ValueError: window_rows is no whole number of 1 or more.
    """
    rows = WINDOW_ROWS if window_rows is None else window_rows
    return checks.whole_number("window_rows", rows, 1, 2**62, _USUAL)


def check_constant_drops(config: PackConfig) -> None:
    """Raise ValueError if drop rates change over the training, by the place among all images."""
    if config.uses_progress:
        expected, remedy = "one that does not change over the training", "pass a Dataset for it"
        raise ValueError(checks.sentence("drop_rate", config.drop_rate, expected, remedy))


def block_windows(block_rows: ArrayLike, window_rows: int, key: Key) -> list[NDArray[np.int64]]:
    """Return the numbers of the blocks of each window: every block is in exactly one.

    Args:
        block_rows: int[blocks], rows of each block, 0 or more.
        window_rows: about how many rows a window has, 1 or more. It differs by the size of a block
            at most, and by what it takes to make all windows alike.
        key: (seed, epoch) of the order of the blocks.

    Returns:
        Of each window int64[blocks], ascending: in this order they are read. Every window has a
        row, unless there are no rows at all; then there is one.

    Raises:
        TypeError, ValueError: window_rows is no whole number of 1 or more.

    >>> [blocks.tolist() for blocks in block_windows([10] * 6, 20, Key(0, 0))]
    [[1, 3], [0, 5], [2, 4]]
    """
    window_rows = checked_window_rows(window_rows)
    rows = checks.integer_array("block_rows", np.asarray(block_rows, np.int64), 1, _USUAL)
    order = philox.permutation(key, index=np.arange(len(rows)), stream=philox.BLOCK_ORDER)
    ends = np.cumsum(rows[order])
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, round(total / window_rows))
    # A block belongs to the window that its first row falls into, were windows of one size. In
    # floats, since the product of two large integers might not fit; they are alike everywhere.
    window = ((ends - rows[order]) * (count / max(1, total))).astype(np.int64).clip(max=count - 1)
    # Blocks without rows make no window of their own. A window that a large block skipped is left
    # out.
    window[rows[order] == 0] = 0
    by_window = np.argsort(window, kind="stable")
    starts = np.flatnonzero(np.diff(window[by_window])) + 1
    return [np.sort(blocks) for blocks in np.split(order[by_window], starts)]


def runs_of(block_rows: ArrayLike) -> list[list[int]]:
    """Return [rows, how many blocks in a row have as many] of blocks, as records have them.

    >>> runs_of([64, 64, 64, 7])
    [[64, 3], [7, 1]]
    """
    rows = np.asarray(block_rows, np.int64)
    starts = np.flatnonzero(np.r_[len(rows) > 0, np.diff(rows) != 0]) if len(rows) else rows
    times = np.diff(np.r_[starts, len(rows)])
    return [list(run) for run in zip(rows[starts].tolist(), times.tolist(), strict=True)]


def block_rows_of(runs: ArrayLike) -> NDArray[np.int64]:
    """Return int64[blocks], the rows of the blocks that `runs_of` has counted.

    Raises:
        ValueError: they are no such counts, or of more than 2**27 blocks.

    >>> block_rows_of([[64, 3], [7, 1]])
    array([64, 64, 64,  7])
    """
    rows, times = np.asarray(runs, np.int64).reshape(-1, 2).T
    if (rows < 0).any() or (times < 1).any() or float(times.astype(float).sum()) > _MOST_BLOCKS:
        remedy = "they were changed since they were written"
        raise ValueError(checks.sentence("blocks", runs, "pairs of (rows, times)", remedy))
    return np.repeat(rows, times)


def windows_of(
    examples: NDArray[np.int64], block_rows: NDArray[np.int64], windows: list[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Return int64[examples], the window that each row of the source is in.

    Args:
        examples: int64[examples], numbers of rows.
        block_rows: int64[blocks], rows of each block.
        windows: the blocks of each window, as `block_windows` returns them.
    """
    window = np.empty(len(block_rows), np.int64)
    for number, blocks in enumerate(windows):
        window[blocks] = number
    return window[np.searchsorted(np.cumsum(block_rows), examples, side="right")]


class EpochWindows(NamedTuple):
    """The windows of an epoch.

    Attributes:
        blocks: the numbers of the blocks of each.
        ends: int64[windows], how many packs there are up to the end of each.
    """

    blocks: list[NDArray[np.int64]]
    ends: NDArray[np.int64]

    @property
    def num_packs(self) -> int:
        """Packs of the epoch."""
        return int(self.ends[-1])

    def window_of(self, packs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64[packs], the window that each pack of the epoch is in."""
        return np.searchsorted(self.ends, packs, side="right")

    def first_pack(self, window: int) -> int:
        """Return the place of a window's first pack among those of the epoch."""
        return int(self.ends[window - 1]) if window else 0


def first_pack(window: int) -> int:
    """Return the number of the first pack of a window, as `plan_epoch` takes it."""
    return window * _MOST_PACKS


def plan_window(
    image_hw: ArrayLike,
    config: PackConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: ArrayLike,
    window: int,
) -> EpochPlan:
    """Return the plan of a window: a function of its own images alone.

    Args:
        image_hw: int[images, 2], upright (height, width) of the images of its blocks.
        config: the options.
        seed: of all draws.
        epoch: of all draws.
        index: int[images], each image's row in the whole source.
        window: the number of the window. Every image is decided as in a plan of all images.
    """
    first = first_pack(window)
    return plan_epoch(image_hw, config, seed=seed, epoch=epoch, index=index, first_pack=first)


def joined(plans: Sequence[EpochPlan]) -> EpochPlan:
    """Return the plans of several windows as one, one after the other; there is one at least."""
    first = plans[0]
    segments = np.cumsum([0, *(len(plan.num_keep) for plan in plans)]).tolist()
    numbered = list(zip(plans, segments, strict=False))
    return EpochPlan(
        config=first.config,
        seed=first.seed,
        epoch=first.epoch,
        index=_one(plan.index for plan in plans),
        image_hw=_one(plan.image_hw for plan in plans),
        grid_hw=_one(plan.grid_hw for plan in plans),
        num_keep=_one(plan.num_keep for plan in plans),
        order=_one(plan.order + start for plan, start in numbered),
        # Every plan begins at 0, which is where the one before it ends.
        offsets=_one([np.zeros(1, np.int64), *(p.offsets[1:] + start for p, start in numbered)]),
        num_shrunk=sum(plan.num_shrunk for plan in plans),
        num_fitted=sum(plan.num_fitted for plan in plans),
    )


def _one(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(list(arrays))
