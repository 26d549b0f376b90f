"""Folding: multiplies neighbouring linear maps of an encoder into one, in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(kernel: Tensor) -> Tensor:
    """Return the weights [C, P·P·3] of a patch as rows have it, of a convolution's [C, 3, P, P]."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def fold_pixels(
    weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) for pixels in -1..1 that give what the old ones give normalised pixels.

    Args:
        weight: float[C, P·P·3], channel fastest, for (x ÷ 255 - mean) ÷ std.
        bias: float[C].
        mean: of each channel.
        std: of each channel.
    """
    wide, pixels = weight.double(), weight.shape[1] // 3
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    # With z in -1..1, (z ÷ 2 + 1 ÷ 2 - mean) ÷ std.
    factor, shift = (0.5 / stds).repeat(pixels), ((0.5 - means) / stds).repeat(pixels)
    return (wide * factor).float(), (bias.double() + wide @ shift).float()


def fold_probe(probe: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Return a pool's query [heads, E], scaled by 1 ÷ √E, of its probe and their projection.

    Args:
        probe: float[C], learned.
        weight: float[C, C], of the projection of queries.
        bias: float[C], of the same.
        heads: of the pool.
    """
    query = weight.double() @ probe.double() + bias.double()
    query = query.unflatten(0, (heads, -1))
    scaled: Tensor = query * query.shape[-1] ** -0.5
    return scaled.float()
