"""Resolution: the patch grid an image is resized to, from its size alone.

Six laws. A grid covers the image at some scale s, the aspect ratio kept as far as whole patches
allow, but for the last:

* ``"native"``: the own size, each axis rounded to the nearest whole number of patches (half
  to even, one at least).
* `Side`, `Area`: the scale at which the image has r² pixels, r or r² drawn, rounded likewise.
* ``"budget"``, `Budget`: an axis covers max(1, ⌈side·s/P⌉) patches; the largest s whose grid
  stays within max_tokens (or within the budget drawn) is taken, enlarging small images too.
* `Square`: every image becomes a square of r pixels a side, r drawn, rounded as for `Side`.

An image that ends over the limit is shrunk by the budget law, and so is one that, once dropped,
would keep more than seq_len tokens (`decisions`). It keeps its shape, or a square its own
(`shape_hw`).

The largest s is found exactly, in integers: the official search bisects s in [1e-6, 100] to
1e-5 and so can stop one step short of it, and never enlarges more than a hundredfold.

Source: NaViT 2.2, 3.2; SigLIP2 (NaFlex).
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
_MAX_AXIS = 2.0**31  # patches; so that rows · columns is an int64


@dataclass(frozen=True)
class Side:
    """Resize to r² pixels, r drawn: NaViT's effective resolution.

    Attributes:
        pixels: of r, a distribution; a number is a constant, a list a choice.
        rounding: of each axis to whole patches, ``"nearest"``, ``"floor"`` or ``"ceil"``.
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
        pixels: of r², otherwise as for `Side`.
        rounding: as for `Side`.
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
        tokens: a distribution, rounded down; a list is a choice: ``Budget([128, 256, 576])``.
    """

    tokens: Distribution | float

    def __post_init__(self) -> None:
        _freeze(self, "tokens")


@dataclass(frozen=True)
class Square:
    """Resize to a square of r pixels a side, r drawn; the aspect ratio is not kept.

    What a plain ViT sees: with ``seq_len=196, max_segments=1, resolution=Square(224)`` every row
    is one image without padding.

    Attributes:
        pixels: of r, as for `Side`.
        rounding: of r to whole patches, as for `Side`.
    """

    pixels: Distribution | float
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _freeze(self, "pixels")
        checks.choice("rounding", self.rounding, _ROUNDINGS, "choose how axes become patches")


Resolution: TypeAlias = str | Side | Area | Budget | Square


def checked(value: Any) -> Resolution:
    """Return a resolution law, or say which there are."""
    if isinstance(value, Side | Area | Budget | Square):
        return value
    remedy = "or pass Side(...), Area(...), Budget(...) or Square(...)"
    return checks.choice("resolution", value, LAWS, remedy)


def shape_hw(law: Resolution, image_hw: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return int[images, 2], (height, width) in the ratio a law keeps: the images' own, or 1:1."""
    return np.ones_like(image_hw) if isinstance(law, Square) else image_hw


@njit(cache=True, nogil=True)
def _largest_side(side, other, max_tokens):  # type: ignore[no-untyped-def]
    """Return the largest k with k * ceil(other * k / side) <= max_tokens, or 0.

    k² * other / side <= max_tokens bounds k from above; from there down, one at a time.
    """
    k = min(max_tokens, int(math.sqrt(max_tokens * side / other)) + 1)
    while k and k * -(-other * k // side) > max_tokens:
        k -= 1
    return k


@njit(cache=True, nogil=True)
def _budget_grids(image_hw, max_tokens, out):  # type: ignore[no-untyped-def]
    """Fill out with the grid of every image at the largest scale within its max_tokens.

    The scale is limited where one axis has just reached k patches, that is at k·P/side: the
    larger of the two axes' limits is the answer, and there the other axis has ⌈other·k/side⌉.
    """
    for i in range(image_hw.shape[0]):
        height, width = image_hw[i, 0], image_hw[i, 1]
        rows = _largest_side(height, width, max_tokens[i])
        columns = _largest_side(width, height, max_tokens[i])
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
        patch_size: pixels a side of a patch; matters with max_upscale only.
        max_upscale: most that sides are enlarged by; None for any.

    >>> budget_grids(np.array([[1080, 1920], [3, 39]]), np.array([256, 256])).tolist()
    [[12, 21], [4, 52]]
    """
    grids = np.empty((len(image_hw), 2), np.int64)
    _budget_grids(
        np.ascontiguousarray(image_hw, np.int64), np.ascontiguousarray(max_tokens, np.int64), grids
    )
    if max_upscale is not None:
        # A little less, so that 800 · 1.1 ÷ 16 is 55, whatever the last bit of 1.1 is.
        largest = _rounded(image_hw, max_upscale * (1 - 1e-12), patch_size, "ceil")
        limited = largest[:, 0] * largest[:, 1] <= max_tokens
        grids[limited] = largest[limited]
    return grids


def patch_grids(
    law: Resolution,
    image_hw: NDArray[np.integer],
    patch_size: int,
    max_tokens: int,
    *,
    u: NDArray[np.float64] | None = None,
    max_upscale: float | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """Return the patch grids of images, and what was drawn for them.

    Args:
        law: how images are sized.
        image_hw: int[images, 2], upright (height, width) in pixels, 1 or more.
        patch_size: pixels a side of a patch.
        max_tokens: most patches a budget may have, below 2**15.
        u: float64[images], uniform in [0, 1); for laws that draw.
        max_upscale: most an image's sides may be enlarged by, but for the rounding to patches;
            None for any. A `Square` knows no scale, so None.

    Returns:
        int64[images, 2], (rows, columns), one at least, of up to 2**31 patches an axis: only
        budgets hold max_tokens; and float64[images], the side, area or budget drawn, or None.

    >>> hw = np.array([[300, 400], [30, 40]])
    >>> patch_grids(Side(160), hw, 16, 1024, u=np.zeros(2), max_upscale=1)[0].tolist()
    [[9, 12], [2, 2]]
    >>> patch_grids(Square(160), hw, 16, 1024, u=np.zeros(2))[0].tolist()
    [[10, 10], [10, 10]]
    """
    if law == "native":
        scale = 1.0 if max_upscale is None else min(1.0, max_upscale)
        return _rounded(image_hw, scale, patch_size, "nearest"), None
    if isinstance(law, Side | Area | Square):
        assert u is not None  # noqa: S101
        pixels = distribution("pixels", law.pixels).quantile(u)
        areas = pixels if isinstance(law, Area) else pixels * pixels
        shape = shape_hw(law, image_hw)
        # One root of one quotient, so that a whole number of pixels comes out as just that.
        sides = np.sqrt(areas[:, None] * shape / shape[:, ::-1])
        if max_upscale is not None:
            sides = np.minimum(sides, image_hw * max_upscale)
        return _rounded(sides, 1.0, patch_size, law.rounding), pixels
    budgets, drawn = np.full(len(image_hw), max_tokens), None
    if isinstance(law, Budget):
        assert u is not None  # noqa: S101
        drawn = distribution("tokens", law.tokens).quantile(u)
        budgets = np.clip(np.floor(drawn).astype(np.int64), 1, max_tokens)
    return budget_grids(image_hw, budgets, patch_size=patch_size, max_upscale=max_upscale), drawn


def _rounded(
    sides: NDArray[np.integer | np.floating], scale: float, patch_size: int, rounding: str
) -> NDArray[np.int64]:
    """Return the grids of images of such sides at a scale."""
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
