"""Orders packs so that the ranks of each training step have nearly equal work.

Packs of equal token count still differ in attention work, Σ length² over their segments, and a
step takes as long as the rank with the most work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox


@dataclass(frozen=True, eq=False)
class Steps:
    """An order of packs: step after step, and rank after rank within a step.

    Attributes:
        order: int64[packs]; rank r takes pack ``order[step * ranks + r]``. The last step is
            short if the number of packs is no multiple of ranks (see ``ranks`` of `pack_lengths`).
        ranks: packs of a step, one for each rank.
        before: time lost to waiting in the shuffled order: (Σ over steps of the most work of a
            rank) ÷ (Σ over steps of the mean work of a rank) - 1.
        after: time lost to waiting in this order.
    """

    order: NDArray[np.int64]
    ranks: int
    before: float
    after: float

    def __len__(self) -> int:
        return -(-len(self.order) // self.ranks)

    def __repr__(self) -> str:
        return (
            f"Steps({len(self.order)} packs in {len(self)} steps of {self.ranks} ranks: "
            f"waiting {self.before:.2%} before, {self.after:.2%} after)"
        )


def balance_steps(
    work: ArrayLike,
    ranks: int,
    *,
    window: int = 1024,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> Steps:
    """Return an order of the packs in which the ranks of each step have nearly equal work.

    All packs are shuffled and cut into windows. Within a window, packs are sorted by work and
    neighbours go to the same step; then the steps of the window, and the ranks within a step,
    are put in shuffled order. A larger window balances better and shuffles less. The figures
    before and after leave out a last step that is short.

    Args:
        work: int[packs], work of each, for example ``packs.attention_work``.
        ranks: packs of a step, 1 or more.
        window: packs sorted together; rounded up to a multiple of ranks.
        shuffle: False cuts windows from the order given, if that order has a meaning; the steps
            of a window are shuffled all the same.
        seed: seed of the shuffle, 0..2**64-1.
        epoch: epoch of the shuffle, 0..2**64-1; each epoch has another one.

    Raises:
        TypeError: work or another number is no integer.
        ValueError: work is negative, or another number is out of range.

    >>> balance_steps([9, 1, 8, 2, 9, 1, 8, 2], ranks=2, window=8)
    Steps(8 packs in 4 steps of 2 ranks: waiting 40.00% before, 0.00% after)
    """
    ranks = checks.whole_number("ranks", ranks, 1, 2**31, "pass the number of processes")
    window = checks.whole_number("window", window, 1, 2**62, "1024 or more evens out well")
    loads = checks.integer_array("work", work, 1, "pass one number a pack")
    wrong = np.flatnonzero(loads < 0)
    if wrong.size:
        where = int(wrong[0])
        name, found = f"work[{where}]", int(loads[where])
        raise ValueError(checks.sentence(name, found, "0 or more", "pass Σ l² of the pack"))
    key = philox.checked_key(seed, epoch)
    num_packs = len(loads)
    places = shuffled = np.arange(num_packs)
    if shuffle:
        shuffled = philox.permutation(key, index=places, stream=philox.STEP_PACKS)
    # Rounded up so that no step takes packs of two windows.
    window = -(-window // ranks) * ranks
    # The last key is the first to sort by: window, then work. Each run of `ranks` packs is a step.
    by_work = np.lexsort((loads[shuffled], places // window))
    step = np.empty(num_packs, np.int64)
    step[by_work] = places // ranks

    # Steps change places within their window only: a drawn word decides where.
    num_full = num_packs // ranks
    steps = np.arange(num_full)
    drawn = philox.words(key, index=steps, stream=philox.STEP_ORDER, num_words=1)[:, 0]
    turn = np.arange(-(-num_packs // ranks))  # a short step stays the last
    turn[np.lexsort((drawn, steps * ranks // window))] = steps
    # Within a step, ranks follow the shuffle, so that no rank always has the lightest pack.
    order = shuffled[np.lexsort((places, turn[step]))]
    return Steps(order, ranks, _waiting(loads[shuffled], ranks), _waiting(loads[order], ranks))


def _waiting(loads: NDArray[np.integer], ranks: int) -> float:
    """Return Σ most work ÷ Σ mean work of the full steps, - 1: the share of time spent waiting."""
    by_step = loads[: len(loads) // ranks * ranks].reshape(-1, ranks).astype(np.float64)
    ideal = by_step.mean(axis=1).sum()
    return float(by_step.max(axis=1).sum() / ideal - 1) if ideal else 0.0
