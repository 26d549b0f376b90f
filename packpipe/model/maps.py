"""Puts the outputs of tokens back into the grid of their image, and makes class maps of them."""

from __future__ import annotations

from torch import Tensor

from packpipe import checks
from packpipe.loading.batch import PackedBatch


def token_maps(batch: PackedBatch, values: Tensor) -> list[tuple[int, Tensor]]:
    """Return (example_index, map) of every segment: its tokens' values in their image's grid.

    Prefix tokens have no place in it, and are left out.

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
            coords = batch.coords[row, place].long()
            real = coords[:, 0] >= 0
            # By coordinates, since tokens may be dropped, and in any order.
            filled = grid.index_put(coords[real].unbind(-1), values[row, place][real])
            maps.append((int(batch.example_index[row, number]), filled))
    return maps


def class_map(logits: Tensor, patch_size: int) -> Tensor:
    """Return int64[rows·P, columns·P], the likeliest class of every pixel of a planned image.

    Every pixel has the class of its cell; of a model without ``target_stride``, of its token.

    Args:
        logits: [rows, columns, T, K] or [rows, columns, K], a map of `token_maps` or `predict`.
        patch_size: P.

    Raises:
        ValueError: a patch cannot be divided into T cells.
    """
    by_cell = logits if logits.ndim == 4 else logits[:, :, None]
    rows, columns, cells, _ = by_cell.shape
    side = round(cells**0.5)
    if side**2 != cells or patch_size % side:
        expected = f"a square whose side divides {patch_size} (patch_size)"
        remedy = "pass the patch_size of the model"
        raise ValueError(checks.sentence("cells of a token", cells, expected, remedy))
    classes = by_cell.argmax(-1).unflatten(-1, (side, side))  # [rows, columns, side, side]
    whole = classes.transpose(1, 2).reshape(rows * side, columns * side)
    stride = patch_size // side
    by_pixel: Tensor = whole.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return by_pixel
