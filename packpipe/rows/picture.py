"""Draws packed rows: their tokens as pixels, in the order of the row.

Each segment is tinted and edged in a colour of its own; padding is hatched.
"""

from __future__ import annotations

import colorsys
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from packpipe.images.patches import unpatchify

TOKENS_A_LINE = 64
_MOST_ROWS, _GAP = 8, 6
_TINT, _EDGE = 0.2, 2  # the colour's share within a segment; pixels of it along its outline


def colours(num_segments: int) -> NDArray[np.float64]:
    """Return float[segments, 3], RGB in 0..1; neighbours differ, however many there are."""
    # Steps of the golden ratio: neighbouring hues lie far apart, and no hue comes twice.
    hues = [(number * 0.61803398875) % 1.0 for number in range(num_segments)]
    found = np.array([colorsys.hsv_to_rgb(hue, 0.85, 0.85) for hue in hues])
    return found.reshape(num_segments, 3)


def row_picture(patches: NDArray[np.uint8], segment_ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return uint8[H, W, 3]: a row's tokens in reading order, 64 a line.

    Args:
        patches: uint8[seq_len, patch bytes], of one row.
        segment_ids: int32[seq_len], 0 in padding.
    """
    lines = -(-len(patches) // TOKENS_A_LINE)
    size = lines * TOKENS_A_LINE
    tokens = np.zeros((size, patches.shape[1]), np.uint8)
    tokens[: len(patches)] = patches
    ids = np.full(size, -1, np.int32)  # slots that the row does not have
    ids[: len(patches)] = segment_ids
    coords = np.stack(np.divmod(np.arange(size), TOKENS_A_LINE), axis=1)
    picture = unpatchify(tokens, coords, (lines, TOKENS_A_LINE)).astype(np.float64) / 255
    side = picture.shape[0] // lines

    def by_pixel(of_tokens: NDArray[Any]) -> NDArray[Any]:
        grid = of_tokens.reshape(lines, TOKENS_A_LINE, *of_tokens.shape[1:])
        return grid.repeat(side, axis=0).repeat(side, axis=1)

    # ids - 1 is -1 in padding and -2 in missing slots, which index the two whites at the end.
    tint = np.concatenate([colours(int(ids.max(initial=0))), [(1.0, 1.0, 1.0)] * 2])
    number = by_pixel(ids)
    share = np.where(_outline(number), 1.0, _TINT)[..., None]
    picture = (1 - share) * picture + share * by_pixel(tint[ids - 1])
    y, x = np.indices(picture.shape[:2])
    hatched = np.where((x + y) % 8 < 2, 0.6, 1.0)[..., None]
    held = number[..., None]
    picture = np.where(held > 0, picture, np.where(held == 0, hatched, 1.0))
    drawn: NDArray[np.uint8] = np.rint(picture * 255).astype(np.uint8)
    return drawn


def _outline(number: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which pixels have one of another segment, or the picture's end, _EDGE beside them."""
    height, width = number.shape
    around = np.pad(number, _EDGE, constant_values=-2)
    found = np.zeros(number.shape, bool)
    for down, right in ((0, _EDGE), (2 * _EDGE, _EDGE), (_EDGE, 0), (_EDGE, 2 * _EDGE)):
        found |= around[down : down + height, right : right + width] != number
    return found


def png(patches: NDArray[np.uint8], segment_ids: NDArray[np.int32]) -> bytes:
    """Return a PNG of some rows, the first eight of them, one below the other.

    Args:
        patches: uint8[rows, seq_len, patch bytes].
        segment_ids: int32[rows, seq_len].
    """
    shown = zip(patches[:_MOST_ROWS], segment_ids[:_MOST_ROWS], strict=True)
    drawn = [row_picture(tokens, ids) for tokens, ids in shown]
    apart = [np.pad(one, ((0, _GAP), (0, 0), (0, 0)), constant_values=255) for one in drawn]
    whole = np.concatenate(apart) if apart else np.full((1, 1, 3), 255, np.uint8)
    out = io.BytesIO()
    Image.fromarray(whole).save(out, "PNG")
    return out.getvalue()
