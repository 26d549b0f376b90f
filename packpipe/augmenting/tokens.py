"""`tokens_of`: where the tokens of some segments lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tokens_of(
    starts: NDArray[np.int64], lens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return int64[tokens] twice: the place of each token, and the number of its segment here.

    Args:
        starts: int64[n], the first place of each segment, rows laid end to end.
        lens: int64[n], its tokens.

    >>> tokens_of(np.array([7, 3]), np.array([2, 3]))
    (array([7, 8, 3, 4, 5]), array([0, 0, 1, 1, 1]))
    """
    owner = np.repeat(np.arange(len(lens)), lens)
    before = np.cumsum(lens) - lens
    return np.repeat(starts - before, lens) + np.arange(len(owner)), owner
