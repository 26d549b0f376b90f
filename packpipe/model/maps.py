"""Puts the outputs of tokens back into the grid of their image."""

from __future__ import annotations

from torch import Tensor

from packpipe.loading.batch import PackedBatch


def token_maps(batch: PackedBatch, values: Tensor) -> list[tuple[int, Tensor]]:
    """Return (example_index, map) of every segment: its tokens' values in their image's grid.

    Args:
        batch: which tokens lie where.
        values: [B, L, ...], one entry a token, such as logits of a model without pooling.

    Returns:
        in row order; each map is [rows, columns, ...], 0 where tokens were dropped.
    """
    maps = []
    for row, lens in enumerate(batch.seq_lens.tolist()):
        start = 0
        for number, length in enumerate(lens):
            if not length:  # an absent segment
                continue
            place = slice(start, start + length)
            start += length
            height, width = batch.grid_hw[row, number].tolist()
            grid = values.new_zeros(height, width, *values.shape[2:])
            y, x = batch.coords[row, place].long().unbind(-1)
            # By coordinates, since tokens may be dropped, and in any order.
            filled = grid.index_put((y, x), values[row, place])
            maps.append((int(batch.example_index[row, number]), filled))
    return maps
