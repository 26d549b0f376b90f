"""Which examples are held out of a training to validate it: a share of each class, by seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox


def held_out(
    labels: ArrayLike, fraction: float, *, seed: int = 0, groups: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Return bool[examples], which ones are held out: the same at every call.

    Of each class, the examples whose random words are the least, a word being a function of (seed,
    example) alone. Of n examples of a class they are fraction · n, rounded, but one at least and
    n - 1 at most; a class of one example is only trained on. O(n log n).

    Args:
        labels: int[examples], classes; negative ones are no class, and not held out.
        fraction: share that is held out, in (0, 1).
        seed: of the draw.
        groups: int[examples]; those of a number, such as one file listed twice, are held out
            together or not at all, as the first of them that has a class: they count as one. None
            is a group for each.

    Raises:
        TypeError, ValueError: labels are no integers, fraction is no such share, or no class has
            two examples, or groups.

    >>> held_out([0, 0, 0, 0, 1, 1, 2], 0.25).tolist()
    [False, False, True, False, True, False, False]
    >>> held_out([0, 0, 0, 0, 1, 1, 2], 0.25, groups=[0, 1, 2, 0, 3, 4, 5]).tolist()
    [False, False, True, False, True, False, False]
    """
    labels = checks.integer_array("labels", labels, 1, "pass the class of each example")
    fraction = checks.real_number("fraction", fraction, "pass a share of the examples")
    if not 0 < fraction < 1:
        expected, remedy = "a number between 0 and 1", "pass a share of the examples"
        raise ValueError(checks.sentence("fraction", fraction, expected, remedy))
    key = philox.checked_key(seed, 0)
    if groups is None:
        groups = np.arange(len(labels))
    groups = checks.integer_array("groups", groups, 1, "pass the group of each example")
    if len(groups) != len(labels):
        expected, remedy = f"{len(labels)}, as of labels", "pass the group of each example"
        raise ValueError(checks.sentence("len(groups)", len(groups), expected, remedy))
    known = np.flatnonzero(labels >= 0)
    # Of each group the first example, which decides for all of them.
    firsts = np.sort(known[np.unique(groups[known], return_index=True)[1]])
    order = firsts[philox.permutation(key, index=firsts, stream=philox.VALIDATION)]
    # By class, and within each by word, since the sort is stable.
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    wanted = np.clip(np.rint(fraction * counts).astype(np.int64), 1, counts - 1)
    place = np.arange(len(order)) - np.repeat(first, counts)
    chosen = np.isin(groups, groups[order[place < np.repeat(wanted, counts)]]) & (labels >= 0)
    if not chosen.any():
        expected, remedy = "two or more examples of a class", "pass more examples"
        raise ValueError(checks.sentence("labels", f"{len(labels)} lone ones", expected, remedy))
    return chosen
