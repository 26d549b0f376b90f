"""Class maps of images: the class of every pixel, cut, resized and divided as the image is.

A mask is an image of one channel, whose levels are classes: gray of 2, 4, 8 or 16 bits, the numbers
of a palette, or black and white as 0 and 1. No rule of colours applies, and nothing is blended.

A target is a class for a cell of stride x stride pixels of the planned image. Cell (i, j) of H x W
cells takes the mask's pixel at its centre: row top + ⌊(2i + 1) · height ÷ 2H⌋ and column
left + ⌊(2j + 1) · width ÷ 2W⌋ of the upright mask, by the box (top, left, height, width) that the
image is cropped to, or by all of it. At its own size a pixel is taken for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from packpipe import checks
from packpipe.images.bad_images import BadImage, rejecting_giants, reraise_faults
from packpipe.images.headers import upright_hw
from packpipe.images.image_data import ImageData
from packpipe.images.opening import opened
from packpipe.images.orientation import TRANSPOSE, orientation_of

_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
_LOSSY = ("JPEG", "MPO", "JPEG2000")
# How far apart Pillow lays the levels of gray of few bits, by what it says of them.
_STEPS = {"L;2": 85, "L;4": 17}


class TargetRules(NamedTuple):
    """How masks become targets.

    Attributes:
        stride: pixels a side of a cell.
        dtype: ``"uint8"`` or ``"uint16"``, of the targets.
    """

    stride: int
    dtype: str = "uint8"

    @property
    def ignore(self) -> int:
        """The class that no loss counts, 255 or 65535: that of padding, too."""
        return int(np.iinfo(self.dtype).max)

    def cells(self, patch_size: int) -> int:
        """Return how many targets a patch has."""
        return (patch_size // self.stride) ** 2


def checked_rules(stride: int | None, patch_size: int, dtype: str) -> TargetRules:
    """Return the rules of a stride; None is one target a patch.

    Raises:
        TypeError, ValueError: a patch cannot be divided by it.
    """
    remedy = "1 gives a target for each pixel"
    stride = patch_size if stride is None else stride
    stride = checks.whole_number("target_stride", stride, 1, patch_size, remedy)
    if patch_size % stride:
        expected = f"a divisor of {patch_size} (patch_size)"
        raise ValueError(checks.sentence("target_stride", stride, expected, remedy))
    return TargetRules(stride, dtype)


@rejecting_giants()
def decode_mask(
    data: ImageData,
    *,
    image_hw: tuple[int, int],
    target_hw: tuple[int, int],
    rules: TargetRules,
    max_pixels: int,
    box: tuple[int, int, int, int] | None = None,
) -> NDArray[np.integer]:
    """Return uint8 or uint16[height, width], the class of every cell of an image.

    Args:
        data: bytes, path or values of the mask.
        image_hw: upright size of its image in pixels, which must be its own.
        target_hw: (height, width) of the result in cells.
        rules: stride and dtype.
        max_pixels: a larger mask is refused.
        box: (top, left, height, width) in pixels that the image is cropped to; None for all.

    Raises:
        BadImage: the mask cannot be decoded, is of another size, has colours or classes above the
            largest; its reason begins with "mask".
    """
    try:
        values = _upright(data, max_pixels)
    except BadImage as error:
        raise BadImage(f"mask {error.reason}", f"mask: {error}") from error
    if values.shape != image_hw:
        found = "x".join(map(str, values.shape))
        what = f"the mask is {found}, expected {image_hw[0]}x{image_hw[1]} as its image"
        raise BadImage("mask size", what)
    cells = values[sampled(target_hw, box or (0, 0, *image_hw))]
    most = np.iinfo(rules.dtype).max
    wrong = cells[(cells < 0) | (cells > most)]
    if len(wrong):
        what = f"the mask has class {wrong[0]}, expected 0..{most}"
        if most == 255:
            what += "; cast_column the masks to Image(mode='I;16')"
        raise BadImage("mask class", what)
    return cells.astype(rules.dtype)


def sampled(
    target_hw: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and columns that cells are taken from: int64[height, 1], int64[1, width].

    >>> [index.ravel().tolist() for index in sampled((2, 3), (10, 0, 4, 2))]
    [[11, 13], [0, 1, 1]]
    """
    found = []
    for axis, (count, start, size) in enumerate(zip(target_hw, box[:2], box[2:], strict=True)):
        centres = start + (2 * np.arange(count, dtype=np.int64) + 1) * size // (2 * count)
        found.append(np.expand_dims(centres, 1 - axis))
    return found[0], found[1]


def write_targets(
    cells: NDArray[np.integer],
    out: NDArray[np.integer],
    grid_hw: tuple[int, int],
    kept: NDArray[np.integer] | None = None,
) -> None:
    """Write the cells of each token, all or some, into out.

    Args:
        cells: uint8 or uint16[rows·n, columns·n].
        out: [tokens, n·n], written: inside a token by row and column.
        grid_hw: (rows, columns) of patches.
        kept: int[tokens], which patches in raster order; None for all.
    """
    (rows, columns), side = grid_hw, cells.shape[0] // grid_hw[0]
    by_token = cells.reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
    tokens = by_token.reshape(rows * columns, side * side)
    out[...] = tokens if kept is None else tokens[kept]


def cells_of(
    targets: NDArray[np.integer],
    coords: NDArray[np.integer],
    grid_hw: tuple[int, int],
    *,
    ignore: int,
) -> NDArray[np.integer]:
    """Return [rows·n, columns·n]: the cells of every token at its place, ignore elsewhere.

    Args:
        targets: [tokens, n·n], in any order.
        coords: int[tokens, 2], each token's (y, x) in the patch grid.
        grid_hw: (rows, columns) of the full grid.
        ignore: what stands where a token was dropped.
    """
    (rows, columns), side = grid_hw, round(targets.shape[1] ** 0.5)
    grid = np.full((rows, side, columns, side), ignore, targets.dtype)
    real = coords[:, 0] >= 0  # prefix tokens have no place
    tokens = targets[real].reshape(-1, side, side)
    grid.transpose(0, 2, 1, 3)[tuple(coords[real].T)] = tokens
    return grid.reshape(rows * side, columns * side)


def _upright(data: ImageData, max_pixels: int) -> NDArray[np.integer]:
    """Return [height, width], the classes of a mask."""
    if isinstance(data, np.ndarray):
        if data.ndim != 2:
            raise BadImage("colours", f"an array {list(data.shape)}, expected [height, width]")
        return data.astype(np.uint8) if data.dtype == np.bool_ else data
    with opened(data, max_pixels) as image:
        if image.mode not in _MODES or image.format in _LOSSY:
            found = f"{image.format} of mode {image.mode}"
            raise BadImage("colours", f"{found}, expected PNG of one channel, or a palette")
        orientation, _ = orientation_of(image)
        size, step = image.size, _step(image)
        try:
            image.load()
        except Exception as error:  # decoders raise whatever they like
            reraise_faults(error)
            raise BadImage("undecodable", str(error)) from error
        values = np.asarray(image) // step if step > 1 else np.asarray(image)
        if image.size != size:
            raise BadImage(
                "undecodable", f"{image.size} pixels, expected {size} as the header says"
            )
        if orientation in TRANSPOSE:
            values = _turned(values, orientation)
        assert values.shape == upright_hw(*size, orientation)  # noqa: S101 (of `_turned`)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _step(image: Image.Image) -> int:
    """Return what 1 in the file is in Pillow's levels of an image that is not loaded yet.

    Raises:
        BadImage: Pillow turns levels about, or stretches them to another largest one.
    """
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("L", "I"):
        return 1
    codec, args = tiles[0].codec_name, tiles[0].args
    raw = args if isinstance(args, str) else str(args[0])
    if raw.startswith("L;") and "I" in raw:
        raise BadImage("levels", f"{image.format} in which 0 is white, expected 0 as black")
    if codec.startswith("ppm") and args[1] not in (255, 65535):  # binary or plain
        expected = "expected a largest level of 255 or 65535"
        raise BadImage("levels", f"{image.format} of levels up to {args[1]}, {expected}")
    return _STEPS.get(raw[:3], 1)


def _turned(values: NDArray[np.integer], orientation: int) -> NDArray[np.integer]:
    """Return values turned upright, as Pillow's transpositions turn pixels."""
    numbers = np.arange(values.size, dtype=np.int32).reshape(values.shape)
    turned = np.asarray(Image.fromarray(numbers).transpose(TRANSPOSE[orientation]))
    found: NDArray[np.integer] = values.ravel()[turned]
    return found
