"""Colours as one 3 × 4 matrix a picture: brightness, contrast, saturation and grey in one product.

A matrix takes (red, green, blue, 1), levels of 0..255, to the new levels. Beside it is the level
from which on levels are inverted first (solarized). Grey is 0.2989 red + 0.587 green + 0.114 blue,
the numbers of torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packpipe.augmenting.augment import NEVER, SOLARIZED, Draws

_GREY = np.array([0.2989, 0.587, 0.114])
_MIDDLE = 127.5


def matrices(draws: Draws) -> NDArray[np.float32]:
    """Return float32[n, 3, 4], the matrix of each picture.

    Exact on every machine: products and sums one by one, which no library reorders.
    """
    saturation = np.where(draws.grey, 0.0, draws.saturation)[:, None, None]
    scale = (draws.brightness * draws.contrast)[:, None, None]
    mixed = (saturation * np.eye(3) + (1 - saturation) * _GREY) * scale
    # Brightness before contrast, c · (b · level) + (1 - c) · middle: no brightness in the shift.
    shift = np.repeat((1 - draws.contrast) * _MIDDLE, 3).reshape(-1, 3, 1)
    return np.concatenate([mixed, shift], 2).astype(np.float32)


def inverted_from(draws: Draws) -> NDArray[np.float32]:
    """Return float32[n], the level from which on a picture's levels are inverted; 256 for none."""
    return np.where(draws.solarize, SOLARIZED, NEVER).astype(np.float32)


def coloured(batch: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the patches of a NumPy batch in their drawn colours, and mixed, uint8[B, L, D].

    Rounded, once.

    For batches of ``PackedLoader(..., as_numpy=True, augment=...)``; `PackedBatch.coloured` does
    the same to tensors, and `NaViT` by itself. On a device of your own, apply the matrices there:
    a picture's pixels are ``clip(colours[:, :3] @ pixel + colours[:, 3], 0, 255)``, of pixels of
    which levels from ``solarize`` on are 255 - level first. Then a token with a ``mix_offset`` is
    ``weight * pixels + (1 - weight) * those of the token so many places further on``, by the
    ``mix_weight`` of its segment.

    Args:
        batch: the columns of a `PackedBatch`; without ``colours`` and ``mix_offset`` its patches
            come back as they are.
    """
    patches: NDArray[np.uint8] = batch["patches"]
    if "colours" not in batch and "mix_offset" not in batch:
        return patches
    out = patches.copy()
    # Row after row, so that the floats take the memory of one row alone.
    for row, lens in enumerate(batch["seq_lens"]):
        levels = patches[row].astype(np.float32)
        ends = np.cumsum(lens)
        for segment in np.flatnonzero(lens if "colours" in batch else 0 * lens):
            pixels = levels[ends[segment] - lens[segment] : ends[segment]].reshape(-1, 3)
            if "solarize" in batch:
                light = pixels >= batch["solarize"][row, segment]
                pixels[light] = 255 - pixels[light]
            matrix = batch["colours"][row, segment]
            pixels[:] = np.clip(pixels @ matrix[:, :3].T + matrix[:, 3], 0, 255)
        if "mix_offset" in batch:
            meeting = np.flatnonzero(batch["mix_offset"][row])
            others = levels[meeting + batch["mix_offset"][row, meeting]]
            own = batch["segment_ids"][row, meeting] - 1
            weight = batch["mix_weight"][row, own][:, None]
            levels[meeting] = weight * levels[meeting] + (1 - weight) * others
        out[row] = np.rint(levels)
    out[batch["coords"][..., 0] < 0] = 0  # prefix tokens have no pixels
    return out
