"""`plan_epoch` plans an epoch of images from their sizes alone, before any pixel is read.

Decides each image's box, patch grid and kept tokens, which images share a pack, and the order of
the packs. A pure function of (sizes, configuration, seed, epoch):

* *local*: an image's box, grid and tokens depend on its own size, the configuration and
  (seed, epoch, index, view) only (`decisions`); except for the image in each pack that `fit_last`
  grows;
* *global*: which images share a pack depends on the token counts in plan order only.

Plan order is a seeded permutation of the images, cut into windows of almost equal size, so that
none is a small remainder. Each window is packed by itself and its packs are put in seeded order.
All views of an image are in its window, and packed like images of their own, unless they are kept
together.
Windows stay in order, so that a rate that changes over the training changes within an epoch too.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.packing.windows import pack_windows
from packpipe.planning import fit_last
from packpipe.planning.decisions import decide_all
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig

MAX_SIDE = 2**31 - 1  # image_hw is stored as int32
_MANY = 2**18  # images from which on starting threads pays off


def plan_epoch(
    image_hw: ArrayLike,
    config: PackConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: ArrayLike | None = None,
    also: tuple[ArrayLike, int] | None = None,
    first_pack: int = 0,
) -> EpochPlan:
    """Return the plan of an epoch: every image in exactly one pack of at most seq_len tokens.

    With views, every view of every image.

    If index is given, the order of image_hw does not matter: images are first put in an order
    drawn from (seed, epoch, index).

    Args:
        image_hw: int[images, 2], upright (height, width) in pixels, 1..2**31-1.
        config: the options.
        seed: seed of all draws and permutations, 0..2**64-1.
        epoch: 0..2**64-1; each epoch has other draws and permutations.
        index: int[images], each image's row in its source, without repeats; 0, 1, ... if None.
        also: (cost, limit), a second limit of a pack: the costs of its images, int[images], for
            example the tokens of their captions, sum to at most limit. Packs are then found by
            "ffd", whatever the strategy. Not with views.
        first_pack: number of the first pack, 0..2**63-1, by which the order of packs is drawn: so
            that parts of a source which are planned by themselves draw different orders.

    Raises:
        TypeError: config is no PackConfig, or image_hw or index hold no integers.
        ValueError: a size or an index is out of range or repeated (the first is named), the epoch
            lies after the end of the training, or there are views and a second limit.

    >>> plan = plan_epoch([[64, 64], [32, 96], [48, 16]], PackConfig(seq_len=24))
    >>> plan
    EpochPlan(3 images, 31 tokens in 2 packs of 24: padding 35.42%, gap 0; seed 0, epoch 0)
    >>> plan.grid_hw.tolist()
    [[4, 4], [2, 6], [3, 1]]

    Source: NaViT 2.2 and A.3; SigLIP2.
    """
    if not isinstance(config, PackConfig):
        name = type(config).__name__
        raise TypeError(checks.sentence("config", name, "a PackConfig", "pass PackConfig(...)"))
    key = philox.checked_key(seed, epoch)
    sizes = _checked_sizes(image_hw)
    rows = _checked_index(index, len(sizes))
    views = config.num_views
    if views > 1 and also is not None:
        expected, remedy = "1 with a second limit", "leave views out"
        raise ValueError(checks.sentence("views", views, expected, remedy))
    # Of every segment; of images themselves if each is one.
    index_of, size_of, view = (rows, sizes, 0) if views == 1 else _segments(rows, sizes, views)

    def ordered() -> NDArray[np.int64]:
        return philox.permutation(key, index=rows, stream=philox.EXAMPLE_ORDER)

    if len(sizes) < _MANY:
        order = ordered()
        decided = decide_all(size_of, config, key, index=index_of, view=view)
    else:
        # NumPy and the kernels release the interpreter lock, so the order is drawn and sorted
        # while other threads decide.
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            order_later = executor.submit(ordered)
            decided = decide_all(size_of, config, key, index=index_of, view=view, executor=executor)
            order = order_later.result()
    grid_hw, num_keep, num_shrunk = decided
    order, offsets = pack_windows(
        num_keep + np.int32(config.prefix_tokens),
        order,
        config,
        key,
        also=also,
        views=views,
        together=config.views_together,
        first_pack=first_pack,
    )
    num_fitted = 0
    if config.fit_last is not None:
        num_fitted = fit_last.fit_last(
            index_of, size_of, grid_hw, num_keep, order, offsets, config, key, view=view
        )
    return EpochPlan(
        config=config,
        seed=key.seed,
        epoch=key.epoch,
        index=rows,
        image_hw=sizes,
        grid_hw=grid_hw,
        num_keep=num_keep,
        order=order,
        offsets=offsets,
        num_shrunk=num_shrunk,
        num_fitted=num_fitted,
    )


def _segments(
    rows: NDArray[np.int64], sizes: NDArray[np.int32], views: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Return the index, size and view of every segment: all views of an image, then the next's."""
    view = np.tile(np.arange(views, dtype=np.int32), len(rows))
    return np.repeat(rows, views), np.repeat(sizes, views, axis=0), view


def _checked_sizes(image_hw: ArrayLike) -> NDArray[np.int32]:
    remedy = "pass (height, width) in pixels per image"
    # An empty list has one dimension; here it means no images.
    array = np.asarray(image_hw)
    sizes = checks.integer_array(
        "image_hw", array.reshape(0, 2) if not array.size else array, 2, remedy
    )
    if sizes.shape[1] != 2:
        raise ValueError(checks.sentence("image_hw.shape", sizes.shape, "(images, 2)", remedy))
    wrong = np.flatnonzero(((sizes < 1) | (sizes > MAX_SIDE)).any(axis=1))
    if wrong.size:
        height, width = sizes[wrong[0]].tolist()
        name = f"image_hw[{wrong[0]}]"
        expected = f"two sides in 1..{MAX_SIDE} pixels"
        raise ValueError(checks.sentence(name, (height, width), expected, "leave the image out"))
    return sizes.astype(np.int32)


def _checked_index(index: ArrayLike | None, num_images: int) -> NDArray[np.int64]:
    if index is None:
        return np.arange(num_images)
    rows = checks.integer_array("index", index, 1, "pass each image's row in its source")
    if len(rows) != num_images:
        raise ValueError(
            checks.sentence("len(index)", len(rows), f"{num_images} (images)", "one row an image")
        )
    wrong = np.flatnonzero((rows < 0) | (rows > np.iinfo(np.int64).max))
    if wrong.size:
        name, found = f"index[{wrong[0]}]", int(rows[wrong[0]])
        raise ValueError(
            checks.sentence(
                name, found, "0 or more" if found < 0 else "below 2**63", "count from zero"
            )
        )
    rows = rows.astype(np.int64)
    if (np.diff(rows) > 0).all():  # the usual case, in the order of the source: no sort needed
        return rows
    # Stable, so that of equal rows the later one is reported as the repeat.
    by_row = np.argsort(rows, kind="stable")
    repeated = by_row[1:][np.diff(rows[by_row]) == 0]
    if repeated.size:
        where = int(repeated.min())
        name = f"index[{where}]"
        raise ValueError(
            checks.sentence(name, int(rows[where]), "no repeats", "pass each image once")
        )
    return rows
