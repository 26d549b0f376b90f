"""Fit last: one image a pack takes the tokens that are left over.

When the packs are made, the image of each pack that can take the most of its room (the first of
equals) becomes its last, and grows until the pack is full or it has reached its limit: by keeping
more of its tokens, or at a larger size at which, but for whole patches, as large a share of them is
dropped. All other images stay as they were decided, and no image changes packs.

Source: NaViT A.3 (mentioned there, not used).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packpipe.planning import resolution
from packpipe.planning.image_config import PackConfig

_AT_ONCE = 2**10  # packs, so that what is computed of them stays in the cache


def fit_last(
    image_hw: NDArray[np.int32],
    grid_hw: NDArray[np.int16],
    num_keep: NDArray[np.int32],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    config: PackConfig,
) -> int:
    """Change grid_hw, num_keep and order in place; return how many images have grown.

    Args:
        image_hw: int32[images, 2].
        grid_hw: int16[images, 2].
        num_keep: int32[images].
        order: int64[images], positions in these, pack by pack.
        offsets: int64[packs + 1], where the packs begin in order; none is empty.
        config: the options; ``fit_last`` is not None.
    """
    grown = 0
    for first in range(0, len(offsets) - 1, _AT_ONCE):
        ends = offsets[first : first + _AT_ONCE + 1]
        some = order[ends[0] : ends[-1]]
        grown += _fit_some(image_hw, grid_hw, num_keep, some, ends - ends[0], config)
    return grown


def _fit_some(
    image_hw: NDArray[np.int32],
    grid_hw: NDArray[np.int16],
    num_keep: NDArray[np.int32],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    config: PackConfig,
) -> int:
    """Do so for some packs, one at least; order is theirs alone."""
    num_segments = np.diff(offsets)
    held = num_keep[order].astype(np.int64)
    room = np.repeat(config.seq_len - np.add.reduceat(held, offsets[:-1]), num_segments)
    wanted = held + np.floor(np.minimum(room, held * config.fit_limit)).astype(np.int64)
    grids = grid_hw[order].astype(np.int64)
    tokens = grids[:, 0] * grids[:, 1]
    if config.fit_last == "resolution":
        # So many tokens would keep the rate; whole patches allow a few less.
        budget = np.minimum(-(-tokens * wanted // held), config.token_limit)
        shape_hw = resolution.shape_hw(config.resolution, image_hw[order])
        larger = resolution.budget_grids(
            shape_hw, budget, patch_size=config.patch_size, max_upscale=config.max_upscale
        )
        enlarged = larger[:, 0] * larger[:, 1] > tokens
        grids[enlarged] = larger[enlarged]
        tokens = grids[:, 0] * grids[:, 1]
    growth = np.minimum(wanted, tokens) - held

    most = np.maximum.reduceat(growth, offsets[:-1])
    pack = np.repeat(np.arange(len(most)), num_segments)
    candidates = np.flatnonzero((growth == most[pack]) & (growth > 0))
    packs, first = np.unique(pack[candidates], return_index=True)
    chosen = candidates[first]
    image = order[chosen]
    num_keep[image] = held[chosen] + growth[chosen]
    grid_hw[image] = grids[chosen]
    last = offsets[packs + 1] - 1
    order[chosen], order[last] = order[last], image
    return len(packs)
