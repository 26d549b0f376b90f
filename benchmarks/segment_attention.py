"""Attention within segments with query-key normalisation: one Triton kernel each way.

A candidate for `packpipe.model.attention`, measured by gpu_lab.py beside the backends that are
there.
It reads queries, keys and values [T, 3, H, E] as the projection leaves them, and normalises them
itself. Work is a list of blocks of queries, each with the bounds of its segment, so that no launch
depends on the longest segment. The list is as long as it could have to be, T ÷ block + segments;
places that no block takes end at once. Sums have one order each (no atomics), so results are the
same every time.

Right in Triton's interpreter (float32) to 2e-7; not yet timed on a card. For head sizes of 16, 32
and 64; row offsets are int32, so T · 3 · C must stay below 2**31.

Shape letters: T tokens, H heads, E channels a head, S segments with paddings, N blocks.
"""

# Names in capitals are Triton's compile-time constants.
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

EPS = 1e-6
BLOCK = 64  # queries of a block
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is the cheaper of the two


def blocks_of(lens: Tensor, real: Tensor, tokens: int, block: int = BLOCK) -> Tensor:
    """Return int32[N, 3]: each block's first query, its segment's first token and its end.

    Args:
        lens: int[S], lengths in row order that cover all tokens.
        real: bool[S], False for padding: its end is negative, it sees nothing and gets 0.
        tokens: T.
        block: queries of a block.
    """
    lens = lens.long()
    starts = lens.cumsum(0) - lens
    count = (lens + block - 1) // block
    ends = count.cumsum(0)
    number = torch.arange(tokens // block + len(lens), device=lens.device)
    segment = torch.searchsorted(ends, number, right=True).clamp(max=len(lens) - 1)
    first = starts[segment] + (number - ends[segment] + count[segment]) * block
    stop = starts[segment] + lens[segment]
    stop = torch.where(real[segment], stop, -stop)
    found = torch.stack([first, starts[segment], stop], 1)
    return torch.where((number < ends[-1])[:, None], found, 0).to(torch.int32).contiguous()


@triton.jit
def _normed(base, rows, inside, stride, gain, E: tl.constexpr, EPS: tl.constexpr):
    """Return rows of queries or keys ÷ their root mean square, 1 ÷ that, and them times gain."""
    place = base + rows[:, None] * stride + tl.arange(0, E)[None, :]
    x = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    rate = tl.rsqrt(tl.sum(x * x, 1) / E + EPS)
    normed = x * rate[:, None]
    return normed, rate, normed * gain[None, :]


@triton.jit
def _normed_back(gradient, normed, rate, gain, E: tl.constexpr):
    """Return the gradient by what was normalised, and by gain."""
    by_normed = gradient * gain[None, :]
    along = tl.sum(by_normed * normed, 1) / E
    return rate[:, None] * (by_normed - normed * along[:, None]), tl.sum(gradient * normed, 0)


@triton.jit
def _forward(
    qkv,
    gain_q,
    gain_k,
    blocks,
    out,
    log_sums,
    tokens,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPS: tl.constexpr,
):
    """Attend from one block of queries to its segment, softmax worked out as keys come."""
    head, item = tl.program_id(0), tl.program_id(1)
    first, start = tl.load(blocks + item * 3), tl.load(blocks + item * 3 + 1)
    stop = tl.load(blocks + item * 3 + 2)
    end = tl.abs(stop)
    if first >= end:  # a place of the list that no block took
        return
    e = tl.arange(0, E)
    stride = 3 * H * E
    here = qkv + head * E
    gq, gk = tl.load(gain_q + e), tl.load(gain_k + e)
    rows = first + tl.arange(0, BM)
    inside = rows < end
    # Names of their own: Triton holds every name of a loop to one shape, `_` too.
    _q_normed, _q_rate, q = _normed(here, rows, inside, stride, gq, E, EPS)
    q = q.to(qkv.dtype.element_ty)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    seen = tl.zeros([BM, E], tl.float32)
    for j in tl.range(start, tl.maximum(stop, start), BN):
        columns = j + tl.arange(0, BN)
        there = columns < end
        _k_normed, _k_rate, k = _normed(here + H * E, columns, there, stride, gk, E, EPS)
        place = here + 2 * H * E + columns[:, None] * stride + e[None, :]
        v = tl.load(place, mask=there[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(there[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(weights, 1)
        seen = seen * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    total = tl.where(stop > 0, total, 1.0)
    top = tl.where(stop > 0, top, 0.0)
    seen = (seen / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (rows[:, None] * H + head) * E + e[None, :], seen, mask=inside[:, None])
    tl.store(log_sums + head * tokens + rows, top + tl.log2(total), mask=inside)


@triton.jit
def _backward(
    qkv,
    gain_q,
    gain_k,
    blocks,
    out,
    log_sums,
    dout,
    dqkv,
    dgain,
    tokens,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPS: tl.constexpr,
):
    """Work out the gradients of one block, first as keys and values, then as queries.

    Each block writes its own: the logits are worked out twice, and nothing is added up atomically.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    first, start = tl.load(blocks + item * 3), tl.load(blocks + item * 3 + 1)
    stop = tl.load(blocks + item * 3 + 2)
    end = tl.abs(stop)
    e = tl.arange(0, E)
    partial = dgain + (item * H + head) * 2 * E
    if first >= end:
        tl.store(partial + e, tl.zeros([E], tl.float32))
        tl.store(partial + E + e, tl.zeros([E], tl.float32))
        return
    stride = 3 * H * E
    here, there_d = qkv + head * E, dqkv + head * E
    gq, gk = tl.load(gain_q + e), tl.load(gain_k + e)
    rows = first + tl.arange(0, BM)
    inside = rows < end
    last = tl.maximum(stop, start)
    own = rows[:, None] * stride + e[None, :]

    # As keys: what all queries of the segment say to this block's keys and values.
    normed, rate, k = _normed(here + H * E, rows, inside, stride, gk, E, EPS)
    k = k.to(qkv.dtype.element_ty)
    v = tl.load(here + 2 * H * E + own, mask=inside[:, None], other=0.0)
    dk = tl.zeros([BM, E], tl.float32)
    dv = tl.zeros([BM, E], tl.float32)
    for i in tl.range(start, last, BN):
        at = i + tl.arange(0, BN)
        there = at < end
        _q_normed, _q_rate, q = _normed(here, at, there, stride, gq, E, EPS)
        q = q.to(k.dtype)
        place = (at[:, None] * H + head) * E + e[None, :]
        do = tl.load(dout + place, mask=there[:, None], other=0.0)
        o = tl.load(out + place, mask=there[:, None], other=0.0)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        top = tl.load(log_sums + head * tokens + at, mask=there, other=float("inf"))
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.exp2(logits - top[None, :])  # [keys, queries]
        dv += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision="ieee")
    tl.store(there_d + 2 * H * E + own, dv.to(dqkv.dtype.element_ty), mask=inside[:, None])
    dx, dg = _normed_back(dk * scale, normed, rate, gk, E)
    tl.store(there_d + H * E + own, dx.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(partial + E + e, dg)

    # As queries.
    normed, rate, q = _normed(here, rows, inside, stride, gq, E, EPS)
    q = q.to(qkv.dtype.element_ty)
    place = (rows[:, None] * H + head) * E + e[None, :]
    do = tl.load(dout + place, mask=inside[:, None], other=0.0)
    o = tl.load(out + place, mask=inside[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    top = tl.load(log_sums + head * tokens + rows, mask=inside, other=float("inf"))
    dq = tl.zeros([BM, E], tl.float32)
    for j in tl.range(start, last, BN):
        columns = j + tl.arange(0, BN)
        there = columns < end
        _k_normed, _k_rate, keys = _normed(here + H * E, columns, there, stride, gk, E, EPS)
        keys = keys.to(q.dtype)
        at = here + 2 * H * E + columns[:, None] * stride + e[None, :]
        values = tl.load(at, mask=there[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.where(there[None, :], tl.exp2(logits - top[:, None]), 0.0)
        dweights = tl.dot(do, tl.trans(values), input_precision="ieee")
        dlogits = weights * (dweights - delta[:, None])
        dq += tl.dot(dlogits.to(keys.dtype), keys, input_precision="ieee")
    dx, dg = _normed_back(dq * scale, normed, rate, gq, E)
    tl.store(there_d + own, dx.to(dqkv.dtype.element_ty), mask=inside[:, None])
    tl.store(partial + e, dg)


@triton_op("packpipe_lab::attend", mutates_args=())
def attend(
    qkv: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    blocks: Tensor,
    block: int = BLOCK,
    keys: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """Return outputs [T, H, E] and, for the backward pass, log2 of each query's sum [H, T].

    Args:
        qkv: [T, 3, H, E], queries, keys and values as projected.
        gain_q: float32[E], by which normalised queries are multiplied.
        gain_k: float32[E], of keys.
        blocks: int32[N, 3], of `blocks_of` with the same block.
        block: queries of a block.
        keys: of a step within it.
        warps: of a program.
        stages: of its loads.
    """
    tokens, _, heads, head_dim = qkv.shape
    out = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    wrap_triton(_forward)[(heads, blocks.shape[0])](
        *(qkv, gain_q, gain_k, blocks, out, log_sums, tokens, head_dim**-0.5),
        *(heads, head_dim, block, keys, EPS),
        num_warps=warps,
        num_stages=stages,
    )
    return out, log_sums


@triton_op("packpipe_lab::attend_back", mutates_args=())
def attend_back(
    dout: Tensor,
    qkv: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    blocks: Tensor,
    out: Tensor,
    log_sums: Tensor,
    block: int = BLOCK,
    keys: int = 64,
    warps: int = 4,
    stages: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by qkv [T, 3, H, E] and, to be summed, by both gains [N·H, 2, E]."""
    tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    shape = (blocks.shape[0] * heads, 2, head_dim)
    dgain = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    wrap_triton(_backward)[(heads, blocks.shape[0])](
        *(qkv, gain_q, gain_k, blocks, out, log_sums, dout, dqkv, dgain, tokens, head_dim**-0.5),
        *(heads, head_dim, block, keys, EPS),
        num_warps=warps,
        num_stages=stages,
    )
    return dqkv, dgain


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.shape = inputs[4:7]  # but for the stages of loads, of which the backward pass has one


def _back(ctx, dout, _):
    saved = ctx.saved_tensors
    dqkv, dgain = attend_back(dout.contiguous(), *saved, *ctx.shape)
    dq, dk = dgain.sum(0)
    return dqkv, dq, dk, None, None, None, None, None


attend.register_autograd(_back, setup_context=_keep)
