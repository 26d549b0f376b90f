"""The colours and mixtures of augmentation, made of pixels on the model's device.

Products and sums channel by channel rather than a matrix product: those would be rounded under
autocast and in TF32, and compiled code makes one pass over the pixels of these. Padding keeps its
zeros; each token is changed by its own segment's numbers alone. Then tokens of neighbours are
mixed, so that each brings the colours of its own image.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from packpipe.augmenting.augment import NEVER


def segment_numbers(segment_ids: Tensor, max_segments: int) -> Tensor:
    """Return int64[B·L], row · S + number of each token's segment; B · S in padding.

    Args:
        segment_ids: int[B, L], 0 in padding.
        max_segments: S.
    """
    ids = segment_ids.long()
    rows = torch.arange(len(ids), device=ids.device)[:, None] * max_segments
    return torch.where(ids > 0, rows + ids - 1, len(ids) * max_segments).flatten()


class Drawn(Protocol):
    """What a batch says of how its pixels are to be shown: see `PackedBatch`."""

    colours: Tensor | None
    solarize: Tensor | None
    mix_weight: Tensor | None


def drawn_pixels(pixels: Tensor, segments: Tensor, offsets: Tensor | None, drawn: Drawn) -> Tensor:
    """Return pixels as augmentation shows them: in their colours, then mixed; not rounded.

    Args:
        pixels: float[T, D], levels of 0..255, the channel fastest.
        segments: int64[T], `segment_numbers` of the tokens.
        offsets: int32[T], ``mix_offset`` of the tokens; None mixes none.
        drawn: the batch.
    """
    if drawn.colours is not None:
        pixels = in_colours(pixels, segments, drawn.colours, drawn.solarize)
    if offsets is not None and drawn.mix_weight is not None:
        pixels = mixed(pixels, segments, offsets, drawn.mix_weight)
    return pixels


def mixed(pixels: Tensor, segments: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Return pixels in which each mixed token is blended with the one that it meets.

    Args:
        pixels: float[T, D], rows one after the other, with padding at their ends or without any.
        segments: int64[T], `segment_numbers` of the tokens.
        offsets: int32[T], how many places further on the other is; 0 if there is none.
        weights: float32[B, S], weight of the own pixels.
    """
    exact = torch.promote_types(pixels.dtype, torch.float32)
    # Padding has a segment of its own, B · S.
    own = F.pad(weights.flatten().to(exact), (0, 1))[segments].masked_fill(offsets == 0, 1)
    others = pixels[torch.arange(len(pixels), device=pixels.device) + offsets].to(exact)
    # Exact for weights of 0 and 1: what is not mixed, or swapped, keeps every bit.
    return torch.lerp(others, pixels.to(exact), own[:, None]).to(pixels.dtype)


def in_colours(
    pixels: Tensor, segments: Tensor, colours: Tensor, solarize: Tensor | None
) -> Tensor:
    """Return pixels in the colours of their segments, clamped to 0..255, not rounded.

    Args:
        pixels: float[T, D], levels of 0..255, the channel fastest.
        segments: int64[T], `segment_numbers` of the tokens.
        colours: float32[B, S, 3, 4], what takes (red, green, blue, 1) to new levels.
        solarize: float32[B, S], levels from this on are 255 - level first; None inverts none.
    """
    exact = torch.promote_types(pixels.dtype, torch.float32)
    # One more for padding, which keeps its colour.
    padding = torch.eye(3, 4, dtype=exact, device=colours.device)[None]
    matrix = torch.cat([colours.flatten(0, 1).to(exact), padding])[segments]  # [T, 3, 4]
    # [3, T, P·P]: of channels apart, the CPU takes several pixels at once.
    levels = pixels.to(exact).unflatten(-1, (-1, 3)).movedim(-1, 0).contiguous()
    if solarize is not None:
        start = F.pad(solarize.flatten().to(exact), (0, 1), value=NEVER)[segments, None]
        levels = torch.where(levels >= start, 255 - levels, levels)
    from_red, from_green, from_blue, shift = matrix.permute(2, 1, 0)[..., None]  # [3, T, 1] each
    mixed = torch.addcmul(shift, levels[0], from_red)
    mixed = mixed.addcmul(levels[1], from_green).addcmul(levels[2], from_blue)
    return mixed.clamp(0, 255).movedim(0, -1).flatten(1).to(pixels.dtype)
