"""Orders: what a row takes of each image, and the pixels that obey.

A row is filled from its orders alone, here or in another process (`decoders`): the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from packpipe.images.decode import PixelRules, decode
from packpipe.images.opening import BadImage, ImageData
from packpipe.images.patches import patchify, side_of


class Failure(NamedTuple):
    """Why an image gave no tokens: the word rejects are counted by, and what was raised."""

    reason: str
    exception: str


class Order(NamedTuple):
    """What a row takes of one image.

    Attributes:
        example: row in the source.
        data: the image, why there is none, or what returns one of both: memory then holds no
            image before its turn.
        image_hw: upright source size in pixels, as planned.
        grid_hw: patches of the full grid.
        kept: int32[tokens], which patches in raster order; None for all of the grid.
    """

    example: int
    data: ImageData | Failure | Callable[[], ImageData | Failure]
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    kept: NDArray[np.int32] | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the row that it takes."""
        return self.grid_hw[0] * self.grid_hw[1] if self.kept is None else len(self.kept)

    def read(self) -> ImageData | Failure:
        """Return the image, or why there is none."""
        return self.data() if callable(self.data) else self.data


def fill_row(
    orders: Iterable[Order], out: NDArray[np.uint8], rules: PixelRules
) -> list[Failure | None]:
    """Write the tokens of some images one after the other, zeros behind; return what failed.

    An image that fails takes no place: the next one stands where it would have stood.

    Args:
        orders: what to take, in the order of the row.
        out: uint8[seq_len, P·P·3], every byte of which is written.
        rules: how pixels are made.

    Returns:
        One value an order: None if its tokens are written.

    Raises:
        ValueError: an image's size is not the planned one; names the example and both sizes.
    """
    patch_size = side_of(out.shape[1])
    outcomes: list[Failure | None] = []
    end = 0
    for order in orders:
        data = order.read()
        if isinstance(data, Failure):
            outcomes.append(data)
            continue
        rows, columns = order.grid_hw
        try:
            pixels = decode(
                data,
                image_hw=order.image_hw,
                target_hw=(rows * patch_size, columns * patch_size),
                rules=rules,
            )
        except BadImage as error:
            outcomes.append(Failure(error.reason, error.exception))
            continue
        except ValueError as error:
            raise ValueError(f"example {order.example}: {error}") from error
        start, end = end, end + order.num_tokens
        patchify(pixels, out[start:end], order.kept)
        outcomes.append(None)
    out[end:] = 0
    return outcomes
