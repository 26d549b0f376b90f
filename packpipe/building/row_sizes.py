"""About how many bytes the rows of images take: rows are cut into files and batches by it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe.building.images import Images
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.rows import schema


class RowSizes(NamedTuple):
    """Sizes of rows in bytes; the fields are those of `PlannedRows` of the same names."""

    cut_size: int
    row_size: int
    segment_size: int
    varying_sizes: NDArray[np.int64]
    fill_size: int


def row_sizes(images: Images, plan: EpochPlan, rows: NDArray[np.int64]) -> RowSizes:
    """Return about how many bytes the rows of a plan take.

    Args:
        images: the images, and what rows hold of them.
        plan: their plan.
        rows: int64[images of the plan], the row of each in its source.
    """
    config, masks = images.config, images.masks
    # Beside the patches, 8 bytes a token: an int32 of segment_ids and two int16 of coords.
    pixels = config.row_bytes + config.seq_len * 8 if images.stores_pixels else 0
    if masks is not None:
        pixels += masks.padding(1, config).nbytes
    more = schema.sometimes_of(config, weighted=images.weights is not None)
    row_size = pixels + (5 + len(more)) * 4  # and one offset of each of five to eight lists
    # Length, grid, size, index, (a guess) label; box, and view and weight.
    segment_size = 4 + 4 + 8 + 8 + 8 + 16 * ("box" in more) + 4 * len({*more} - {"box"})
    image_bytes = np.zeros(len(plan), np.int64)
    if images.encodes:
        segment_size += 16  # where the image ends, and its checksum
        image_bytes = _image_bytes(plan, images.source.num_bytes()[rows])
    stored = row_size + segment_size * (len(plan.order) // max(1, len(plan)))
    return RowSizes(
        cut_size=config.row_bytes if images.stores_pixels else stored,
        row_size=row_size,
        segment_size=segment_size,
        varying_sizes=image_bytes,
        fill_size=config.row_bytes if images.encodes else 0,
    )


def _image_bytes(plan: EpochPlan, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return int64[packs], about how many bytes of encoded images each holds.

    Args:
        plan: the plan.
        sizes: int64[images of the plan], bytes of each; below 0 if nobody knows them.
    """
    # Of files on other machines: two bits a pixel are those of a good JPEG.
    guessed = plan.image_hw.astype(np.int64).prod(axis=1) // 4
    known = np.where(sizes < 0, guessed, sizes)[plan.order // plan.config.num_views]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(known)])
    return np.diff(ends[plan.offsets])
