"""Pooling: the tokens of each segment become one vector, by scatter over flat tokens.

No [rows, segments, tokens] mask is built. A segment's vector depends on its own tokens alone.

Shape letters: T tokens, N segments of all rows, C channels, H heads, E channels a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from packpipe.model.activation import activate
from packpipe.model.attention import FlatTokens

if TYPE_CHECKING:
    from packpipe.model.config import NaViTConfig

POOLINGS = ("attention", "mean", "max", "first", "none")


class AttentionPool(nn.Module):
    """One learned query a head pools the tokens of each segment; an MLP refines the result.

    The switches of `NaViTConfig` hold here as in the blocks, but for ``gated``.

    Source: NaViT 2.1 (the MAP head).
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        dim, heads, bias = config.dim, config.heads, config.bias
        head_dim = dim // heads
        self.heads = heads
        self.activation = config.activation
        # Learned itself, since all segments share it; its scale includes attention's 1 ÷ √E.
        self.query = nn.Parameter(torch.randn(heads, head_dim) * head_dim**-0.5)
        self.keys_values = nn.Linear(dim, 2 * dim, bias=False)
        self.bias_values = nn.Parameter(torch.zeros(heads, head_dim)) if bias else None
        self.norm_keys = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.project = nn.Linear(dim, dim, bias=bias)
        self.norm_mlp = nn.LayerNorm(dim, config.norm_eps, bias=bias)
        self.widen = nn.Linear(dim, config.mlp_width, bias=bias)
        self.narrow = nn.Linear(config.mlp_width, dim, bias=bias)
        out = nn.LayerNorm(dim, config.norm_eps, bias=bias) if config.norm_out else nn.Identity()
        self.norm_out = out

    def forward(self, x: Tensor, tokens: FlatTokens) -> Tensor:
        """Return [N, C] of [T, C]; absent segments enter the projection and the MLP as 0."""
        weights, values = self.weigh(x, tokens)
        weighted = (weights[..., None] * _exact(values)).flatten(1)
        # [T, C] -> [N, C]
        pooled = segment_sum(weighted, tokens.segments, len(tokens.starts)).to(values.dtype)
        x = self.project(pooled)
        widened = activate(self.widen(self.norm_mlp(x)), self.activation)
        out: Tensor = self.norm_out(x + self.narrow(widened))
        return out

    def weigh(self, x: Tensor, tokens: FlatTokens) -> tuple[Tensor, Tensor]:
        """Return weights [T, H], which sum to 1 over a segment's tokens, and values [T, H, E]."""
        keys, values = (
            part.unflatten(-1, (self.heads, -1)) for part in self.keys_values(x).chunk(2, dim=-1)
        )  # [T, H, E]
        if self.bias_values is not None:
            values = values + self.bias_values.to(values.dtype)
        keys = self.norm_keys(keys.to(self.query.dtype))
        logits = (keys * self.query).sum(-1)  # [T, H]
        return segment_softmax(_exact(logits), tokens.segments, len(tokens.starts)), values


def pool_plainly(x: Tensor, tokens: FlatTokens, pooling: str) -> Tensor:
    """Return [N, C] of [T, C]: the ``"mean"``, ``"max"`` or ``"first"`` of each segment's tokens.

    The first token is the image's upper left, or the first one that was kept. Absent segments give
    a finite vector that means nothing.
    """
    num_segments = len(tokens.starts)
    if pooling == "first":
        # There is no first of no tokens; their sum is 0, and keeps the weights in the graph.
        return x[tokens.starts] if len(x) else segment_sum(x, tokens.segments, num_segments)
    if pooling == "max":
        bucket = tokens.segments[:, None].expand_as(x)
        # The last row is padding's. Without include_self a negative maximum stays, and absent
        # segments keep 0.
        empty = x.new_zeros(num_segments + 1, x.shape[1])
        largest: Tensor = empty.scatter_reduce(0, bucket, x, "amax", include_self=False)
        return largest[:-1]
    ones = torch.ones(len(x), 1, dtype=torch.float32, device=x.device)
    counts = segment_sum(ones, tokens.segments, num_segments).clamp(min=1)
    sums = segment_sum(_exact(x), tokens.segments, num_segments)
    return (sums / counts).to(x.dtype)


def segment_softmax(logits: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Return weights [T, H] that sum to 1 over the tokens of each segment.

    Args:
        logits: float[T, H].
        segments: int64[T], each token's segment; num_segments in padding.
        num_segments: N.
    """
    bucket = segments[:, None].expand_as(logits)
    empty = logits.new_full((num_segments + 1, logits.shape[1]), -torch.inf)
    # Detached: the shift keeps exp in range and cancels out, so it needs no gradient.
    largest = empty.scatter_reduce(0, bucket, logits.detach(), "amax")
    raised = (logits - largest[segments]).exp()
    total = torch.zeros_like(empty).index_add(0, segments, raised)
    return raised / total[segments]


def segment_sum(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Return [N, ...], the sum of values [T, ...] over each segment's tokens."""
    # One row more for padding, whose segment is N; it is cut off.
    empty = values.new_zeros(num_segments + 1, *values.shape[1:])
    return empty.index_add(0, segments, values)[:-1]


def _exact(x: Tensor) -> Tensor:
    """Return x in float32 at least: sums over many tokens need more than bfloat16's 8 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
