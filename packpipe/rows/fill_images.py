"""Fills the rows of images: what a plan says of each, and the patches of those that decode.

An image that fails when decoded is left out of its row: the segments after it move up, its
tokens become padding, and nobody changes rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.images.decode import pixel_rules
from packpipe.images.fill import Failure, Order, fill_row
from packpipe.images.opening import BadImage, ImageData
from packpipe.planning.dropping import kept_tokens
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows, Segments


def planned_segments(
    plan: EpochPlan, packs: range | NDArray[np.int64], labels: pa.Array | pa.ChunkedArray | None
) -> Segments:
    """Return the segments a plan puts into some packs.

    Args:
        plan: the plan.
        packs: which of its packs.
        labels: one value a source row, or None.
    """
    numbers = np.asarray(packs, np.int64)
    held = plan.offsets[numbers + 1] - plan.offsets[numbers]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(held)])
    places = np.repeat(plan.offsets[numbers] - offsets[:-1], held) + np.arange(offsets[-1])
    members = plan.order[places]
    example_index = plan.index[members]
    taken = None if labels is None else labels.take(pa.array(example_index))
    if isinstance(taken, pa.ChunkedArray):
        taken = taken.combine_chunks()
    return Segments(
        offsets=offsets,
        seq_lens=plan.num_keep[members],
        grid_hw=plan.grid_hw[members],
        image_hw=plan.image_hw[members],
        example_index=example_index,
        labels=taken,
    )


def fill_rows(
    segments: Segments,
    read_image: Callable[[int], ImageData],
    config: PackConfig,
    *,
    seed: int,
    epoch: int,
) -> tuple[Rows, list[Reject]]:
    """Return the rows of some segments, and the images that could not be decoded.

    Args:
        segments: what stands where.
        read_image: source row (an ``example_index``) to the image.
        config: the options the plan was made with.
        seed: likewise.
        epoch: likewise.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
    """
    tokens = planned_tokens(segments, seed=seed, epoch=epoch)
    patches = np.empty((len(segments), config.seq_len, config.patch_bytes), np.uint8)
    rules = pixel_rules(config)
    outcomes = [
        fill_row(orders, out, rules)
        for orders, out in zip(row_orders(segments, tokens, read_image), patches, strict=True)
    ]
    return filled_rows(segments, tokens, patches, outcomes)


def planned_tokens(segments: Segments, *, seed: int, epoch: int) -> NDArray[np.int32]:
    """Return int32[tokens], which patches of its grid each segment keeps, one after the other."""
    return kept_tokens(
        seed=seed,
        epoch=epoch,
        index=segments.example_index,
        num_tokens=segments.grid_hw.astype(np.int64).prod(axis=1),
        num_keep=segments.seq_lens,
    )


def row_orders(
    segments: Segments, tokens: NDArray[np.int32], read_image: Callable[[int], ImageData]
) -> Iterator[list[Order]]:
    """Yield what each row takes of its images.

    Args:
        segments: what stands where.
        tokens: their `planned_tokens`.
        read_image: source row to the image; called for one when its turn comes.
    """
    lens, ends = segments.seq_lens.tolist(), np.cumsum(segments.seq_lens).tolist()
    grids, sizes = segments.grid_hw.tolist(), segments.image_hw.tolist()
    examples, offsets = segments.example_index.tolist(), segments.offsets.tolist()

    def read(example: int) -> ImageData | Failure:
        try:
            return read_image(example)
        except BadImage as error:
            return Failure(error.reason, error.exception)

    def order(at: int) -> Order:
        rows, columns = grids[at]
        kept = None if lens[at] == rows * columns else tokens[ends[at] - lens[at] : ends[at]]
        data = partial(read, examples[at])
        return Order(examples[at], data, tuple(sizes[at]), (rows, columns), kept)

    for start, stop in pairwise(offsets):
        yield [order(at) for at in range(start, stop)]


def filled_rows(
    segments: Segments,
    tokens: NDArray[np.int32],
    patches: NDArray[np.uint8],
    outcomes: Sequence[Sequence[Failure | None]],
) -> tuple[Rows, list[Reject]]:
    """Return the rows whose patches are written, and the images that failed: they are left out.

    Args:
        segments: what was to stand where.
        tokens: their `planned_tokens`.
        patches: uint8[rows, seq_len, P·P·3], as `fill_row` wrote them.
        outcomes: what it returned, row by row.
    """
    flat = [outcome for row in outcomes for outcome in row]
    rejected = [
        Reject(example, "decode", *failure)
        for example, failure in zip(segments.example_index.tolist(), flat, strict=True)
        if failure is not None
    ]
    if rejected:
        good = np.array([failure is None for failure in flat], np.bool_)
        tokens = tokens[np.repeat(good, segments.seq_lens)]
        segments = segments.keep(good)
    segment_ids, coords = token_columns(segments, tokens, patches.shape[1])
    rows = Rows(segments=segments, patches=patches, segment_ids=segment_ids, coords=coords)
    return rows, rejected


def token_columns(
    segments: Segments, tokens: NDArray[np.int32], seq_len: int
) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Return (segment_ids, coords) of the rows, derived from lengths, grids and kept tokens."""
    num_segments = len(segments.seq_lens)
    per_row = np.diff(segments.offsets)
    row_of = np.repeat(np.arange(len(segments)), per_row)
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(segments.seq_lens)])
    start = tokens_before[:-1] - tokens_before[segments.offsets[:-1]][row_of]
    first_place = row_of * seq_len + start  # of each segment, rows laid end to end

    places = np.repeat(first_place - tokens_before[:-1], segments.seq_lens)
    places += np.arange(tokens_before[-1])
    columns = np.repeat(segments.grid_hw[:, 1], segments.seq_lens)
    ids = np.arange(num_segments) - np.repeat(segments.offsets[:-1], per_row) + 1

    segment_ids = np.zeros(len(segments) * seq_len, np.int32)
    segment_ids[places] = np.repeat(ids, segments.seq_lens)
    coords = np.zeros((len(segments) * seq_len, 2), np.int16)
    coords[places, 0] = tokens // columns
    coords[places, 1] = tokens % columns
    return segment_ids.reshape(-1, seq_len), coords.reshape(-1, seq_len, 2)
