"""Decides each image's patch grid and how many of its tokens are kept.

*Local*: an image's decision depends on its own size, the configuration and (seed, epoch, index,
view) only, so it can be made again for one image alone. In this order:

1. The crop gives a box (`crops`). From here on its size is the image's.
2. The resolution law gives a grid (`resolution`). A grid above the configuration's token limit is
   shrunk, a square to a smaller square, whole blocks to fewer blocks.
3. The drop law gives the share of its tokens that is dropped (`dropping`). For a law that changes
   over training, progress is (epoch + p) ÷ epochs, where p in [0, 1) is the image's place in the
   epoch's order: the uniform number that images are sorted by, one for all views of an image.
4. An image that would keep more tokens than a pack has room for is shrunk until it does not, at the
   same rate.

Cost: about 0.1 µs per image, in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.philox import Key
from packpipe.planning import crops, dropping, resolution
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Resolution

_AT_ONCE = 2**15  # images, so that the arrays computed for them stay in the cache


class Decisions(NamedTuple):
    """The decisions about some images.

    Attributes:
        grid_hw: int16[images, 2], (rows, columns) of patches after resizing.
        num_keep: int32[images], tokens kept.
        shrunk: bool[images], whether the image was shrunk, having more tokens than allowed.
        drawn: float64[images], the side, area or budget drawn; None if the law draws nothing.
        drop_rate: float64[images], the rates drawn; None if the configuration drops nothing.
        box: int32[images, 4], (top, left, height, width) in pixels; None if nothing is cropped.
    """

    grid_hw: NDArray[np.int16]
    num_keep: NDArray[np.int32]
    shrunk: NDArray[np.bool_]
    drawn: NDArray[np.float64] | None
    drop_rate: NDArray[np.float64] | None
    box: NDArray[np.int32] | None


def decide(
    image_hw: NDArray[np.integer],
    config: PackConfig,
    key: Key,
    *,
    index: NDArray[np.int64],
    view: ArrayLike = 0,
    progress: NDArray[np.float64] | None = None,
) -> Decisions:
    """Return the decisions about images; each is the same whatever other images are passed.

    Args:
        image_hw: int[images, 2], upright (height, width) in pixels, 1..2**31-1.
        config: the options.
        key: (seed, epoch) of all draws.
        index: int64[images], each image's row in its source.
        view: int[images], which of an image's draws; one number for all, 0 for the only one.
        progress: float64[images], share of the training done, for images that come in another
            order than the epoch's; None computes it as described at the top of the file.

    Raises:
        ValueError: the epoch lies after the training's end.
    """
    epoch = key.epoch
    if config.epochs is not None and epoch >= config.epochs:
        expected = f"below {config.epochs} (epochs)"
        raise ValueError(checks.sentence("epoch", epoch, expected, "raise epochs"))

    def uniform(stream: int) -> NDArray[np.float64]:
        return philox.uniform(key, index=index, stream=stream, view=view)

    box = crops.crop_boxes(config.crop, image_hw, key, index=index, view=view)
    if box is not None:
        image_hw = box[:, 2:]
    law, limit = config.resolution, config.token_limit
    u = uniform(philox.RESOLUTION) if resolution.is_drawn(law) else None
    grids, drawn = resolution.patch_grids(
        law, image_hw, config.patch_size, limit, u=u, max_upscale=config.max_upscale
    )
    # int64 until the end: a native grid may have far more patches than int16 or int32 hold.
    num_tokens = grids[:, 0] * grids[:, 1]
    shrunk = num_tokens > limit
    _shrink(grids, num_tokens, shrunk, law, image_hw, limit)
    if not config.drops:
        all_kept = num_tokens.astype(np.int32)
        return Decisions(grids.astype(np.int16), all_kept, shrunk, drawn, None, box)

    # The word of EXAMPLE_ORDER that `plan_epoch` sorts by, so progress rises with plan order.
    if progress is None and config.epochs is not None:
        place = philox.uniform(key, index=index, stream=philox.EXAMPLE_ORDER)
        progress = (epoch + place) / config.epochs
    rates = dropping.drop_rates(
        dropping.law("drop_rate", config.drop_rate), uniform(philox.DROP_RATE), num_tokens, progress
    )
    num_keep = dropping.num_kept(num_tokens, rates)
    over = num_keep > config.room
    if over.any():
        # The most tokens of which, at this rate, a pack has room for; rounding the product may
        # still give one more, hence the minimum below.
        most = np.minimum(limit, np.floor(config.room / (1 - rates))).astype(np.int64)
        _shrink(grids, num_tokens, over, law, image_hw, most)
        num_keep = np.minimum(dropping.num_kept(num_tokens, rates), config.room)
    kept, shrunk = num_keep.astype(np.int32), shrunk | over
    return Decisions(grids.astype(np.int16), kept, shrunk, drawn, rates, box)


def decide_all(
    image_hw: NDArray[np.integer],
    config: PackConfig,
    key: Key,
    *,
    index: NDArray[np.int64],
    view: NDArray[np.integer] | int = 0,
    executor: Executor | None = None,
) -> tuple[NDArray[np.int16], NDArray[np.int32], int]:
    """Return (grid_hw, num_keep, how many were shrunk) for any number of images, in pieces."""
    # Every piece writes to a place of its own, so threads need no lock and their order is free.
    grid_hw = np.empty((len(image_hw), 2), np.int16)
    num_keep = np.empty(len(image_hw), np.int32)

    def decide_some(start: int) -> int:
        some = slice(start, start + _AT_ONCE)
        views = np.broadcast_to(view, len(index))[some]
        shrunk = 0
        for law, own in by_law(config, views):
            found = decide(image_hw[some][own], law, key, index=index[some][own], view=views[own])
            grid_hw[some][own], num_keep[some][own] = found.grid_hw, found.num_keep
            shrunk += int(found.shrunk.sum())
        return shrunk

    run = map if executor is None else executor.map
    return grid_hw, num_keep, sum(run(decide_some, range(0, len(image_hw), _AT_ONCE)))


def boxes(
    config: PackConfig,
    image_hw: NDArray[np.integer],
    key: Key,
    *,
    index: NDArray[np.int64],
    view: ArrayLike = 0,
) -> NDArray[np.int32] | None:
    """Return int32[images, 4], the boxes that images are cropped to; None if none ever is.

    Args:
        config: the options; a view that is not cropped has the whole image.
        image_hw: int[images, 2], upright (height, width) in pixels.
        key: (seed, epoch) of all draws.
        index: int64[images], each image's row in its source.
        view: int[images], which of an image's views; one number for all.
    """
    if not config.crops:
        return None
    views = np.broadcast_to(view, len(index))
    found = np.zeros((len(index), 4), np.int32)
    found[:, 2:] = image_hw
    for law, own in by_law(config, views):
        box = crops.crop_boxes(law.crop, image_hw[own], key, index=index[own], view=views[own])
        if box is not None:
            found[own] = box
    return found


def by_law(
    config: PackConfig, views: NDArray[np.integer]
) -> Iterator[tuple[PackConfig, slice | NDArray[np.bool_]]]:
    """Yield the options of each law of views, and which of the images have a view of it.

    Args:
        config: the options.
        views: int[images], which of an image's views each is.
    """
    laws = config.laws()
    if len(laws) == 1:
        yield laws[0][1], slice(None)
        return
    which = np.searchsorted([first for first, _ in laws], views, side="right") - 1
    for number, (_, law) in enumerate(laws):
        yield law, which == number


def _shrink(
    grids: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    where: NDArray[np.bool_],
    law: Resolution,
    image_hw: NDArray[np.integer],
    limit: NDArray[np.int64] | int,
) -> None:
    """Replace the grids of images in `where` by the largest of their law within the limit."""
    if where.any():
        limits = np.broadcast_to(limit, len(grids))[where]
        grids[where] = resolution.shrunk_grids(law, image_hw[where], limits)
        num_tokens[where] = grids[where, 0] * grids[where, 1]
