"""Packed rows in memory: several images side by side in seq_len tokens (floor 1).

`Segments` says what stands where (the plan, row by row); `fill_rows` obeys it and adds the
tokens, which gives `Rows`. Two rows of six tokens, images of 2x2, 1x1 and 1x3 patches:

    seq_lens     4, 1 | 3             offsets  0, 2, 3
    segment_ids  1 1 1 1 2 0          1 1 1 0 0 0
    coords  y    0 0 1 1 0 0          0 0 0 0 0 0
            x    0 1 0 1 0 0          0 1 2 0 0 0

An image that fails when decoded is left out of its row: the segments after it move up, its
tokens become padding, and nobody changes rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.config import PackConfig
from packpipe.dropping import kept_tokens
from packpipe.epoch_plan import EpochPlan
from packpipe.images import BadImage, ImageData, pixel_rules
from packpipe.orders import Failure, Order, fill_row
from packpipe.row_picture import png


class Reject(NamedTuple):
    """A source example that is in no pack, and why."""

    example_index: int
    stage: str
    reason: str
    exception: str


@dataclass(frozen=True, eq=False)
class Segments:
    """Which images stand in which rows: one entry a segment, in row order.

    Attributes:
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        seq_lens: int32[segments], tokens kept.
        grid_hw: int16[segments, 2], patches of the full grid.
        image_hw: int32[segments, 2], upright source size in pixels.
        example_index: int64[segments], row in the source; -1 where it is not known.
        labels: one value a segment, or None.
    """

    offsets: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    grid_hw: NDArray[np.int16]
    image_hw: NDArray[np.int32]
    example_index: NDArray[np.int64]
    labels: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def keep(self, kept: NDArray[np.bool_]) -> Segments:
        """Return the segments for which kept: bool[segments] holds, rows unchanged."""
        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        return Segments(
            offsets=kept_before[self.offsets],
            seq_lens=self.seq_lens[kept],
            grid_hw=self.grid_hw[kept],
            image_hw=self.image_hw[kept],
            example_index=self.example_index[kept],
            labels=None if self.labels is None else self.labels.filter(pa.array(kept)),
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows: segments and their tokens.

    Attributes:
        segments: what stands where.
        patches: uint8[rows, seq_len, P·P·3]; zeros in padding.
        segment_ids: int32[rows, seq_len]: 1, 2, ... in row order; 0 is padding.
        coords: int16[rows, seq_len, 2], (y, x) in the image's patch grid; 0 in padding.
    """

    segments: Segments
    patches: NDArray[np.uint8]
    segment_ids: NDArray[np.int32]
    coords: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.segments)

    def _repr_png_(self) -> bytes:
        return png(self.patches, self.segment_ids)


def gathered(parts: list[Rows], numbers: list[int]) -> Rows:
    """Return one row of each part, in memory of their own: a single copy.

    Args:
        parts: rows of one shape, one at least; the same part may come again.
        numbers: which row of each.
    """
    rows = list(zip(parts, numbers, strict=True))
    tokens = {}
    for name in ("patches", "segment_ids", "coords"):
        sample = getattr(parts[0], name)
        out = np.empty((len(rows), *sample.shape[1:]), sample.dtype)
        for place, (part, number) in enumerate(rows):
            out[place] = getattr(part, name)[number]
        tokens[name] = out
    spans = [slice(*part.segments.offsets[number : number + 2].tolist()) for part, number in rows]
    found = [part.segments for part, _ in rows]

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate(
            [getattr(some, name)[span] for some, span in zip(found, spans, strict=True)]
        )

    labels = [
        some.labels[span]
        for some, span in zip(found, spans, strict=True)
        if some.labels is not None
    ]
    segments = Segments(
        offsets=np.cumsum([0, *(span.stop - span.start for span in spans)]),
        seq_lens=joined("seq_lens"),
        grid_hw=joined("grid_hw"),
        image_hw=joined("image_hw"),
        example_index=joined("example_index"),
        labels=pa.concat_arrays(labels) if labels else None,
    )
    return Rows(segments=segments, **tokens)


def spread(rows: Rows, places: NDArray[np.int64], num_rows: int) -> Rows:
    """Return num_rows rows: those given at their places, which rise, and empty ones elsewhere."""
    held = np.zeros(num_rows, np.int64)
    held[places] = np.diff(rows.segments.offsets)
    tokens = {}
    for name in ("patches", "segment_ids", "coords"):
        values = getattr(rows, name)
        tokens[name] = np.zeros((num_rows, *values.shape[1:]), values.dtype)
        tokens[name][places] = values
    segments = replace(rows.segments, offsets=np.concatenate([[0], np.cumsum(held)]))
    return Rows(segments=segments, **tokens)


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
