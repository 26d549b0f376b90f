"""Decides the patch grid that an image is resized to, from its size and perhaps a draw.

Seven laws. A grid covers the image at some scale s; all laws but `Square` keep the aspect ratio
as far as whole patches allow:

* ``"native"``: the image's own size, each axis rounded to the nearest whole number of patches
  (half to even, at least one).
* `Side`, `Area`: the scale at which the image has r² pixels, with r or r² drawn; each axis is
  rounded to whole patches, to the nearest unless told otherwise.
* ``"budget"``, `Budget`: an axis covers max(1, ⌈side·s/P⌉) patches; the largest s whose grid
  stays within max_tokens (or within the budget drawn) is taken; small images are enlarged too.
* `Square`: every image becomes a square of r pixels a side, r drawn, rounded to whole patches.
* `PixelRange`: the image's own size, or the nearest one within a range of pixels, in whole blocks
  of patches. It draws nothing.

An image above the token limit is shrunk by the budget law, and so is one that would keep more than
seq_len tokens after dropping (`decisions`). A shrunk square stays a square (`shape_hw`), and blocks
of patches stay whole (`shrunk_grids`).

The largest s is found exactly, in integers. The official NaFlex search bisects s in [1e-6, 100] to
1e-5, so it can stop one step too early, and never enlarges by more than 100.

Source: NaViT 2.2, 3.2; SigLIP2 (NaFlex); Qwen2-VL (arXiv 2409.12191), 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from packpipe import checks
from packpipe.planning.distributions import Distribution, distribution

LAWS = ("native", "budget")
_ROUNDINGS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "nearest": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
}
_MAX_AXIS = 2.0**31  # patches, so that rows · columns fits in int64
_MAX_PIXELS = 2.0**62  # a side


@dataclass(frozen=True)
class Side:
    """Resize to r² pixels, r drawn: NaViT's effective resolution.

    Attributes:
        pixels: distribution of r in pixels; a number is a constant, a list a choice.
        rounding: of each axis to whole patches: ``"nearest"``, ``"floor"`` or ``"ceil"``.
    """

    pixels: Distribution | float
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _freeze(self, "pixels")
        checks.choice("rounding", self.rounding, _ROUNDINGS, "choose how axes become patches")


@dataclass(frozen=True)
class Area:
    """Resize to r² pixels, r² drawn.

    Attributes:
        pixels: distribution of r² in pixels; a number is a constant, a list a choice.
        rounding: of each axis to whole patches: ``"nearest"``, ``"floor"`` or ``"ceil"``.
    """

    pixels: Distribution | float
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _freeze(self, "pixels")
        checks.choice("rounding", self.rounding, _ROUNDINGS, "choose how axes become patches")


@dataclass(frozen=True)
class Budget:
    """Resize to the largest grid within a token budget, the budget drawn (NaFlex).

    Attributes:
        tokens: distribution of the budget, rounded down; a number is a constant, a list a choice,
            for example ``Budget([128, 256, 576])``.
    """

    tokens: Distribution | float

    def __post_init__(self) -> None:
        _freeze(self, "tokens")


@dataclass(frozen=True)
class Square:
    """Resize to a square of r pixels a side, r drawn; the aspect ratio is not kept.

    The input of a plain ViT: with ``seq_len=196, max_segments=1, resolution=Square(224)`` every row
    is one image without padding.

    Attributes:
        pixels: distribution of r in pixels; a number is a constant, a list a choice.
        rounding: of r to whole patches: ``"nearest"``, ``"floor"`` or ``"ceil"``.
    """

    pixels: Distribution | float
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _freeze(self, "pixels")
        checks.choice("rounding", self.rounding, _ROUNDINGS, "choose how axes become patches")


@dataclass(frozen=True)
class PixelRange:
    """Keep the own size of images within a range of pixels, in whole blocks of patches.

    The rule of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose models merge each block of patches into one
    token: sides are rounded to the nearest block, half to even; above max_pixels they are shrunk at
    one scale and rounded down, to one block at least, below min_pixels enlarged and rounded up. An
    image more than 200 times as long as wide is sized like the others; their processor refuses it.

    Attributes:
        min_pixels: fewest pixels of an image, 1 or more.
        max_pixels: most pixels of an image, min_pixels or more; only very long images have more, of
            which a side is one block, or those of a range narrower than a block. The usual ones are
            Qwen2-VL's.
        grid_multiple: patches a side of a block: rows and columns of grids are multiples of it.

    Source: the image processor of Qwen2-VL, ``smart_resize``.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    grid_multiple: int = 2

    def __post_init__(self) -> None:
        limits = (
            ("min_pixels", 1, 2**31 - 1, "56 · 56 is usual"),
            ("max_pixels", self.min_pixels, 2**31 - 1, "no less than min_pixels"),
            ("grid_multiple", 1, 128, "2 is usual"),
        )
        for name, low, high, remedy in limits:
            number = checks.whole_number(name, getattr(self, name), low, high, remedy)
            object.__setattr__(self, name, number)


Resolution: TypeAlias = str | Side | Area | Budget | Square | PixelRange


def checked(value: Any) -> Resolution:
    """Return value if it is a resolution law; the error names all laws."""
    if isinstance(value, Side | Area | Budget | Square | PixelRange):
        return value
    remedy = "or pass Side(...), Area(...), Budget(...), Square(...) or PixelRange(...)"
    return checks.choice("resolution", value, LAWS, remedy)


def is_drawn(law: Resolution) -> bool:
    """Return whether the size of an image by a law depends on a draw."""
    return not isinstance(law, str | PixelRange)


def grid_multiple(law: Resolution) -> int:
    """Return what rows and columns of all grids of a law are multiples of."""
    return law.grid_multiple if isinstance(law, PixelRange) else 1


def shape_hw(law: Resolution, image_hw: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return int[images, 2], (height, width) in the ratio a law keeps: the images' own, or 1:1."""
    return np.ones_like(image_hw) if isinstance(law, Square) else image_hw


@njit(cache=True, nogil=True)
def _largest_side(side, other, max_tokens):  # type: ignore[no-untyped-def]
    """Return the largest k with k * ceil(other * k / side) <= max_tokens, or 0.

    k² * other / side <= max_tokens bounds k from above; from there k goes down, one at a time.
    """
    # + 1, since the root is computed in floats. All products are integers below 2**63: sides are
    # below 2**31, and k and max_tokens at most 2**15.
    k = min(max_tokens, int(math.sqrt(max_tokens * side / other)) + 1)
    while k and k * -(-other * k // side) > max_tokens:
        k -= 1
    return k


@njit(cache=True, nogil=True)
def _budget_grids(image_hw, max_tokens, out):  # type: ignore[no-untyped-def]
    """Fill out with the grid of every image at the largest scale within its max_tokens.

    The largest scale is one at which an axis has exactly k patches, that is k·P/side. The larger of
    the two axes' largest scales is taken, and the other axis then has ⌈other·k/side⌉ patches.
    """
    for i in range(image_hw.shape[0]):
        height, width = image_hw[i, 0], image_hw[i, 1]
        rows = _largest_side(height, width, max_tokens[i])
        columns = _largest_side(width, height, max_tokens[i])
        # rows / height >= columns / width, multiplied out so that the comparison is exact.
        if rows * width >= columns * height:
            out[i, 0], out[i, 1] = rows, -(-width * rows // height)
        else:
            out[i, 0], out[i, 1] = -(-height * columns // width), columns


def budget_grids(
    image_hw: NDArray[np.integer],
    max_tokens: NDArray[np.integer],
    *,
    patch_size: int = 1,
    max_upscale: float | None = None,
) -> NDArray[np.int64]:
    """Return int64[images, 2], the largest grids within a budget.

    Args:
        image_hw: int[images, 2], (height, width) in pixels.
        max_tokens: int[images], the budgets, each 1..2**15.
        patch_size: side of a patch in pixels; used with max_upscale only.
        max_upscale: most that sides are enlarged by; None for no limit.

    >>> budget_grids(np.array([[1080, 1920], [3, 39]]), np.array([256, 256])).tolist()
    [[12, 21], [4, 52]]
    """
    grids = np.empty((len(image_hw), 2), np.int64)
    _budget_grids(
        np.ascontiguousarray(image_hw, np.int64), np.ascontiguousarray(max_tokens, np.int64), grids
    )
    if max_upscale is not None:
        # A little less, so that 800 · 1.1 ÷ 16 is 55 whatever the last bit of 1.1 is.
        largest = _rounded(image_hw, max_upscale * (1 - 1e-12), patch_size, "ceil")
        # Where the largest size allowed is within the budget, it is the answer: a larger grid would
        # enlarge the image too much.
        limited = largest[:, 0] * largest[:, 1] <= max_tokens
        grids[limited] = largest[limited]
    return grids


def shrunk_grids(
    law: Resolution, image_hw: NDArray[np.integer], max_tokens: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return int64[images, 2], the largest grids within limits that a law allows.

    Args:
        law: how images are sized.
        image_hw: int[images, 2], (height, width) in pixels.
        max_tokens: int[images], the limits, each a block of the law or more, and below 2**15.

    >>> shrunk_grids(PixelRange(), np.array([[300, 400]]), np.array([50])).tolist()
    [[6, 8]]
    """
    multiple = grid_multiple(law)
    return multiple * budget_grids(shape_hw(law, image_hw), max_tokens // multiple**2)


def patch_grids(
    law: Resolution,
    image_hw: NDArray[np.integer],
    patch_size: int,
    max_tokens: int,
    *,
    u: NDArray[np.float64] | None = None,
    max_upscale: float | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """Return the patch grids of images, and the values drawn for them.

    Args:
        law: how images are sized.
        image_hw: int[images, 2], upright (height, width) in pixels, 1 or more.
        patch_size: side of a patch in pixels.
        max_tokens: most tokens of a grid by the budget laws, below 2**15.
        u: float64[images], uniform in [0, 1); for laws that draw.
        max_upscale: most an image's sides may be enlarged by, before rounding to patches;
            None for no limit. With `Square` and `PixelRange` it must be None.

    Returns:
        int64[images, 2], (rows, columns), each 1..2**31 (only the budget laws keep to max_tokens);
        and float64[images], the side, area or budget drawn, or None.

    >>> hw = np.array([[300, 400], [30, 40]])
    >>> patch_grids(Side(160), hw, 16, 1024, u=np.zeros(2), max_upscale=1)[0].tolist()
    [[9, 12], [2, 2]]
    >>> patch_grids(Square(160), hw, 16, 1024, u=np.zeros(2))[0].tolist()
    [[10, 10], [10, 10]]
    """
    if law == "native":
        # "native" never enlarges; a max_upscale below 1 makes every image smaller.
        scale = 1.0 if max_upscale is None else min(1.0, max_upscale)
        return _rounded(image_hw, scale, patch_size, "nearest"), None
    if isinstance(law, PixelRange):
        return _ranged(law, image_hw, patch_size), None
    if isinstance(law, Side | Area | Square):
        assert u is not None  # noqa: S101
        pixels = distribution("pixels", law.pixels).quantile(u)
        # No grid is that large, and a square beyond float64 would be infinite.
        power = 1 if isinstance(law, Area) else 2
        areas = np.minimum(pixels, _MAX_PIXELS ** (2 / power)) ** power
        shape = shape_hw(law, image_hw)
        # One root of one quotient, so that a whole number of pixels comes out exactly.
        sides = np.sqrt(areas[:, None] * shape / shape[:, ::-1])
        if max_upscale is not None:
            sides = np.minimum(sides, image_hw * max_upscale)
        return _rounded(sides, 1.0, patch_size, law.rounding), pixels
    budgets, drawn = np.full(len(image_hw), max_tokens), None
    if isinstance(law, Budget):
        assert u is not None  # noqa: S101
        drawn = distribution("tokens", law.tokens).quantile(u)
        # Clipped first: a number beyond int64 would become a negative one.
        budgets = np.clip(np.floor(drawn), 1, max_tokens).astype(np.int64)
    return budget_grids(image_hw, budgets, patch_size=patch_size, max_upscale=max_upscale), drawn


def _ranged(law: PixelRange, image_hw: NDArray[np.integer], patch_size: int) -> NDArray[np.int64]:
    """Return the patch grids of images within a range of pixels."""
    # Every operation in the order of ``smart_resize``, in float64, so that each rounds as there.
    block = law.grid_multiple * patch_size
    sides = image_hw.astype(np.int64)
    blocks = np.rint(sides / block).astype(np.int64)  # a small side may have none
    pixels, own = blocks.prod(1) * block**2, sides.prod(1)
    large, small = pixels > law.max_pixels, pixels < law.min_pixels
    shrink = np.sqrt(own[large] / law.max_pixels)[:, None]
    blocks[large] = np.maximum(1, np.floor(sides[large] / shrink / block))
    enlarge = np.sqrt(law.min_pixels / own[small])[:, None]
    blocks[small] = np.ceil(sides[small] * enlarge / block)
    return law.grid_multiple * blocks


def _rounded(
    sides: NDArray[np.integer | np.floating], scale: float, patch_size: int, rounding: str
) -> NDArray[np.int64]:
    """Return the patch grids of images with these sides, scaled; at least one patch an axis."""
    axes = _ROUNDINGS[rounding](sides * scale / patch_size)
    return np.clip(axes, 1, _MAX_AXIS, out=axes).astype(np.int64)


def _freeze(law: Side | Area | Budget | Square, name: str) -> None:
    """Make the attribute of a law a distribution of positive numbers."""
    value = getattr(law, name)
    found = distribution(name, value)
    if found.support[0] <= 0:
        remedy = "an image has at least one"
        raise ValueError(checks.sentence(name, value, "numbers above 0", remedy))
    object.__setattr__(law, name, found)
