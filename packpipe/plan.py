"""The plan of an epoch: from image sizes alone, before any pixel is read (floor 0).

Decides each image's patch grid and kept tokens, which images share a pack, and the order of
the packs. A pure function of (sizes, configuration, seed, epoch):

* *local*: an image's grid and tokens depend on its own size, the configuration and
  (seed, epoch, index) only;
* *global*: which images share a pack depends on the token counts in plan order only.

Plan order is a seeded permutation of the images, cut into windows; each window is packed by
itself, then all packs are put in seeded order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox, resolution
from packpipe.config import PackConfig
from packpipe.limits import Limits
from packpipe.packing import pack_lengths
from packpipe.quality import Quality

MAX_SIDE = 2**31 - 1  # image_hw is stored as int32


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What every pack of an epoch holds; ``plan[p]`` are the source rows in pack p.

    Attributes:
        config, seed, epoch: what the plan was made from, besides the sizes.
        index: int64[images], row of each planned image in its source.
        image_hw: int32[images, 2], upright source size in pixels.
        grid_hw: int16[images, 2], (rows, columns) of patches after resizing.
        num_keep: int32[images], tokens kept.
        order: int64[images], positions in the arrays above, pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
    """

    config: PackConfig
    seed: int
    epoch: int
    index: NDArray[np.int64]
    image_hw: NDArray[np.int32]
    grid_hw: NDArray[np.int16]
    num_keep: NDArray[np.int32]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def members(self, pack: int) -> NDArray[np.int64]:
        """Return the positions (into index, image_hw, ...) of the images in a pack."""
        pack = range(len(self))[operator.index(pack)]
        return self.order[self.offsets[pack] : self.offsets[pack + 1]]

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.index[self.members(pack)]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))

    @cached_property
    def quality(self) -> Quality:
        """Fill, bound (with these token counts in one window), gap and the other figures."""
        limits = Limits(self.config.seq_len, self.config.max_segments)
        counts = np.bincount(self.num_keep, minlength=limits.seq_len + 1).astype(np.int64)
        return Quality(
            num_examples=len(self.index),
            num_tokens=int(self.num_keep.sum(dtype=np.int64)),
            num_packs=len(self),
            seq_len=limits.seq_len,
            bound=limits.bound(counts),
            most_segments=int(np.diff(self.offsets).max(initial=0)),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all packs, padding not counted."""
        return self.quality.num_tokens

    @property
    def fill(self) -> float:
        """Real tokens ÷ slots; 1.0 when there are no packs."""
        return self.quality.fill

    @property
    def padding(self) -> float:
        """Share of slots that hold no token."""
        return self.quality.padding

    @property
    def bound(self) -> int:
        """Packs below which no packer can go, with these token counts in one window."""
        return self.quality.bound

    @property
    def gap(self) -> int:
        """Packs above the proven lower bound."""
        return self.quality.gap

    @property
    def num_shrunk(self) -> int:
        """Images that had more than the allowed tokens at their own size."""
        native = resolution.native_grids(self.image_hw, self.config.patch_size)
        return int((native.prod(axis=1) > self.config.token_limit).sum())

    def __repr__(self) -> str:
        return (
            f"EpochPlan({len(self.index)} images, {self.num_tokens} tokens in {len(self)} packs of "
            f"{self.config.seq_len}: padding {self.padding:.2%}, gap {self.gap}; "
            f"seed {self.seed}, epoch {self.epoch})"
        )


def plan_epoch(
    image_hw: ArrayLike,
    config: PackConfig,
    *,
    seed: int = 0,
    epoch: int = 0,
    index: ArrayLike | None = None,
) -> EpochPlan:
    """Return the plan of an epoch: every image in exactly one pack of at most seq_len tokens.

    The order of image_hw does not matter if index is given with it: images are put in an
    order drawn from (seed, epoch, index) first.

    Args:
        image_hw: int[images, 2], upright (height, width) in pixels, 1..2**31-1.
        config: the options.
        seed: which permutation of images and packs; 0..2**64-1.
        epoch: likewise; a new epoch is a new permutation.
        index: int[images], each image's row in its source, without repeats; 0, 1, ... if None.

    Raises:
        TypeError: image_hw or index hold no integers.
        ValueError: a size or an index is out of range or repeated; the first is named.

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
    seed, epoch = checks.seed_and_epoch(seed, epoch)
    sizes = _checked_sizes(image_hw)
    rows = _checked_index(index, len(sizes))
    order = philox.permutation(seed=seed, epoch=epoch, index=rows, stream=philox.EXAMPLE_ORDER)
    by_row = np.argsort(rows, kind="stable")
    repeated = by_row[1:][np.diff(rows[by_row]) == 0]
    if repeated.size:
        where = int(repeated.min())
        raise ValueError(
            checks.sentence(
                f"index[{where}]", int(rows[where]), "no repeats", "pass each image once"
            )
        )

    grid_hw = resolution.patch_grids(
        sizes, config.patch_size, config.token_limit, config.resolution
    )
    num_keep = grid_hw.astype(np.int32).prod(axis=1, dtype=np.int32)
    order, offsets = _pack_windows(num_keep[order], order, config)
    order, offsets = _shuffle_packs(order, offsets, seed=seed, epoch=epoch)
    return EpochPlan(
        config=config,
        seed=seed,
        epoch=epoch,
        index=rows,
        image_hw=sizes,
        grid_hw=grid_hw,
        num_keep=num_keep,
        order=order,
        offsets=offsets,
    )


def _pack_windows(
    lengths: NDArray[np.int32], order: NDArray[np.int64], config: PackConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) of the packs of every window, one after the other."""
    orders, ends = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    for start in range(0, len(lengths), config.window):
        window = slice(start, start + config.window)
        packs = pack_lengths(
            lengths[window],
            config.seq_len,
            strategy=config.strategy,
            max_segments=config.max_segments,
        )
        orders.append(order[window][packs.order])
        ends.append(packs.offsets[1:] + start)
    return np.concatenate(orders), np.concatenate(ends)


def _shuffle_packs(
    order: NDArray[np.int64], offsets: NDArray[np.int64], *, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, offsets) with the packs in seeded order."""
    packs = philox.permutation(
        seed=seed, epoch=epoch, index=np.arange(len(offsets) - 1), stream=philox.PACK_ORDER
    )
    num_segments = np.diff(offsets)[packs]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_segments)])
    places = np.repeat(offsets[packs] - ends[:-1], num_segments) + np.arange(len(order))
    return order[places], ends


def _checked_sizes(image_hw: ArrayLike) -> NDArray[np.int32]:
    remedy = "pass (height, width) in pixels per image"
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
    return rows.astype(np.int64)
