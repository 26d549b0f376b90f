"""Packed rows in memory: several images side by side in seq_len tokens.

`Segments` says what stands where (the plan, row by row); with the tokens it is `Rows`. Two rows of
six tokens, images of 2x2, 1x1 and 1x3 patches:

    seq_lens     4, 1 | 3             offsets  0, 2, 3
    segment_ids  1 1 1 1 2 0          1 1 1 0 0 0
    coords  y    0 0 1 1 0 0          0 0 0 0 0 0
            x    0 1 0 1 0 0          0 1 2 0 0 0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.rows.picture import png


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


NO_LABEL = -100


NUMBER_COLUMNS = ("segment_ids", "position_ids")


SEGMENT_TYPES = {"seq_lens": pa.int32(), "fragment": pa.int32(), "example_index": pa.int64()}


SEGMENT_COLUMNS = tuple(SEGMENT_TYPES)


RESERVED = (*NUMBER_COLUMNS, *SEGMENT_COLUMNS)


@dataclass(frozen=True, eq=False)
class TokenSegments:
    """Which sequences stand in which rows: one entry a segment, in row order.

    Attributes:
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        seq_lens: int32[segments], tokens.
        fragment: int32[segments], which piece of its sequence.
        example_index: int64[segments], row in the source; -1 where it is not known.
        values: the source's other columns, one value a segment.
    """

    offsets: NDArray[np.int64]
    seq_lens: NDArray[np.int32]
    fragment: NDArray[np.int32]
    example_index: NDArray[np.int64]
    values: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Packed rows of one length.

    Attributes:
        segments: what stands where.
        tokens: by name, [rows, seq_len]; of the source's columns.
        segment_ids: int32[rows, seq_len]: 1, 2, ... in row order; 0 is padding.
        position_ids: int32[rows, seq_len], 0, 1, ... within the segment; 0 in padding.
    """

    segments: TokenSegments
    tokens: dict[str, NDArray[Any]]
    segment_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.segments)


def gathered_tokens(parts: list[TokenRows], numbers: list[int]) -> TokenRows:
    """Return one row of each part, in memory of their own.

    Args:
        parts: rows of one shape and the same columns, one at least; a part may come again.
        numbers: which row of each.
    """
    rows = list(zip(parts, numbers, strict=True))
    spans = [slice(*part.segments.offsets[number : number + 2].tolist()) for part, number in rows]
    found = [(part.segments, span) for (part, _), span in zip(rows, spans, strict=True)]
    segments = {
        name: np.concatenate([getattr(some, name)[span] for some, span in found])
        for name in SEGMENT_TYPES
    }
    values = {
        name: pa.concat_arrays([some.values[name][span] for some, span in found])
        for name in parts[0].segments.values
    }
    offsets = np.cumsum([0, *(span.stop - span.start for span in spans)])
    return TokenRows(
        segments=TokenSegments(offsets=offsets, **segments, values=values),
        tokens={
            name: np.stack([part.tokens[name][number] for part, number in rows])
            for name in parts[0].tokens
        },
        segment_ids=np.stack([part.segment_ids[number] for part, number in rows]),
        position_ids=np.stack([part.position_ids[number] for part, number in rows]),
    )


def spread_tokens(rows: TokenRows, places: NDArray[np.int64], num_rows: int) -> TokenRows:
    """Return num_rows rows: those given at their places, which rise, and empty ones elsewhere."""

    def at_places(values: NDArray[Any], absent: int) -> NDArray[Any]:
        out = np.full((num_rows, *values.shape[1:]), absent, values.dtype)
        out[places] = values
        return out

    held = np.zeros(num_rows, np.int64)
    held[places] = np.diff(rows.segments.offsets)
    # input_ids: no row says what its padding is; a token nobody sees may be any.
    tokens = {
        name: at_places(values, NO_LABEL if name == "labels" else 0)
        for name, values in rows.tokens.items()
    }
    return TokenRows(
        segments=replace(rows.segments, offsets=np.concatenate([[0], np.cumsum(held)])),
        tokens=tokens,
        segment_ids=at_places(rows.segment_ids, 0),
        position_ids=at_places(rows.position_ids, 0),
    )
