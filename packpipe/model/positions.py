"""Position embeddings: where a patch lies in its own image.

Every kind is a function of a token's coordinates and its image's grid, never of where the token
stands in a row, so a token's position is the same in any pack. *Absolute* kinds take the patch
index p of an axis, *fractional* ones p ÷ (n - 1): 0 at the first of n patches, 1 at the last.

Shape letters: T tokens, C channels, E channels a head.

Source: NaViT 2.1, 3.4, Fig 16.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTORISED = tuple(
    f"factorised_{coordinates}_{combination}"
    for coordinates in ("absolute", "fractional")
    for combination in ("sum", "stack", "product")
)
POSITIONS = (
    *FACTORISED,
    "fourier_absolute",
    "fourier_fractional",
    "sinusoidal_absolute",
    "sinusoidal_fractional",
    "learned_1d",
    "learned_2d",
    "learned_2d_fractional",
    "resized",
    "rotary",
    "rotary_fractional",
    "none",
)
ROTARY = ("rotary", "rotary_fractional")
# Places on each axis of a table if max_side is None; _SIDE for the other kinds.
_SIDES = {"factorised_absolute": 1024, "learned_2d": 64, "learned_1d": 16, "resized": 16}
_SIDE = 64
RESIZES = ("bilinear", "bicubic")
# Not the 10,000 of texts: an image has few patches a side (Heo et al., arXiv 2403.13298).
_ROTARY_BASE = 100.0
_SINUSOIDAL_BASE = 10_000.0


def default_side(position: str) -> int:
    """Return how many places the table of a kind of position has on each axis by default."""
    return _SIDES.get(position.rsplit("_", 1)[0] if position in FACTORISED else position, _SIDE)


def is_indexed(position: str) -> bool:
    """Return whether patch indices look up a table, so that no grid may be longer than it."""
    return position == "learned_2d" or position.startswith("factorised_absolute")


def position_embedding(position: str, dim: int, side: int, **resizing: Any) -> nn.Module | None:
    """Return the module that maps (coords, grid_hw, dtype), the first two int[T, 2], to [T, C].

    Args:
        position: one of `POSITIONS`; rotary ones and ``"none"`` add nothing and return None.
        dim: C.
        side: places on each axis of a table; see each kind.
        **resizing: of `Resized`, for ``"resized"``.
    """
    if position == "resized":
        return Resized(dim, side, **resizing)
    family, _, rest = position.partition("_")
    fractional = "fractional" in rest
    if family == "factorised":
        return Factorised(dim, side, fractional=fractional, combination=rest.split("_")[1])
    if family == "fourier":
        return Fourier(dim, side, fractional=fractional)
    if family == "sinusoidal":
        return Sinusoidal(dim, side, fractional=fractional)
    if position == "learned_1d":
        return Learned1d(dim, side)
    if family == "learned":
        return Learned2d(dim, side, fractional=fractional)
    return None


def fractions(coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [T, 2]: 0 at the first patch of an axis, 1 at its last; 0 on an axis of one patch.

    Args:
        coords: int[T, 2].
        grid_hw: int[T, 2], the grid of each token's image.
        dtype: of the model; the fractions are float32 at least.
    """
    return coords.to(_exact(dtype)) / (grid_hw - 1).clamp(min=1)


class Factorised(nn.Module):
    """A vector for the row and one for the column, summed, multiplied or stacked.

    With fractional coordinates the two nearest of a table's side places are interpolated.
    """

    def __init__(self, dim: int, side: int, *, fractional: bool, combination: str) -> None:
        super().__init__()
        width = dim // 2 if combination == "stack" else dim
        self.fractional = fractional
        self.combination = combination
        self.rows = nn.Parameter(_small(side, width))
        self.columns = nn.Parameter(_small(side, width))
        if combination == "product":  # around 1, since the product of two small ones is near 0
            nn.init.normal_(self.rows, 1.0, 0.02)

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        if self.fractional:
            places = fractions(coords, grid_hw, dtype) * (len(self.rows) - 1)
            y, x = _between(self.rows, places[:, 0]), _between(self.columns, places[:, 1])
        else:
            y, x = F.embedding(coords[:, 0], self.rows), F.embedding(coords[:, 1], self.columns)
        if self.combination == "sum":
            return y + x
        return y * x if self.combination == "product" else torch.cat([y, x], dim=-1)


class Learned1d(nn.Module):
    """ViT's table of side² places in raster order, interpolated along a grid's flat index."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(_small(side * side, dim))

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        flat = coords[:, 0] * grid_hw[:, 1] + coords[:, 1]  # [T], index in raster order
        last = (grid_hw[:, 0] * grid_hw[:, 1] - 1).clamp(min=1)
        exact = _exact(dtype)
        return _between(self.table, flat.to(exact) / last * (len(self.table) - 1))


class Learned2d(nn.Module):
    """A table of side × side places (Pix2Struct); fractional coordinates interpolate it."""

    def __init__(self, dim: int, side: int, *, fractional: bool) -> None:
        super().__init__()
        self.side = side
        self.fractional = fractional
        self.table = nn.Parameter(_small(side * side, dim))

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        if not self.fractional:
            return F.embedding(coords[:, 0] * self.side + coords[:, 1], self.table)
        # Bilinear. The far corner is interpolated from the place before it, with a share of 1.
        places = fractions(coords, grid_hw, dtype) * (self.side - 1)
        above = places.floor().clamp(max=max(self.side - 2, 0))
        below = (above + 1).clamp(max=self.side - 1)
        share = (places - above).to(self.table.dtype)
        out = torch.zeros((), dtype=self.table.dtype, device=self.table.device)
        for y, y_share in ((above[:, 0], 1 - share[:, 0]), (below[:, 0], share[:, 0])):
            for x, x_share in ((above[:, 1], 1 - share[:, 1]), (below[:, 1], share[:, 1])):
                corner = F.embedding((y * self.side + x).long(), self.table)
                out = out + (y_share * x_share)[:, None] * corner
        return out


class Resized(nn.Module):
    """ViT's table of side × side places, resized to each image's own grid as an image would be.

    What ``F.interpolate`` of the table to a grid holds at a token's place, to rounding: a weighted
    sum of the table's places. The weights follow from coordinates, so there is no loop over images,
    and no token sees which others there are. They take T · side² · 4 bytes: of 8,192 tokens 8 MiB
    at side 16, but 128 MiB at side 64.

    Args:
        dim: C.
        side: places on each axis.
        resize: ``"bilinear"`` or ``"bicubic"``.
        antialias: whether a grid with fewer places averages over all of the table, instead of
            sampling it.
        keep_aspect: whether the table is resized to a square of the grid's longer side, of which a
            grid takes the upper left.
    """

    def __init__(
        self, dim: int, side: int, *, resize: str, antialias: bool, keep_aspect: bool
    ) -> None:
        super().__init__()
        self.side = side
        self.resize = resize
        self.antialias = antialias
        self.keep_aspect = keep_aspect
        self.table = nn.Parameter(_small(side * side, dim))

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        grids = grid_hw.clamp(min=1)  # padding's is 0 × 0
        if self.keep_aspect:
            grids = grids.amax(-1, keepdim=True).expand_as(grids)
        shares = self._shares(coords.to(_exact(dtype)), grids)  # [T, 2, side]
        both = shares[:, 0, :, None] * shares[:, 1, None, :]  # [T, side, side]
        # Under autocast a product in bfloat16 would round the table, which no other position does.
        kind = self.table.device.type
        is_on = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_on else nullcontext():
            return both.flatten(1).to(self.table.dtype) @ self.table

    def _shares(self, coords: Tensor, grids: Tensor) -> Tensor:
        """Return how much each place of the table counts on an axis: [T, 2, side], sums of 1."""
        step = self.side / grids.to(coords.dtype)  # places of the table a patch
        centres = ((coords + 0.5) * step)[..., None]
        # Without antialiasing torch repeats the border, two places of it at most; with it, what
        # lies beyond the border does not count, and the filter is as wide as a patch.
        border = 0 if self.antialias else 2
        width = step.clamp(min=1)[..., None] if self.antialias else 1.0
        places = torch.arange(-border, self.side + border, device=coords.device) + 0.5
        away = (places.to(coords.dtype) - centres).abs() / width
        shares = (1 - away).clamp(min=0) if self.resize == "bilinear" else self._cubic(away)
        if border:
            shares[..., border] += shares[..., :border].sum(-1)
            shares[..., -border - 1] += shares[..., -border:].sum(-1)
            shares = shares[..., border:-border]
        return shares / shares.sum(-1, keepdim=True)

    def _cubic(self, away: Tensor) -> Tensor:
        """Return the weights of a cubic convolution at distances (Keys, 1981)."""
        a = -0.5 if self.antialias else -0.75  # as torch and Pillow have it
        near = ((a + 2) * away - (a + 3)) * away**2 + 1
        far = (((away - 5) * away + 8) * away - 4) * a
        return torch.where(away < 1, near, torch.where(away < 2, far, 0.0))


class Fourier(nn.Module):
    """sin and cos of a learned linear map of (y, x)."""

    def __init__(self, dim: int, side: int, *, fractional: bool) -> None:
        super().__init__()
        self.fractional = fractional
        # At first waves are about as long as an image, or as side patches if absolute.
        scale = 2 * torch.pi if fractional else 2 * torch.pi / side
        self.frequencies = nn.Parameter(torch.randn(2, dim // 2) * scale)

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        places = fractions(coords, grid_hw, dtype) if self.fractional else coords
        y, x = places.to(dtype).split(1, dim=-1)
        # Two products, not a matmul, whose rounding may depend on how many tokens there are.
        angles = y * self.frequencies[0] + x * self.frequencies[1]  # [T, C/2]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Sinusoidal(nn.Module):
    """Fixed sines and cosines of y and x, stacked; fractions are stretched to side places."""

    def __init__(self, dim: int, side: int, *, fractional: bool) -> None:
        super().__init__()
        self.quarter = dim // 4
        # The fastest wave has a frequency of 1, and would hardly change from 0 to 1.
        self.stretch = float(side - 1) if fractional else None

    def forward(self, coords: Tensor, grid_hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [T, C]."""
        places = coords.to(_exact(dtype))
        if self.stretch is not None:
            places = fractions(coords, grid_hw, dtype) * self.stretch
        angles = places[..., None] * _waves(_SINUSOIDAL_BASE, self.quarter, places)  # [T, 2, C/4]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).to(dtype)


def rotation(
    coords: Tensor, grid_hw: Tensor | None, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [T, 1, E/2], of 2-D rotary positions: half are of y, half of x.

    Prefix tokens, whose y is -1, are not turned.

    Args:
        coords: int[T, 2].
        grid_hw: int[T, 2], the grid of each token's image, for fractional ones: a grid's sides are
            -1 and 1, and its patches' centres count, times 2π. None for the patch indices.
        head_dim: E, a multiple of 4.
        dtype: of the model; the angles are float32 at least.

    Source: Heo et al., arXiv 2403.13298, axial frequencies; DINOv3, arXiv 2508.10104.
    """
    places = coords.to(_exact(dtype))
    if grid_hw is not None:
        # Padding's grid is 0 × 0, and NaN there would be everywhere after masked attention.
        places = (2 * places + 1) / grid_hw.clamp(min=1) - 1
        places = 2 * torch.pi * places
    places = places.masked_fill(coords[:, :1] < 0, 0)
    angles = places[:, :, None] * _waves(_ROTARY_BASE, head_dim // 4, places)  # [T, 2, E/4]
    angles = angles.flatten(1)[:, None]  # [T, 1, E/2]: the same for all heads
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys [T, H, E], channels e and e + E/2 turned as a pair by `rotation`."""
    cos, sin = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of coordinates, float32 at least: half precision is too coarse."""
    return torch.promote_types(dtype, torch.float32)


def _waves(base: float, count: int, like: Tensor) -> Tensor:
    """Return [count] frequencies from 1 down to base to the power of -(count - 1) / count."""
    return base ** -(torch.arange(count, dtype=like.dtype, device=like.device) / count)


def _small(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)


def _between(table: Tensor, places: Tensor) -> Tensor:
    """Return [T, C], a table interpolated at places: float[T] in 0..len(table) - 1."""
    last = len(table) - 1
    # The last place is interpolated from the one before it, with a share of 1.
    below = places.floor().clamp(max=max(last - 1, 0))
    share = (places - below).to(table.dtype)[:, None]
    low = F.embedding(below.long(), table)
    high = F.embedding((below + 1).clamp(max=last).long(), table)
    return low + share * (high - low)
