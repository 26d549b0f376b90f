"""Packed rows in memory: several examples side by side in seq_len tokens.

A packed dataset has columns of two kinds: some hold one entry a token, some one entry a segment (an
example, or a piece of one). `Rows` holds both by their names, the same for images and for token
sequences. Two rows of six tokens, images of 2x2, 1x1 and 1x3 patches:

    seq_lens     4, 1 | 3             offsets  0, 2, 3
    segment_ids  1 1 1 1 2 0          1 1 1 0 0 0
    coords  y    0 0 1 1 0 0          0 0 0 0 0 0
            x    0 1 0 1 0 0          0 1 2 0 0 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from packpipe.rows.picture import png
from packpipe.rows.text import joined

NO_LABEL = -100  # in `labels`, where there is no segment: torch's cross-entropy ignores it
# What a column of tokens holds in padding, where that is not 0.
_ABSENT = {"labels": NO_LABEL}


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows: columns of tokens and of segments, also as attributes: ``rows.patches``.

    Of images: ``patches`` uint8[rows, seq_len, P·P·3], ``coords`` int16[rows, seq_len, 2], (y, x)
    in the image's patch grid or, of a segment's k-th prefix token, (-1, k); ``grid_hw``
    int16[segments, 2], patches of the full grid, ``image_hw`` int32[segments, 2], upright source
    size in pixels; ``box`` int32[segments, 4], what it was cropped to in pixels (top, left, height,
    width), if it was; ``view`` int32[segments], which of the image's views, if there are several of
    each; ``weight`` float32[segments], what each counts in the loss, and ``labels``, if there are.
    ``targets`` uint8 or uint16[rows, seq_len, T], if there are: the classes of the T cells of each
    patch (`packpipe.images.masks`).
    Of token sequences: the source's columns of tokens, ``position_ids`` int32[rows, seq_len], 0, 1,
    ... within the segment; ``fragment`` int32[segments], which piece of its sequence, and the
    source's other columns.

    Attributes:
        offsets: int64[rows + 1]; row r holds the segments offsets[r]..offsets[r + 1] - 1.
        segments: by name, one entry a segment, in row order: NumPy arrays of packpipe's own
            columns, Arrow arrays of the source's. ``seq_lens`` int32[segments], tokens, and
            ``example_index`` int64[segments], row in the source or -1, are always there.
        tokens: by name, [rows, seq_len, ...]; zeros in padding. ``segment_ids`` int32[rows,
            seq_len], 1, 2, ... in row order, is always there, unless the rows are not filled yet:
            then there are no tokens.
    """

    offsets: NDArray[np.int64]
    segments: dict[str, Any]
    tokens: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getattr__(self, name: str) -> Any:
        # Through vars: `copy` and `pickle` ask for names before there are fields, and self.tokens
        # would then call this method again, without end.
        for columns in (vars(self).get("tokens", {}), vars(self).get("segments", {})):
            if name in columns:
                return columns[name]
        raise AttributeError(f"these rows have no column {name!r}")

    @property
    def of_tokens(self) -> bool:
        """Whether these are rows of token sequences, not of images."""
        return "fragment" in self.segments

    @property
    def views(self) -> NDArray[np.int32] | int:
        """int32[segments], which of its example's views each is; 0 for all if there is but one."""
        found: NDArray[np.int32] | int = self.segments.get("view", 0)
        return found

    @property
    def num_segments(self) -> NDArray[np.int64]:
        """int64[rows], how many segments each holds."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """int64[segments], the number of each within its row: 0, 1, ..."""
        return self.places(0)

    def first_places(self, seq_len: int) -> NDArray[np.int64]:
        """Return int64[segments], where each one's first token goes, rows laid end to end."""
        lens = self.segments["seq_lens"]
        before = np.concatenate([[0], np.cumsum(lens, dtype=np.int64)])
        row_starts = np.arange(len(self)) * seq_len - before[self.offsets[:-1]]
        places: NDArray[np.int64] = before[:-1] + np.repeat(row_starts, self.num_segments)
        return places

    def patch_places(self, seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return int64[segments] twice, where each one's patches begin, and how many there are.

        Prefix tokens, as many in each segment, come before them.
        """
        slots = int((self.tokens["coords"][..., 0] < 0).sum()) // max(1, len(self.numbers))
        return self.first_places(seq_len) + slots, self.segments["seq_lens"].astype(
            np.int64
        ) - slots

    def keep(self, kept: NDArray[np.bool_]) -> Rows:
        """Return these rows of the segments for which kept: bool[segments] is true.

        Tokens move up to where others are left out; padding follows them.
        """
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        segments = {name: _kept(values, kept) for name, values in self.segments.items()}
        rows = Rows(before[self.offsets], segments)
        if not self.tokens:
            return rows
        real = self.tokens["segment_ids"] > 0
        stays = real.copy()
        stays[real] = np.repeat(kept, self.segments["seq_lens"])
        front = np.arange(real.shape[1]) < stays.sum(1, keepdims=True)
        for name, values in self.tokens.items():
            rows.tokens[name] = _padding(name, values, len(self))
            rows.tokens[name][front] = values[stays]
        ids = np.repeat(rows.numbers + 1, rows.segments["seq_lens"])
        rows.tokens["segment_ids"][front] = ids
        return rows

    def spread(self, places: NDArray[np.int64], num_rows: int) -> Rows:
        """Return num_rows rows: these rows at ascending places, empty rows elsewhere."""
        held = np.zeros(num_rows, np.int64)
        held[places] = self.num_segments
        tokens = {}
        for name, values in self.tokens.items():
            tokens[name] = _padding(name, values, num_rows)
            tokens[name][places] = values
        return replace(self, offsets=np.concatenate([[0], np.cumsum(held)]), tokens=tokens)

    def places(self, width: int) -> NDArray[np.int64]:
        """Return int64[segments], the place of each in [rows, width] laid end to end.

        Args:
            width: as many segments as any row holds, or more.
        """
        before = self.offsets[:-1] - np.arange(len(self)) * width
        return np.arange(self.offsets[-1]) - np.repeat(before, self.num_segments)

    def _repr_png_(self) -> bytes | None:
        return None if self.of_tokens else png(self.patches, self.segment_ids)


def gather(
    parts: Sequence[Rows],
    numbers: Sequence[int],
    empty: Callable[..., NDArray[Any]] = np.empty,
) -> Rows:
    """Return one row of each part, in new memory; every token is copied once.

    Args:
        parts: rows with the same columns, one at least; the same part may come again.
        numbers: which row of each.
        empty: makes the memory of tokens, of a shape and a dtype.
    """
    spans = [
        slice(*part.offsets[number : number + 2].tolist())
        for part, number in zip(parts, numbers, strict=True)
    ]
    tokens = {}
    for name, sample in parts[0].tokens.items():
        tokens[name] = empty((len(parts), *sample.shape[1:]), sample.dtype)
        # Parts are views of different memory, so each row is one copy: with all it does a loader
        # reads at 0.7 of the speed of a plain copy (benchmarks/results/epochs.md).
        for place, (part, number) in enumerate(zip(parts, numbers, strict=True)):
            tokens[name][place] = part.tokens[name][number]
    segments = {
        name: _joined([part.segments[name][span] for part, span in zip(parts, spans, strict=True)])
        for name in parts[0].segments
    }
    return Rows(np.cumsum([0, *(span.stop - span.start for span in spans)]), segments, tokens)


def _padding(name: str, values: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """Return num_rows rows of padding of a column of tokens."""
    # Rows do not hold pad_token_id. Padding is never attended to, so input_ids may be 0.
    absent = np.iinfo(values.dtype).max if name == "targets" else _ABSENT.get(name, 0)
    return np.full((num_rows, *values.shape[1:]), absent, values.dtype)


def _kept(values: Any, kept: NDArray[np.bool_]) -> Any:
    return values.filter(pa.array(kept)) if isinstance(values, pa.Array) else values[kept]


def _joined(parts: list[Any]) -> Any:
    if not isinstance(parts[0], pa.Array):
        return np.concatenate(parts)
    return joined(pa.chunked_array(parts))
