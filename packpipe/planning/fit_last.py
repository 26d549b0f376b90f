"""Fills a pack's leftover tokens by letting one of its images grow.

After packing, the image of each pack that can take the most of its room (the first of equals)
becomes its last. It grows until the pack is full or its limit is reached: it keeps more of its
tokens, or gets a larger size at the same drop rate, up to rounding to whole patches. All
other images stay as they were decided, and no image changes packs.

Source: NaViT A.3 (mentioned there, not used).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packpipe.philox import Key
from packpipe.planning import crops, resolution
from packpipe.planning.image_config import PackConfig

_AT_ONCE = 2**10  # packs, so that the arrays computed for them stay in the cache


def fit_last(
    index: NDArray[np.int64],
    image_hw: NDArray[np.int32],
    grid_hw: NDArray[np.int16],
    num_keep: NDArray[np.int32],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    config: PackConfig,
    key: Key,
    *,
    view: NDArray[np.integer] | int = 0,
) -> int:
    """Change grid_hw, num_keep and order in place; return how many images have grown.

    Args:
        index: int64[images], each image's row in its source.
        image_hw: int32[images, 2], upright (height, width) in pixels.
        grid_hw: int16[images, 2], (rows, columns) of patches as decided.
        num_keep: int32[images], tokens kept as decided.
        order: int64[images], positions in these arrays, pack by pack.
        offsets: int64[packs + 1], where the packs begin in order; no pack is empty.
        config: the options; ``fit_last`` is not None.
        key: (seed, epoch) of the plan.
        view: int[images], which of an image's draws; one number for all.
    """
    grown = 0
    for first in range(0, len(offsets) - 1, _AT_ONCE):
        ends = offsets[first : first + _AT_ONCE + 1]
        some = order[ends[0] : ends[-1]]
        sizes = None
        if config.fit_last == "resolution":
            sizes = image_hw[some]
            own = view if isinstance(view, int) else view[some]
            box = crops.crop_boxes(config.crop, sizes, key, index=index[some], view=own)
            sizes = sizes if box is None else box[:, 2:]
        grown += _fit_some(sizes, grid_hw, num_keep, some, ends - ends[0], config)
    return grown


def _fit_some(
    sizes: NDArray[np.int32] | None,
    grid_hw: NDArray[np.int16],
    num_keep: NDArray[np.int32],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    config: PackConfig,
) -> int:
    """Let an image grow in each of some packs, at least one; order holds only their images.

    With ``fit_last="resolution"``, sizes holds the (height, width) of each image in order.
    """
    # np.add.reduceat sums pack by pack; it would be wrong for an empty pack, and there is none.
    num_segments = np.diff(offsets)
    held = num_keep[order].astype(np.int64)
    taken = np.add.reduceat(held, offsets[:-1]) + num_segments * config.prefix_tokens
    room = np.repeat(config.seq_len - taken, num_segments)
    # Capped in floats: a fit_limit may be larger than any integer.
    wanted = held + np.floor(np.minimum(room, held * config.fit_limit)).astype(np.int64)
    grids = grid_hw[order].astype(np.int64)
    tokens = grids[:, 0] * grids[:, 1]
    if sizes is not None:
        # This many tokens before dropping keep the rate; a grid of whole patches has a few less.
        budget = np.minimum(-(-tokens * wanted // held), config.token_limit)
        shape_hw = resolution.shape_hw(config.resolution, sizes)
        larger = resolution.budget_grids(
            shape_hw, budget, patch_size=config.patch_size, max_upscale=config.max_upscale
        )
        # A grid that has no more tokens than before would only change the shape: it is left alone.
        enlarged = larger[:, 0] * larger[:, 1] > tokens
        grids[enlarged] = larger[enlarged]
        tokens = grids[:, 0] * grids[:, 1]
    growth = np.minimum(wanted, tokens) - held

    most = np.maximum.reduceat(growth, offsets[:-1])
    pack = np.repeat(np.arange(len(most)), num_segments)
    # np.unique gives the first index of each pack: the first image of those that can take most.
    candidates = np.flatnonzero((growth == most[pack]) & (growth > 0))
    packs, first = np.unique(pack[candidates], return_index=True)
    chosen = candidates[first]
    image = order[chosen]
    num_keep[image] = held[chosen] + growth[chosen]
    grid_hw[image] = grids[chosen]
    # Last in its pack: the image changes places with the one that was last.
    last = offsets[packs + 1] - 1
    order[chosen], order[last] = order[last], image
    return len(packs)
