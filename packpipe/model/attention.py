"""Attention within segments: a token sees its own image and nothing else.

Five backends compute the same function:

* ``"reference"``: one SDPA call with a boolean mask. Runs anywhere, compiles, costs O(L²) a
  row whatever the segments; the others are checked against it.
* ``"segments"``: one SDPA call for each run of segments of one length. Costs Σ l² and skips
  padding: the choice on a CPU. Inside ``torch.compile`` it becomes the masked form, since one
  graph must serve every batch.
* ``"varlen"``: one flash kernel over all segments. Costs Σ l²: the choice on a GPU in half
  precision. Skips padding too, but in compiled code, where shapes must not change, keeps a
  row's padding as one more segment.
* ``"flex"``: FlexAttention with a block mask made from segment bounds, on a GPU in any
  precision. Costs whole blocks of 128 × 128.
* ``"fused"``: kernels of `packpipe.model.fused`, on a GPU in any precision but float64. Normalises
  and turns queries and keys, too. Not chosen by itself: it has not been timed on a card.

Inside the model the tokens of all rows lie one after the other, T of them; `flatten` chooses them.

Shape letters: B rows, L tokens a row, S segments a row, T tokens, H heads, E channels a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.loading.colouring import segment_numbers

BACKENDS = ("reference", "segments", "varlen", "flex", "fused")
QK_NORM_EPS = 1e-6  # torch's default is that of the dtype, which is coarse in half precision
BLOCK = 128  # tokens a side of a block of FlexAttention's mask, and of a block of varlen's
QUERIES = 64  # of a block of "fused"

# (queries, keys, values) -> outputs, each [T, H, E].
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# (cos, sin) that turn queries and keys with rotary positions; None with other ones.
Turn: TypeAlias = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Fused:
    """Attention of ``"fused"``, which normalises and turns queries and keys itself.

    Attributes:
        blocks: int32[N, 3], of `blocks_of`.
    """

    blocks: Tensor

    def __call__(
        self, projected: Tensor, gains: tuple[Tensor, Tensor] | None, turn: Turn
    ) -> Tensor:
        """Return [T, H, E]; for the arguments see `packpipe.model.fused.fused_kernel`."""
        return fused_kernel(projected, gains, turn, self.blocks)


@dataclass(frozen=True, eq=False)
class FlatTokens:
    """The tokens of a batch, one after the other, and attention within their segments.

    Attributes:
        places: int64[T], each token's place in the flattened [B·L]; None if T is B·L, with padding.
        segments: int64[T], row · S + number of the token's segment; B · S in padding.
        starts: int64[B·S], the first of T of each segment; any for absent segments.
        attend: attention within segments.
    """

    places: Tensor | None
    segments: Tensor
    starts: Tensor
    attend: Attention | Fused

    def take(self, values: Tensor) -> Tensor:
        """Return [T, ...] of [B, L, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def put_back(self, values: Tensor, rows: int, seq_len: int) -> Tensor:
        """Return [B, L, ...] of [T, ...]; padding that was skipped is 0."""
        if self.places is not None:
            empty = values.new_zeros(rows * seq_len, *values.shape[1:])
            values = empty.index_copy(0, self.places, values)
        back: Tensor = values.unflatten(0, (rows, seq_len))
        return back


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the fastest backend on a device in a precision."""
    if device.type == "cpu":
        return "segments"
    if device.type != "cuda":
        return "reference"
    half = dtype in (torch.bfloat16, torch.float16)
    # FlashAttention 2 needs Ampere (8.0) or later.
    return "varlen" if half and torch.cuda.get_device_capability(device) >= (8, 0) else "flex"


def backends_of(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the backends that run on a device in a precision."""
    if device.type != "cuda":
        return ("reference", "segments")
    half = dtype in (torch.bfloat16, torch.float16)
    flex = ("flex", "fused") if dtype != torch.float64 else ()
    return ("reference", "segments", *(("varlen",) if half else ()), *flex)


def flatten(
    batch: PackedBatch, backend: str, *, keep_padding: bool = False, longest: int | None = None
) -> FlatTokens:
    """Return the tokens of a batch with their attention, prepared once for all layers.

    Args:
        batch: packed rows.
        backend: one of `BACKENDS`.
        keep_padding: keep padding among the tokens, so that all batches have one shape, as compiled
            code needs it. In torch.compile it is always kept.
        longest: most tokens of a segment, for ``"varlen"``: a number that does not depend on the
            batch, so that graphs do not. None is seq_len.
    """
    rows, seq_len = batch.segment_ids.shape
    max_segments = batch.seq_lens.shape[1]
    keep_padding = keep_padding or torch.compiler.is_compiling()
    # Padding has a number of its own, B · S: one more bucket for sums over segments.
    segments = segment_numbers(batch.segment_ids, max_segments)
    lens = batch.seq_lens.long()
    bound = seq_len if longest is None else min(seq_len, -(-longest // BLOCK) * BLOCK)
    attend: Attention | Fused
    if keep_padding or backend in ("reference", "flex", "fused"):
        row = torch.arange(rows, device=lens.device)[:, None]
        starts = (row * seq_len + lens.cumsum(1) - lens).flatten()  # [B·S]
        if backend == "varlen":
            # The bounds must cover all tokens: each row's padding is more segments, as many as it
            # could take, none of them longer than an image may be.
            pieces = torch.arange(-(-seq_len // bound), device=lens.device) * bound
            padding = (seq_len - lens.sum(1, keepdim=True) - pieces).clamp(0, bound)
            attend = _varlen(torch.cat([lens, padding], 1).flatten(), bound)
        elif backend == "fused":
            attend = Fused(blocks_of(lens, seq_len))
        else:
            attend = _flex(batch) if backend == "flex" else _masked(batch)
        # Clamped, since an absent segment behind a full last row would start past the last token.
        return FlatTokens(None, segments, starts.clamp(max=rows * seq_len - 1), attend)
    # From here on the number of tokens depends on the batch, and a GPU has to report it.
    places = batch.segment_ids.flatten().nonzero()[:, 0]
    flat_lens = lens.flatten()
    starts = (flat_lens.cumsum(0) - flat_lens).clamp(max=max(len(places) - 1, 0))
    attend = _varlen(flat_lens, bound) if backend == "varlen" else _by_runs(flat_lens.tolist())
    return FlatTokens(places, segments[places], starts, attend)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Return bool[B, 1, L, L]: whether the query (row) may see the key (column).

    Args:
        segment_ids: int[B, L], 0 in padding, which sees nothing and is not seen.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & (segment_ids != 0)[:, None, None, :]


def _masked(batch: PackedBatch) -> Attention:
    mask = segment_mask(batch.segment_ids)
    shape = batch.segment_ids.shape

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # [T, H, E] -> [B, H, L, E]. SDPA gives 0, not NaN, for a query whose mask is empty.
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (queries, keys, values))
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return seen.transpose(1, 2).flatten(0, 1)  # [T, H, E]

    return attend


def _by_runs(lens: list[int]) -> Attention:
    # (length, how many in a row): squares of one size are one call, as in a plain ViT.
    runs = [(length, len(list(run))) for length, run in groupby(filter(None, lens))]
    sizes = [length * count for length, count in runs]

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(*(x.split(sizes) for x in (queries, keys, values)), runs, strict=True)
        outputs = []
        for q, k, v, (length, count) in parts:
            # [count · length, H, E] -> [count, H, length, E]
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            outputs.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        # Of no tokens all three are empty; their sum keeps every weight in the graph, where a
        # rank without tokens must give it a gradient of zeros, or DDP waits for it.
        return torch.cat(outputs) if outputs else queries + keys + values

    return attend


def _varlen(lens: Tensor, longest: int) -> Attention:
    # The kernel takes int32. It launches blocks of 128 queries for `longest` tokens of every
    # segment, and reads no token beyond them.
    bounds = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return varlen_kernel(queries, keys, values, bounds, longest)

    return attend


def varlen_kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Return [T, H, E], flash attention within bounds, int32[segments + 1]; some may be empty."""
    from torch.nn.attention.varlen import varlen_attn

    # By keyword: the order of what follows the tensors has changed between releases.
    seen: Any = varlen_attn(q, k, v, cu_seq_q=bounds, cu_seq_k=bounds, max_q=longest, max_k=longest)
    return cast(Tensor, seen)


def blocks_of(seq_lens: Tensor, seq_len: int, block: int = QUERIES) -> Tensor:
    """Return int32[N, 3]: each block's first query, its segment's first token and its end.

    Padding is one more segment of each row, whose end is negative. What no block takes is 0.

    Args:
        seq_lens: int[B, S], of the segments of each row.
        seq_len: tokens of a row.
        block: queries of a block.

    >>> blocks_of(torch.tensor([[70, 20]]), 100).tolist()
    [[0, 0, 70], [64, 0, 70], [70, 70, 90], [90, 90, -100]]
    """
    lens = seq_lens.long()
    lens = torch.cat([lens, seq_len - lens.sum(1, keepdim=True)], 1)
    real = torch.ones_like(lens, dtype=torch.bool)
    real[:, -1] = False
    lens, real = lens.flatten(), real.flatten()
    starts = lens.cumsum(0) - lens
    count = (lens + block - 1) // block
    ends = count.cumsum(0)
    number = torch.arange(len(seq_lens) * seq_len // block + len(lens), device=lens.device)
    segment = torch.searchsorted(ends, number, right=True).clamp(max=len(lens) - 1)
    first = starts[segment] + (number - ends[segment] + count[segment]) * block
    stop = starts[segment] + lens[segment]
    stop = torch.where(real[segment], stop, -stop)
    found = torch.stack([first, starts[segment], stop], 1)
    return torch.where((number < ends[-1])[:, None], found, 0).to(torch.int32).contiguous()


def fused_kernel(
    projected: Tensor, gains: tuple[Tensor, Tensor] | None, turn: Turn, blocks: Tensor
) -> Tensor:
    """Return `packpipe.model.fused.fused_kernel`."""
    from packpipe.model.fused import fused_kernel as kernel

    return kernel(projected, gains, turn, blocks)


def _flex(batch: PackedBatch) -> Attention:
    mask = block_mask(batch.segment_ids, batch.seq_lens)
    shape = batch.segment_ids.shape

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (queries, keys, values))
        return flex_kernel(q, k, v, mask).transpose(1, 2).flatten(0, 1)

    return attend


def flex_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Return [B, H, L, E], FlexAttention under a block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    # In torch.compile the model's own graph compiles it.
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    seen: Tensor = kernel(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask)
    return seen


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, it builds the whole matrix of logits.
    return torch.compile(flex_attention, dynamic=False)


def block_mask(segment_ids: Tensor, seq_lens: Tensor) -> Any:
    """Return FlexAttention's BlockMask of packed rows, from segment bounds: no L × L mask.

    A row's segments follow each other, so what a block of queries may see is one range of keys:
    from the start of its first token's segment to the end of its last token's. Padding counts as
    one more segment, whose outputs are not used. Blocks wholly inside one segment are marked full,
    and need no mask.

    Args:
        segment_ids: int32[B, L].
        seq_lens: int32[B, S].
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, seq_len = segment_ids.shape
    device = segment_ids.device
    num_blocks = -(-seq_len // BLOCK)
    ends = seq_lens.long().cumsum(1)
    # [B, S + 1], the bounds of each segment; padding is the last one, up to the row's end.
    lasts = torch.cat([ends, torch.full((rows, 1), seq_len, device=device)], 1)
    starts = torch.cat([torch.zeros(rows, 1, dtype=torch.long, device=device), ends], 1)
    # [B, L], each token's segment: 0, 1, ... in row order; padding takes S.
    number = torch.where(segment_ids > 0, segment_ids.long() - 1, lasts.shape[1] - 1)
    first = torch.arange(num_blocks, device=device) * BLOCK
    last = (first + BLOCK).clamp(max=seq_len) - 1
    low = starts.gather(1, number[:, first])  # [B, blocks]: keys seen are low..high - 1
    high = lasts.gather(1, number[:, last])
    alone = number[:, first] == number[:, last]
    block = torch.arange(num_blocks, device=device)
    # [B, blocks of queries, blocks of keys]
    seen = (block >= (low // BLOCK)[..., None]) & (block * BLOCK < high[..., None])
    inside = (block * BLOCK >= low[..., None]) & ((block + 1) * BLOCK <= high[..., None])
    # Queries past the row's end exist only in its last block.
    full = inside & alone[..., None] & (first + BLOCK <= seq_len)[:, None]
    partial_count, partial_order = _listed(seen & ~full)
    full_count, full_order = _listed(full)

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        return segment_ids[b, q] == segment_ids[b, k]

    return BlockMask.from_kv_blocks(
        partial_count,
        partial_order,
        full_count,
        full_order,
        BLOCK_SIZE=BLOCK,
        mask_mod=same,
        seq_lengths=(seq_len, seq_len),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of the last axis are chosen, and its indices, chosen first: [B, 1, ...]."""
    # BlockMask reads the first `count` indices; the axis of size 1 is the heads', which share it.
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Return how far a backend is from ``"reference"`` on a few rows, in outputs and gradients.

    Call it at the start of a training: kernels come with the installed torch, and a wrong one is
    best found before the first step.

    Args:
        backend: one of `BACKENDS`.
        device: where it will run.
        dtype: the precision it will run in.
        head_dim: E.

    Returns:
        the largest difference ÷ the largest value.

    Raises:
        RuntimeError: they differ by more than rounding explains.
    """
    # A full row with an image of one token, a row with padding, and an empty one; 257 tokens are
    # two blocks of FlexAttention and one token.
    lens = torch.tensor([[200, 1, 56, 0], [130, 100, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    ids = torch.zeros(3, 257, dtype=torch.int32)
    for row, some in enumerate(lens.tolist()):
        ids[row, : sum(some)] = torch.repeat_interleave(torch.arange(4) + 1, torch.tensor(some))
    nothing = torch.zeros(3, 4, 2, dtype=torch.int16)
    batch = PackedBatch(
        patches=torch.zeros(3, 257, 0, dtype=torch.uint8),
        segment_ids=ids,
        coords=torch.zeros(3, 257, 2, dtype=torch.int16),
        seq_lens=lens,
        grid_hw=nothing,
        example_index=torch.zeros(3, 4, dtype=torch.int64),
    ).to(device)
    generator = torch.Generator().manual_seed(0)
    # Queries, keys, values, and the gradient of the output; drawn on the CPU, alike everywhere.
    drawn = torch.randn(4, 3, 257, 2, head_dim, generator=generator).to(device, dtype)
    # What backends leave in padding differs, and is not compared.
    real = (batch.segment_ids > 0)[..., None, None]
    results = []
    # Reference attention runs in float32 at least, or its own rounding would count as difference.
    for name, exact in ((backend, dtype), ("reference", torch.promote_types(dtype, torch.float32))):
        tokens = flatten(batch, name)
        q, k, v = (x.to(exact).detach().requires_grad_() for x in drawn[:3])
        taken = [tokens.take(x) for x in (q, k, v)]
        if isinstance(tokens.attend, Fused):
            found = tokens.attend(torch.stack(taken, 1), None, None)
        else:
            found = tokens.attend(*taken)
        seen = tokens.put_back(found, 3, 257) * real
        grads = torch.autograd.grad((seen * drawn[3].to(exact)).sum(), (q, k, v))
        results.append(torch.stack([seen, *(grad * real for grad in grads)]).double())
    own, wanted = results
    difference = ((own - wanted).abs().max() / wanted.abs().max()).item()
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    if not difference <= limit:  # so that NaN fails, too
        expected = f"at most {limit} from reference attention"
        remedy = "choose attention='reference', and report the versions of torch and the driver"
        name = f"attention {backend!r} ({dtype} on {device})"
        raise RuntimeError(checks.sentence(name, difference, expected, remedy))
    return difference
