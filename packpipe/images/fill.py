"""Writes the tokens of a row, image by image, each as its `ImageTask` says.

A row depends on its tasks only, so this process and a worker process (`pool`) write the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from packpipe.images.bad_images import BadImage, SizeChanged
from packpipe.images.decode import decode
from packpipe.images.image_data import ImageData
from packpipe.images.masks import TargetRules, decode_mask, write_targets
from packpipe.images.patches import patchify, side_of
from packpipe.images.rules import PixelRules


class Failure(NamedTuple):
    """Why an image gave no tokens: the word by which rejects are counted, and the exception."""

    reason: str
    exception: str


# What came of an image of a row: None if its tokens are written; a word, if they are and something
# is amiss all the same, by which such images are counted; a `Failure` if they are not.
Outcome: TypeAlias = "Failure | str | None"


class ImageTask(NamedTuple):
    """One image of a row, and which of its patches the row takes.

    Attributes:
        example: row in the source.
        data: the image, a `Failure` that says why there is none, or a function that returns either;
            a function is called when the image is decoded, so that memory does not hold all images.
        image_hw: upright source size in pixels, as planned.
        grid_hw: (rows, columns) of patches of the full grid.
        kept: int32[tokens], which patches in raster order; None for all of the grid. Numbers below
            0, which come first, are prefix tokens: slots without a patch.
        box: (top, left, height, width) in pixels of the upright image; None for all of it.
        view: which of its example's views it is.
        mask: its class of every pixel, as data is; None without targets.
    """

    example: int
    data: ImageData | Failure | Callable[[], ImageData | Failure]
    image_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    kept: NDArray[np.int32] | None
    box: tuple[int, int, int, int] | None = None
    view: int = 0
    mask: ImageData | Failure | Callable[[], ImageData | Failure] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the image takes in its row."""
        return self.grid_hw[0] * self.grid_hw[1] if self.kept is None else len(self.kept)

    def parted(self) -> tuple[int, NDArray[np.int32] | None]:
        """Return how many prefix tokens there are, and which patches; None for all of the grid."""
        if self.kept is None:
            return 0, None
        slots = int(np.count_nonzero(self.kept < 0))
        patches = self.kept[slots:]
        return slots, None if len(patches) == self.grid_hw[0] * self.grid_hw[1] else patches

    def read(self) -> ImageData | Failure:
        """Return the image, or the `Failure` that says why there is none."""
        return self.data() if callable(self.data) else self.data


def fill_row(
    images: Iterable[ImageTask],
    out: NDArray[np.uint8],
    rules: PixelRules,
    transform: Callable[[NDArray[np.uint8], int, int], NDArray[np.uint8]] | None = None,
    targets: NDArray[np.integer] | None = None,
    target_rules: TargetRules | None = None,
) -> list[Outcome]:
    """Write the tokens of some images one after the other, then zeros; return what came of each.

    An image that fails takes no place: the next image is written where it would have been.

    Args:
        images: the images of the row, in its order.
        out: uint8[seq_len, P·P·3], every byte of which is written.
        rules: how pixels are made.
        transform: makes other pixels of those of an image, its example and view; what it raises
            is raised.
        targets: uint8 or uint16[seq_len, T], every number of which is written from the masks of the
            images; None without targets.
        target_rules: how masks become targets.

    Returns:
        One outcome for each image.

    Raises:
        SizeChanged: an image's size is not the planned one; the message names the example.
    """
    patch_size = side_of(out.shape[1])
    outcomes: list[Outcome] = []
    end = 0
    for image in images:
        # Read only now: images of earlier tasks are no longer in memory.
        data = image.read()
        if isinstance(data, Failure):
            outcomes.append(data)
            continue
        rows, columns = image.grid_hw
        slots, kept = image.parted()
        tiles = None
        if transform is None and kept is None:  # its pixels are the row's, in one pass
            tokens = out[end + slots : end + image.num_tokens]
            tiles = tokens.reshape(rows, columns, patch_size, patch_size, 3)
        try:
            found = decode(
                data,
                image_hw=image.image_hw,
                target_hw=(rows * patch_size, columns * patch_size),
                rules=rules,
                box=image.box,
                tiles=tiles,
            )
            cells = None if target_rules is None else _cells(image, target_rules, rules, patch_size)
        except BadImage as error:  # first, since a BadImage is a ValueError, too
            outcomes.append(Failure(error.reason, error.exception))
            continue
        except ValueError as error:
            kind = SizeChanged if isinstance(error, SizeChanged) else ValueError
            raise kind(f"example {image.example}: {error}") from error
        if isinstance(cells, Failure):
            outcomes.append(cells)
            continue
        start, end = end + slots, end + image.num_tokens
        out[start - slots : start] = 0
        if targets is not None:
            targets[start - slots : start] = np.iinfo(targets.dtype).max
        if tiles is None:
            pixels = found.pixels
            if transform is not None:
                pixels = transform(pixels, image.example, image.view)
            patchify(pixels, out[start:end], kept)
        if targets is not None and cells is not None:
            write_targets(cells, targets[start:end], image.grid_hw, kept)
        outcomes.append(found.flag)
    # Rows are used again, so what another row left behind must go.
    out[end:] = 0
    if targets is not None:
        targets[end:] = np.iinfo(targets.dtype).max
    return outcomes


def _cells(
    image: ImageTask, target_rules: TargetRules, rules: PixelRules, patch_size: int
) -> NDArray[np.integer] | Failure:
    """Return the class of every cell of an image, or why its mask cannot be read.

    Raises:
        BadImage: its mask cannot be decoded, or there is none.
    """
    mask = image.mask() if callable(image.mask) else image.mask
    if isinstance(mask, Failure):
        return mask
    if mask is None:
        raise BadImage("mask missing", "the image has no mask")
    (rows, columns), side = image.grid_hw, patch_size // target_rules.stride
    return decode_mask(
        mask,
        image_hw=image.image_hw,
        target_hw=(rows * side, columns * side),
        rules=target_rules,
        max_pixels=rules.max_pixels,
        box=image.box,
    )
