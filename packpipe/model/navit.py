"""NaViT: a vision transformer whose input is packed rows.

Resizing, token dropping and packing come before it. The output of an image does not depend on the
others in its row: attention and pooling stay within segments, positions come from coordinates. On
rows of one square image each the same model is a plain ViT, on rows of one image each a padded one.

Shape letters: B rows, L tokens a row, S segments a row, D bytes a patch, T tokens of all rows,
C channels, H heads, E channels a head (C = H·E), K classes.

Source: NaViT 2.1, 3.4, B.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.loading.colouring import drawn_pixels
from packpipe.model.activation import activate
from packpipe.model.attention import (
    QK_NORM_EPS,
    Attention,
    FlatTokens,
    Fused,
    Turn,
    choose_backend,
    flatten,
)
from packpipe.model.config import NaViTConfig
from packpipe.model.pooling import AttentionPool, pool_plainly
from packpipe.model.positions import ROTARY, is_indexed, position_embedding, rotate, rotation
from packpipe.model.predict import predict
from packpipe.model.prefix import check_prefix


class NaViT(nn.Module):
    """Maps a `PackedBatch` to logits: one vector a segment or, without pooling, one a token.

    Pre-norm blocks, query-key normalisation, no biases; where other encoders differ, `NaViTConfig`
    has switches. Logits of absent segments are finite and mean nothing; ``batch.present`` tells
    them apart.

    ``torch.export`` makes one program of it for all batches of one shape, with the same columns::

        batch = replace(batch, labels=None)  # of dataclasses; what is exported asks for no labels
        program = torch.export.export(model.eval(), (batch,))
        logits = program.module()(batch)

    With ``attention="varlen"``, ``"flex"`` or ``"fused"`` the program needs their kernel where it
    runs; others become plain masked attention.

    Attributes:
        config: the shape.
        keep_padding: whether padding goes through the model too, so that all batches have one
            shape; `compile_parts` sets it.

    Raises:
        ValueError: (on call) the patches are not of patch_size; or, on a CPU, an image has more
            patches on an axis than the position table has places, or more tokens than longest, or
            the rows have not as many prefix tokens as the model.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_padding = False
        dim = config.dim
        self.embed = nn.Linear(config.patch_size**2 * 3, dim, bias=config.bias)
        self.position = position_embedding(
            config.position,
            dim,
            config.side,
            resize=config.resize,
            antialias=config.antialias,
            keep_aspect=config.keep_aspect,
        )
        self.prefix: nn.Parameter | None = None
        if config.prefix_tokens:
            self.prefix = nn.Parameter(torch.empty(config.prefix_tokens, dim))
            nn.init.trunc_normal_(self.prefix, std=0.02)
        self.norm_embed = _norm(config) if config.norm_embed else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = _norm(config)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.head: nn.Linear | None = None
        if config.num_classes is not None:
            self.head = nn.Linear(dim, config.num_classes * config.cells, bias=config.bias)
        # ViT's usual start; norms keep torch's, position tables and the pool's query their own.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, batch: PackedBatch, paths: Tensor | None = None, longest: int | None = None
    ) -> Tensor:
        """Return logits [B, S, K]; [B, L, K], 0 or meaningless in padding, if pooling is "none".

        With ``target_stride`` they are [B, L, T, K], of the T cells of each token, row by row.
        Without num_classes, K is C: the pooled features. ``head="unit"`` gives vectors of length 1.

        Args:
            batch: packed rows.
            paths: float[B, S, depth, 2], what attention and MLP of each block are multiplied by
                for each image, of `packpipe.training.drop_path`; None leaves them as they are.
            longest: most tokens of an image in any batch, such as `PackedLoader.longest`: with
                ``attention="varlen"`` less is computed then. None is seq_len.
        """
        x, tokens = self._encode(batch, paths, longest)
        return self.answer(x, batch, tokens)

    def pool_weights(self, batch: PackedBatch) -> Tensor:
        """Return how much each head of the pool looks at each token: [B, L, heads].

        An image's weights sum to 1 in every head; padding and prefix tokens have 0.

        Raises:
            ValueError: the model does not pool by attention.
        """
        if self.pool is None:
            remedy = "make the model with pooling='attention'"
            raise ValueError(checks.sentence("pooling", self.config.pooling, "attention", remedy))
        x, tokens = self._encode(batch)
        weights, _ = self.pool.weigh(self.norm(x), self._pooled(batch, tokens))
        seen = (batch.segment_ids > 0) & (batch.coords[..., 0] >= 0)
        return tokens.put_back(weights, *seen.shape) * seen[..., None]

    def _encode(
        self, batch: PackedBatch, paths: Tensor | None = None, longest: int | None = None
    ) -> tuple[Tensor, FlatTokens]:
        """Return the tokens [T, C] after all blocks, and where they lie in the batch."""
        self._check(batch, longest)
        tokens = flatten(batch, self.backend(), keep_padding=self.keep_padding, longest=longest)
        x, turn = self.read(batch, tokens)
        for block, path in zip(self.blocks, self._paths(paths, tokens), strict=True):
            x = block(x, tokens.attend, turn, path)
        return x, tokens

    def _pooled(self, batch: PackedBatch, tokens: FlatTokens) -> FlatTokens:
        """Return the tokens as they are pooled: prefix tokens count as padding."""
        if self.prefix is None:
            return tokens
        is_prefix = tokens.take(batch.coords)[:, 0] < 0
        return replace(tokens, segments=tokens.segments.masked_fill(is_prefix, len(tokens.starts)))

    def _paths(self, paths: Tensor | None, tokens: FlatTokens) -> Iterable[Tensor | None]:
        """Return for each block [T, 2], its two numbers for every token; None without paths."""
        if paths is None:
            return [None] * len(self.blocks)
        # [B·S + 1, depth, 2]: padding's segment is B·S.
        by_segment = F.pad(paths.flatten(0, 1), (0, 0, 0, 0, 0, 1))
        return by_segment[tokens.segments].unbind(1)

    def read(self, batch: PackedBatch, tokens: FlatTokens) -> tuple[Tensor, Turn]:
        """Return embedded patches [T, C] with positions added; rotary ones as (cos, sin) beside."""
        dtype = self.embed.weight.dtype
        pixels = tokens.take(batch.patches).to(dtype)
        offsets = None if batch.mix_offset is None else tokens.take(batch.mix_offset)
        pixels = drawn_pixels(pixels, tokens.segments, offsets, batch)
        pixels = pixels / 127.5 - 1
        x = self.embed(pixels)  # [T, D] in -1..1 -> [T, C]
        stream = x.dtype
        coords = tokens.take(batch.coords).long()
        # [B·S + 1, 2]: padding's segment is B·S, and its grid 0 × 0.
        grids = F.pad(batch.grid_hw.flatten(0, 1).long(), (0, 0, 0, 1))[tokens.segments]
        if self.position is not None:
            # A place of the grid for prefix tokens, too: outside of it, weights may be 0 ÷ 0.
            places = coords.masked_fill(coords[:, :1] < 0, 0)
            x = x + self.position(places, grids, dtype)
        if self.prefix is not None:
            slots = coords[:, 1].clamp(max=len(self.prefix) - 1)  # of patches any
            x = torch.where(coords[:, :1] < 0, F.embedding(slots, self.prefix), x)
        # Under autocast the blocks add up in half precision: half the bytes of every sum.
        x = self.norm_embed(x).to(stream)
        if self.config.position not in ROTARY:
            return x, None
        of = grids if self.config.position == "rotary_fractional" else None
        return x, rotation(coords, of, self.config.dim // self.config.heads, dtype)

    def answer(self, x: Tensor, batch: PackedBatch, tokens: FlatTokens) -> Tensor:
        """Return the model's output, given the tokens [T, C] after all blocks."""
        if not self.config.norm_pooled:
            x = self.norm(x)
        tokens = self._pooled(batch, tokens)
        if self.pool is not None:
            x = self.pool(x, tokens)  # [B·S, C]
        elif self.config.pooling != "none":
            x = pool_plainly(x, tokens, self.config.pooling)  # [B·S, C]
        if self.config.norm_pooled:
            x = self.norm(x)
        if self.head is not None:
            x = self.head(x)  # [B·S or T, K]
        if self.config.head == "unit":
            # In half precision the length would be 1 only to two or three digits.
            x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        rows, seq_len = batch.segment_ids.shape
        if self.config.pooling == "none":
            by_token = tokens.put_back(x, rows, seq_len)
            if self.config.target_stride is not None:
                by_token = by_token.unflatten(-1, (self.config.cells, -1))
            return by_token
        by_segment: Tensor = x.unflatten(0, (rows, -1))  # [B, S, K]
        return by_segment

    def backend(self) -> str:
        """Return the attention backend: the configured one, or the fastest of the device."""
        if self.config.attention != "auto":
            return self.config.attention
        weight = self.embed.weight
        # Under autocast queries and keys are of its dtype, whatever the weights are.
        kind = weight.device.type
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
        return choose_backend(weight.device, dtype)

    def predict(self, images: Iterable[Any], **options: Any) -> Tensor | list[Tensor]:
        """Return `packpipe.predict` of this model: logits [images, K], in the images' order."""
        return predict(self, images, **options)

    def _check(self, batch: PackedBatch, longest: int | None) -> None:
        patch_bytes = self.config.patch_size**2 * 3
        if batch.patches.shape[-1] != patch_bytes:
            found, expected = batch.patches.shape[-1], f"{patch_bytes} (patch_size² × 3)"
            remedy = "give the model the patch_size the rows were packed with"
            raise ValueError(checks.sentence("batch.patches.shape[-1]", found, expected, remedy))
        # On the CPU alone: reading a value back would stall a GPU and break a compiled graph.
        if batch.coords.device.type == "cpu" and not torch.compiler.is_compiling():
            check_prefix(batch, self.config.prefix_tokens)
            side = int(batch.grid_hw.max()) if batch.grid_hw.numel() else 0
            if is_indexed(self.config.position) and side > self.config.side:
                expected = f"at most {self.config.side} patches an axis (max_side)"
                remedy = "raise max_side, or pack with fewer max_tokens"
                raise ValueError(checks.sentence("batch.grid_hw", side, expected, remedy))
            most = int(batch.seq_lens.max()) if batch.seq_lens.numel() else 0
            if longest is not None and longest < most:
                expected, remedy = f"{most} or more (tokens of an image)", "pass None"
                raise ValueError(checks.sentence("longest", longest, expected, remedy))


class Block(nn.Module):
    """Attention within segments, then an MLP on every token; both residual, both pre-norm."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        dim, heads, head_dim = config.dim, config.heads, config.dim // config.heads
        self.heads = heads
        self.activation, self.gated = config.activation, config.gated
        self.norm_attention = _norm(config)
        self.queries_keys_values = nn.Linear(dim, 3 * dim, bias=False)
        # Keys have none: it would move all logits of a query alike, which softmax does not see.
        biases = nn.Parameter(torch.zeros(2, heads, head_dim)) if config.bias else None
        self.bias_queries_values = biases
        self.norm_queries = nn.RMSNorm(head_dim, QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.norm_keys = nn.RMSNorm(head_dim, QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.project = nn.Linear(dim, dim, bias=config.bias)
        self.scale_attention = _scale(config)
        self.norm_mlp = _norm(config)
        widths = 2 if config.gated else 1
        self.widen = nn.Linear(dim, widths * config.mlp_width, bias=config.bias)
        self.narrow = nn.Linear(config.mlp_width, dim, bias=config.bias)
        self.scale_mlp = _scale(config)

    def forward(
        self, x: Tensor, attend: Attention | Fused, turn: Turn, path: Tensor | None = None
    ) -> Tensor:
        """Return tokens [T, C]; path [T, 2] is what attention and MLP are multiplied by."""
        projected = self.queries_keys_values(self.norm_attention(x))  # [T, 3C]
        projected = projected.unflatten(-1, (3, self.heads, -1))  # [T, 3, H, E]
        if isinstance(attend, Fused):
            seen = attend(self._biased(projected), self._gains(), turn)  # [T, H, E]
        else:
            seen = attend(*self._prepared(projected, turn))
        attended = self.scale_attention(self.project(seen.flatten(-2)))
        x = x + _scaled(attended, path, 0)  # [T, C]
        widened = activate(self.widen(self.norm_mlp(x)), self.activation, gated=self.gated)
        return x + _scaled(self.scale_mlp(self.narrow(widened)), path, 1)

    def _prepared(self, projected: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [T, H, E], normalised and turned."""
        queries, keys, values = projected.unbind(1)
        if self.bias_queries_values is not None:
            bias_queries, bias_values = self.bias_queries_values.to(values.dtype)
            queries, values = queries + bias_queries, values + bias_values
        # Norms run in the weights' dtype (float32 under autocast), kernels in that of the values.
        exact = self.queries_keys_values.weight.dtype
        queries, keys = self.norm_queries(queries.to(exact)), self.norm_keys(keys.to(exact))
        if turn is not None:
            queries, keys = rotate(queries, turn), rotate(keys, turn)
        return queries.to(values.dtype), keys.to(values.dtype), values

    def _biased(self, projected: Tensor) -> Tensor:
        """Return the projection [T, 3, H, E] with biases of queries and values."""
        if self.bias_queries_values is None:
            return projected
        of_queries, of_values = self.bias_queries_values.to(projected.dtype)
        return projected + torch.stack([of_queries, torch.zeros_like(of_queries), of_values])

    def _gains(self) -> tuple[Tensor, Tensor] | None:
        """Return the factors of normalised queries and keys; None if they are not normalised."""
        if isinstance(self.norm_queries, nn.RMSNorm) and isinstance(self.norm_keys, nn.RMSNorm):
            return self.norm_queries.weight, self.norm_keys.weight
        return None


def _scaled(x: Tensor, path: Tensor | None, part: int) -> Tensor:
    """Return x [T, C] multiplied by a column of path [T, 2]; in its dtype, so in half precision."""
    return x if path is None else (x * path[:, part, None]).to(x.dtype)


class LayerScale(nn.Module):
    """Multiplies each channel with a learned factor.

    Source: CaiT, arXiv 2103.17239.
    """

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Return [T, C] of [T, C]."""
        return (x * self.weight).to(x.dtype)


def _norm(config: NaViTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)


def _scale(config: NaViTConfig) -> nn.Module:
    if config.layer_scale is None:
        return nn.Identity()
    return LayerScale(config.dim, config.layer_scale)


def compile_parts(model: NaViT, **options: Any) -> NaViT:
    """Return the model with its parts compiled: one graph for all of its blocks, two around them.

    Compiles in seconds where ``torch.compile(model)`` takes minutes, and runs as fast. Batches of
    another shape have graphs of their own, up to ``torch._dynamo.config.recompile_limit``, 8 as
    torch comes; beyond, they are computed without one.

    Args:
        model: compiled in place.
        **options: of ``torch.compile``.
    """
    model.keep_padding = True  # or the number of tokens, and so the graphs, would vary by batch
    # On this model alone, not its class; `state_dict` keeps its names.
    for part in ("read", "answer"):
        setattr(model, part, torch.compile(getattr(model, part), dynamic=False, **options))
    for block in model.blocks:
        block.compile(dynamic=False, **options)
    return model
