"""`PackedBatch`: packed rows as tensors of one shape.

The shapes depend on the batch size, ``seq_len`` and ``max_segments`` alone, never on what the
rows hold, so a compiled model meets one graph.

Shape letters, here and in the model: B rows, L tokens a row (seq_len), S segments a row
(max_segments), D bytes a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from packpipe import checks
from packpipe.rows.rows import Rows, TokenRows

NO_LABEL = -100  # what torch's cross-entropy ignores
NO_EXAMPLE = -1


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch of packed rows; absent segments have seq_lens 0.

    Attributes:
        patches: uint8[B, L, D], zeros in padding.
        segment_ids: int32[B, L]: 1, 2, ... in row order; 0 is padding.
        coords: int16[B, L, 2], (y, x) in the image's patch grid; 0 in padding.
        seq_lens: int32[B, S], tokens of each segment.
        grid_hw: int16[B, S, 2], patches of each full grid; 0 where absent.
        example_index: int64[B, S], row in the source; -1 where absent.
        labels: int64[B, S], -100 where absent; None without labels.
    """

    patches: Tensor
    segment_ids: Tensor
    coords: Tensor
    seq_lens: Tensor
    grid_hw: Tensor
    example_index: Tensor
    labels: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Rows, *, max_segments: int = 64, copy: bool = True) -> PackedBatch:
        """Return rows as tensors, segments padded to max_segments.

        Args:
            rows: what `read_rows` returned.
            max_segments: S; as large as the rows were packed with.
            copy: False lets the tensors share the rows' memory where it may be written to, which
                views of Arrow's may not.

        Raises:
            ValueError: a row holds more segments than max_segments.
            TypeError: the labels are no integers.
        """
        remedy = "pass the max_segments the rows were packed with"
        max_segments = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
        num_segments = np.diff(rows.segments.offsets)
        too_many = np.flatnonzero(num_segments > max_segments)
        if too_many.size:
            name, found = f"num_segments[{too_many[0]}]", int(num_segments[too_many[0]])
            expected = f"at most {max_segments} (max_segments)"
            raise ValueError(checks.sentence(name, found, expected, remedy))
        # Where each segment goes in a flattened [B, S] column.
        row_of = np.repeat(np.arange(len(rows)), num_segments)
        number = np.arange(len(row_of)) - rows.segments.offsets[:-1][row_of]
        place = row_of * max_segments + number

        def padded(values: NDArray[Any], absent: int) -> Tensor:
            shape = (len(rows) * max_segments, *values.shape[1:])
            column = np.full(shape, absent, values.dtype)
            column[place] = values
            return torch.from_numpy(column.reshape(len(rows), max_segments, *values.shape[1:]))

        segments = rows.segments
        return cls(
            patches=_tensor(rows.patches, copy),
            segment_ids=_tensor(rows.segment_ids, copy),
            coords=_tensor(rows.coords, copy),
            seq_lens=padded(segments.seq_lens, 0),
            grid_hw=padded(segments.grid_hw, 0),
            example_index=padded(segments.example_index, NO_EXAMPLE),
            labels=None
            if segments.labels is None
            else padded(_integer_labels(segments.labels), NO_LABEL),
        )

    @property
    def present(self) -> Tensor:
        """bool[B, S], which segments are there."""
        return self.seq_lens > 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory, which a GPU copies from without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return PackedBatch(**{name: change(tensor) for name, tensor in tensors.items()})

    def trim(self, multiple: int) -> PackedBatch:
        """Return rows without the last tokens that are padding in all of them.

        Rows of one image each, those of like length in one batch, become NaFlex's buckets.

        Args:
            multiple: the length stays a multiple of that many tokens, so that few shapes occur.
        """
        multiple = checks.whole_number("multiple", multiple, 1, 2**31 - 1, "64 is usual")
        longest = int(self.seq_lens.sum(1).max())
        end = max(1, -(-longest // multiple)) * multiple
        columns = ("patches", "segment_ids", "coords")
        return replace(self, **{name: getattr(self, name)[:, :end] for name in columns})

    def by_example(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return (example_index, values) of the segments that are there: the way back.

        Args:
            values: [B, S, ...], one entry a segment, such as the model's logits.

        Returns:
            int64[n] and [n, ...]; ``out[example_index] = values`` restores the source order.
        """
        present = self.present
        return self.example_index[present], values[present]


def _tensor(values: NDArray[Any], copy: bool) -> Tensor:
    return torch.from_numpy(values.copy() if copy or not values.flags.writeable else values)


def _integer_labels(labels: pa.Array) -> NDArray[np.int64]:
    if not len(labels):  # of a rank without packs; their type may be unknown
        return np.empty(0, np.int64)
    if not pa.types.is_integer(labels.type):
        remedy = "class_encode_column it before packing, or pack with label_column=None"
        raise TypeError(checks.sentence("labels.type", str(labels.type), "an integer type", remedy))
    return np.asarray(labels).astype(np.int64)


NO_EXAMPLE = -1


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of packed rows of tokens; absent segments have seq_lens 0.

    Has what `packpipe.model.attention.flatten` asks for, so its backends serve text, too.

    Attributes:
        tokens: by name, [B, L]: the source's token columns, unsigned types as int64.
        segment_ids: int32[B, L]: 1, 2, ... in row order; 0 is padding.
        position_ids: int32[B, L], 0, 1, ... within the segment; 0 in padding.
        seq_lens: int32[B, S], tokens of each segment.
        fragment: int32[B, S], which piece of its sequence; 0 where absent.
        example_index: int64[B, S], row in the source; -1 where absent.
    """

    tokens: dict[str, Tensor]
    segment_ids: Tensor
    position_ids: Tensor
    seq_lens: Tensor
    fragment: Tensor
    example_index: Tensor

    @classmethod
    def from_rows(cls, rows: TokenRows, *, max_segments: int) -> TokenBatch:
        """Return rows as tensors, segments padded to max_segments.

        Args:
            rows: what `read_tokens` returned.
            max_segments: S.

        Raises:
            ValueError: a row holds more segments than max_segments.
        """
        remedy = "pass as many as the rows hold"
        max_segments = checks.whole_number("max_segments", max_segments, 1, 2**31 - 1, remedy)
        num_segments = np.diff(rows.segments.offsets)
        most = int(num_segments.max(initial=0))
        if most > max_segments:
            name = f"num_segments[{int(num_segments.argmax())}]"
            expected = f"at most {max_segments} (max_segments)"
            raise ValueError(checks.sentence(name, most, expected, remedy))
        number = np.arange(num_segments.sum()) - np.repeat(rows.segments.offsets[:-1], num_segments)
        place = np.repeat(np.arange(len(rows)) * max_segments, num_segments) + number

        def padded(values: NDArray[Any], absent: int) -> Tensor:
            column = np.full(len(rows) * max_segments, absent, values.dtype)
            column[place] = values
            return torch.from_numpy(column.reshape(len(rows), max_segments))

        return cls(
            tokens={name: _signed_tensor(values) for name, values in rows.tokens.items()},
            segment_ids=_signed_tensor(rows.segment_ids),
            position_ids=_signed_tensor(rows.position_ids),
            seq_lens=padded(rows.segments.seq_lens, 0),
            fragment=padded(rows.segments.fragment, 0),
            example_index=padded(rows.segments.example_index, NO_EXAMPLE),
        )

    @property
    def present(self) -> Tensor:
        """bool[B, S], which segments are there."""
        return self.seq_lens > 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """Return the batch in page-locked memory, which a GPU copies from without waiting."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        columns = {name: value for name, value in vars(self).items() if name != "tokens"}
        return TokenBatch(
            tokens={name: change(value) for name, value in self.tokens.items()},
            **{name: change(value) for name, value in columns.items()},
        )


def _signed_tensor(values: NDArray[Any]) -> Tensor:
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    return torch.from_numpy(values.astype(np.int64) if wide else values.copy())
