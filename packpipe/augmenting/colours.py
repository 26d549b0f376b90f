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
    shift = np.repeat((1 - draws.contrast) * _MIDDLE, 3).reshape(-1, 3, 1)
    return np.concatenate([mixed, shift], 2).astype(np.float32)


def inverted_from(draws: Draws) -> NDArray[np.float32]:
    """Return float32[n], the level from which on a picture's levels are inverted; 256 for none."""
    return np.where(draws.solarize, SOLARIZED, NEVER).astype(np.float32)


def coloured(batch: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the patches of a NumPy batch in their drawn colours, uint8[B, L, D], rounded.

    For batches of ``PackedLoader(..., as_numpy=True, augment=...)``; `PackedBatch.coloured` does
    the same to tensors, and `NaViT` by itself. On a device of your own, apply the matrices there:
    a picture's pixels are ``clip(colours[:, :3] @ pixel + colours[:, 3], 0, 255)``, of pixels of
    which levels from ``solarize`` on are 255 - level first.

    Args:
        batch: the columns of a `PackedBatch`; without ``colours`` its patches come back as they
            are.
    """
    patches: NDArray[np.uint8] = batch["patches"]
    if "colours" not in batch:
        return patches
    out = patches.copy()
    # Segment after segment, so that the floats take the memory of one image alone.
    for row, lens in enumerate(batch["seq_lens"]):
        ends = np.cumsum(lens)
        for segment in np.flatnonzero(lens):
            tokens = slice(ends[segment] - lens[segment], ends[segment])
            pixels = patches[row, tokens].reshape(-1, 3).astype(np.float32)
            if "solarize" in batch:
                light = pixels >= batch["solarize"][row, segment]
                pixels = np.where(light, 255 - pixels, pixels)
            matrix = batch["colours"][row, segment]
            levels = np.clip(pixels @ matrix[:, :3].T + matrix[:, 3], 0, 255)
            out[row, tokens] = np.rint(levels).reshape(-1, patches.shape[-1])
    return out
