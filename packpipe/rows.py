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

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.config import PackConfig
from packpipe.images import BadImage, Encoded, decode
from packpipe.patches import patchify
from packpipe.plan import EpochPlan


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


def planned_segments(
    plan: EpochPlan, packs: range, labels: pa.Array | pa.ChunkedArray | None
) -> Segments:
    """Return the segments a plan puts into some consecutive packs.

    Args:
        plan: the plan.
        packs: which of its packs.
        labels: one value a source row, or None.
    """
    first, last = plan.offsets[packs.start], plan.offsets[packs.stop]
    members = plan.order[first:last]
    example_index = plan.index[members]
    taken = None if labels is None else labels.take(pa.array(example_index))
    if isinstance(taken, pa.ChunkedArray):
        taken = taken.combine_chunks()
    return Segments(
        offsets=plan.offsets[packs.start : packs.stop + 1] - first,
        seq_lens=plan.num_keep[members],
        grid_hw=plan.grid_hw[members],
        image_hw=plan.image_hw[members],
        example_index=example_index,
        labels=taken,
    )


def fill_rows(
    segments: Segments,
    read_image: Callable[[int], Encoded],
    config: PackConfig,
    executor: Executor | None = None,
) -> tuple[Rows, list[Reject]]:
    """Return the rows of some segments, and the images that could not be decoded.

    The same bytes whatever the executor: rows are filled in place, each by one task.

    Args:
        segments: what stands where.
        read_image: source row (an ``example_index``) to the encoded image.
        config: the options the plan was made with.
        executor: runs one task a row; None runs them here.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
    """
    patches = np.zeros((len(segments), config.seq_len, config.patch_bytes), np.uint8)

    def fill_row(row: int) -> list[Reject | None]:
        place = 0
        outcomes: list[Reject | None] = []
        for segment in range(segments.offsets[row], segments.offsets[row + 1]):
            end = place + int(segments.seq_lens[segment])
            outcome = _fill_segment(segments, segment, read_image, config, patches[row, place:end])
            outcomes.append(outcome)
            if outcome is None:
                place = end
        return outcomes

    run = map if executor is None else executor.map
    outcomes = [outcome for row in run(fill_row, range(len(segments))) for outcome in row]
    kept = segments.keep(np.array([outcome is None for outcome in outcomes], np.bool_))
    segment_ids, coords = _token_columns(kept, config.seq_len)
    rejected = [outcome for outcome in outcomes if outcome is not None]
    return Rows(segments=kept, patches=patches, segment_ids=segment_ids, coords=coords), rejected


def _fill_segment(
    segments: Segments,
    segment: int,
    read_image: Callable[[int], Encoded],
    config: PackConfig,
    out: NDArray[np.uint8],
) -> Reject | None:
    """Write the tokens of one segment into out, or return why not."""
    example = int(segments.example_index[segment])
    rows, columns = segments.grid_hw[segment].tolist()
    height, width = segments.image_hw[segment].tolist()
    try:
        pixels = decode(
            read_image(example),
            image_hw=(height, width),
            target_hw=(rows * config.patch_size, columns * config.patch_size),
            background=config.background,
            max_pixels=config.max_pixels,
        )
    except BadImage as error:
        return Reject(example, "decode", error.reason, error.exception)
    except ValueError as error:
        raise ValueError(f"example {example}: {error}") from error
    patchify(pixels, out)
    return None


def _token_columns(segments: Segments, seq_len: int) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Return (segment_ids, coords) of the rows, derived from lengths and grids alone."""
    num_segments = len(segments.seq_lens)
    per_row = np.diff(segments.offsets)
    row_of = np.repeat(np.arange(len(segments)), per_row)
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(segments.seq_lens)])
    start = tokens_before[:-1] - tokens_before[segments.offsets[:-1]][row_of]
    first_place = row_of * seq_len + start  # of each segment, rows laid end to end

    token = np.arange(tokens_before[-1]) - np.repeat(tokens_before[:-1], segments.seq_lens)
    places = np.repeat(first_place, segments.seq_lens) + token
    columns = np.repeat(segments.grid_hw[:, 1], segments.seq_lens)
    ids = np.arange(num_segments) - np.repeat(segments.offsets[:-1], per_row) + 1

    segment_ids = np.zeros(len(segments) * seq_len, np.int32)
    segment_ids[places] = np.repeat(ids, segments.seq_lens)
    coords = np.zeros((len(segments) * seq_len, 2), np.int16)
    coords[places, 0] = token // columns
    coords[places, 1] = token % columns
    return segment_ids.reshape(-1, seq_len), coords.reshape(-1, seq_len, 2)
