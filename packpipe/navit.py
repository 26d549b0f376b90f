"""NaViT: a vision transformer that consumes packed rows (floor 2, torch).

It resizes nothing, drops nothing and packs nothing. Every image of a row is seen alone:
attention and pooling stay within segments, positions come from coordinates.

Shape letters: B rows, L tokens a row, S segments a row, D bytes a patch, C channels,
H heads, E channels a head (C = H·E).

Source: NaViT 2.1, 3.4, B.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe import checks
from packpipe.attention import BACKENDS, Attention, segment_attention
from packpipe.batch import PackedBatch


@dataclass(frozen=True, kw_only=True)
class NaViTConfig:
    """The model's shape.

    Attributes:
        num_classes: logits a segment.
        patch_size: pixels a side of a patch, as packed.
        dim: channels, a multiple of heads.
        depth: transformer blocks.
        heads: attention heads.
        mlp_ratio: width of the MLPs ÷ dim.
        max_side: most patches an axis of an image may have (rows of the position tables).
        attention: backend, ``"segments"`` (one call a segment) or ``"reference"`` (masked).

    Raises:
        TypeError, ValueError: ``name is VALUE, expected REQUIREMENT; remedy``.
    """

    num_classes: int
    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: int = 4
    max_side: int = 1024
    attention: str = "segments"

    def __post_init__(self) -> None:
        limits = {"patch_size": 128, "max_side": 2**15 - 1}
        for name in (
            "num_classes", "patch_size", "dim", "depth", "heads", "mlp_ratio", "max_side",
        ):  # fmt: skip
            value = getattr(self, name)
            checks.whole_number(name, value, 1, limits.get(name, 2**31 - 1), "choose a usual size")
        if self.dim % self.heads:
            expected = f"a multiple of {self.heads} (heads)"
            raise ValueError(checks.sentence("dim", self.dim, expected, "change dim or heads"))
        checks.choice("attention", self.attention, BACKENDS, "choose a backend")


class NaViT(nn.Module):
    """Maps a `PackedBatch` to logits [B, S, num_classes], one vector a segment.

    Logits of absent segments are finite and mean nothing; ``batch.present`` tells them apart.
    Pre-norm blocks, query-key normalisation, no biases, factorised absolute positions, one
    learned query that pools each segment.

    Raises:
        ValueError: (on call) the patches are not of patch_size, or an image has more than
            max_side patches on an axis.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_size**2 * 3, config.dim, bias=False)
        self.row_position = nn.Embedding(config.max_side, config.dim)
        self.column_position = nn.Embedding(config.max_side, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.pool = AttentionPool(config)
        self.head = nn.Linear(config.dim, config.num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return logits [B, S, num_classes]."""
        self._check(batch)
        pixels = batch.patches.to(self.embed.weight.dtype) / 127.5 - 1  # [B, L, D] in -1..1
        x = self.embed(pixels)  # [B, L, C]
        y_coord, x_coord = batch.coords.long().unbind(-1)
        x = x + self.row_position(y_coord) + self.column_position(x_coord)
        attend = segment_attention(batch, self.config.attention)
        for block in self.blocks:
            x = block(x, attend)
        pooled = self.pool(x, batch.segment_ids, batch.seq_lens.shape[1])  # [B, S, C]
        logits: Tensor = self.head(pooled)
        return logits

    def _check(self, batch: PackedBatch) -> None:
        patch_bytes = self.config.patch_size**2 * 3
        if batch.patches.shape[-1] != patch_bytes:
            found, expected = batch.patches.shape[-1], f"{patch_bytes} (patch_size² × 3)"
            remedy = "give the model the patch_size the rows were packed with"
            raise ValueError(checks.sentence("batch.patches.shape[-1]", found, expected, remedy))
        # Reading a value back would stall a GPU and break a compiled graph.
        if batch.coords.device.type == "cpu" and not torch.compiler.is_compiling():
            side = int(batch.grid_hw.max()) if batch.grid_hw.numel() else 0
            if side > self.config.max_side:
                expected = f"at most {self.config.max_side} patches an axis (max_side)"
                remedy = "raise max_side, or pack with fewer max_tokens"
                raise ValueError(checks.sentence("batch.grid_hw", side, expected, remedy))


class Block(nn.Module):
    """Attention within segments, then an MLP on every token; both residual, both pre-norm."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.dim * config.mlp_ratio
        self.norm_attention = nn.LayerNorm(config.dim, bias=False)
        self.queries_keys_values = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.norm_queries = nn.RMSNorm(config.dim // config.heads)
        self.norm_keys = nn.RMSNorm(config.dim // config.heads)
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_mlp = nn.LayerNorm(config.dim, bias=False)
        self.widen = nn.Linear(config.dim, width, bias=False)
        self.narrow = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        """Return tokens [B, L, C]."""
        projected = self.queries_keys_values(self.norm_attention(x))
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)) for part in projected.chunk(3, dim=-1)
        )  # [B, L, H, E]
        seen = attend(self.norm_queries(queries), self.norm_keys(keys), values)
        x = x + self.project(seen.flatten(-2))
        widened: Tensor = F.gelu(self.widen(self.norm_mlp(x)))
        out: Tensor = x + self.narrow(widened)
        return out


class AttentionPool(nn.Module):
    """One learned query a head pools the tokens of each segment; an MLP refines the result.

    A softmax over segments by scatter: logits are [B, L, H], no [B, S, L] mask is built.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        head_dim = config.dim // config.heads
        width = config.dim * config.mlp_ratio
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(config.heads, head_dim) * head_dim**-0.5)
        self.norm_tokens = nn.LayerNorm(config.dim, bias=False)
        self.keys_values = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.norm_keys = nn.RMSNorm(head_dim)
        self.project = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_mlp = nn.LayerNorm(config.dim, bias=False)
        self.widen = nn.Linear(config.dim, width, bias=False)
        self.narrow = nn.Linear(width, config.dim, bias=False)
        self.norm_out = nn.LayerNorm(config.dim, bias=False)

    def forward(self, x: Tensor, segment_ids: Tensor, max_segments: int) -> Tensor:
        """Return one vector a segment, [B, S, C]; absent segments give 0 before the MLP."""
        keys, values = (
            part.unflatten(-1, (self.heads, -1))
            for part in self.keys_values(self.norm_tokens(x)).chunk(2, dim=-1)
        )  # [B, L, H, E]
        # Sums over up to L tokens need more than the 8 bits of bf16.
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = (self.norm_keys(keys) * self.query).sum(-1).to(exact)  # [B, L, H]
        weights = segment_softmax(logits, segment_ids, max_segments)
        weighted = weights[..., None] * values.to(exact)
        pooled = _sum_by_segment(weighted, segment_ids, max_segments).to(values.dtype)
        x = self.project(pooled.flatten(-2))  # [B, S, C]
        widened: Tensor = F.gelu(self.widen(self.norm_mlp(x)))
        out: Tensor = self.norm_out(x + self.narrow(widened))
        return out


def segment_softmax(logits: Tensor, segment_ids: Tensor, max_segments: int) -> Tensor:
    """Return weights [B, L, H] that sum to 1 over the tokens of each segment, 0 in padding.

    Args:
        logits: float[B, L, H].
        segment_ids: int[B, L], 0 in padding.
        max_segments: S.
    """
    bucket = segment_ids.long()[..., None].expand_as(logits)
    shape = (logits.shape[0], max_segments + 1, logits.shape[2])  # bucket 0 is padding
    largest = logits.new_full(shape, -torch.inf).scatter_reduce(1, bucket, logits.detach(), "amax")
    raised = (logits - largest.gather(1, bucket)).exp() * (segment_ids > 0)[..., None]
    total = logits.new_zeros(shape).scatter_add(1, bucket, raised)
    # Padding divides 0 by the 1 put into its bucket.
    total = total + (torch.arange(shape[1], device=total.device) == 0)[None, :, None]
    return raised / total.gather(1, bucket)


def _sum_by_segment(values: Tensor, segment_ids: Tensor, max_segments: int) -> Tensor:
    """Return [B, S, H, E], the sum of values [B, L, H, E] over each segment's tokens."""
    bucket = segment_ids.long()[..., None, None].expand_as(values)
    shape = (values.shape[0], max_segments + 1, *values.shape[2:])
    return values.new_zeros(shape).scatter_add(1, bucket, values)[:, 1:]
