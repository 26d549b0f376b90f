"""`TokenBatch`: packed rows of tokens as tensors of one shape (floor 2, torch).

Shape letters: B rows, L tokens a row (seq_len), S segments a row (max_segments).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packpipe import checks
from packpipe.token_rows import TokenRows

NO_EXAMPLE = -1


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of packed rows of tokens; absent segments have seq_lens 0.

    Has what `packpipe.attention.flatten` asks for, so its backends serve text, too.

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
            tokens={name: _tensor(values) for name, values in rows.tokens.items()},
            segment_ids=_tensor(rows.segment_ids),
            position_ids=_tensor(rows.position_ids),
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


def _tensor(values: NDArray[Any]) -> Tensor:
    wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
    return torch.from_numpy(values.astype(np.int64) if wide else values.copy())
