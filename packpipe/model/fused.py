"""Attention within segments that normalises and turns queries and keys: one Triton kernel each way.

It reads queries, keys and values [T, 3, H, E] as the projection leaves them. Work is a list of
blocks of queries, each with the bounds of its segment, so that no launch depends on the longest
segment. The list is as long as it could have to be, T ÷ block + segments; places that no block
takes end at once. Padding sees nothing, and gets zeros. Sums have one order each (no atomics), so
results are the same every time.

Products are of the dtype of the projection, float32 or half precision, sums in float32. A head has
any number of channels; what they lack of a power of two is masked.

Needs Triton, which torch has where it is made for a GPU. Without one its interpreter runs the
kernels, if the environment has ``TRITON_INTERPRET=1`` when this module is imported.

Shape letters: T tokens, H heads, E channels a head, S segments with paddings, N blocks, P parts of
a block.
"""

# Names in capitals are Triton's compile-time constants.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from packpipe import checks
from packpipe.model.attention import QK_NORM_EPS, QUERIES

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    _said = checks.sentence(
        "triton", "missing", "installed for attention='fused'", "pip install triton, on Linux"
    )
    raise ModuleNotFoundError(_said, name="triton") from error

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is the cheaper of the two


@triton.jit
def _bounds(place, start, stop, item, BLOCK: tl.constexpr, BM: tl.constexpr):
    """Return a part's first query, and its segment's end of keys and end.

    Of a block as it was loaded: torch takes what a called function is given for written to, if it
    becomes part of an address, and loading it here would have the blocks copied at every call.
    """
    # Of padding the keys end where they start; a place that no block took ends at its start, too.
    return place + (item % (BLOCK // BM)) * BM, tl.maximum(stop, start), tl.abs(stop)


@triton.jit
def _gain(gains, E: tl.constexpr, EP: tl.constexpr, NORMED: tl.constexpr):
    e = tl.arange(0, EP)
    if NORMED:
        return tl.load(gains + e, mask=e < E, other=0.0).to(tl.float32)
    return tl.full([EP], 1.0, tl.float32)


@triton.jit
def _turn(x, rows, inside, cos, sin, E: tl.constexpr, EP: tl.constexpr, BACK: tl.constexpr):
    """Return rows with channels e and e + E/2 turned as a pair; BACK turns them back."""
    e = tl.arange(0, EP)
    half: tl.constexpr = E // 2
    there = inside[:, None] & (e < E)[None, :]
    place = rows[:, None] * half + (e % half)[None, :]
    c = tl.load(cos + place, mask=there, other=1.0)
    s = tl.load(sin + place, mask=there, other=0.0)
    s = tl.where((e < half)[None, :], -s, s)
    if BACK:
        s = -s
    partner = tl.where(e < half, e + half, tl.where(e < E, e - half, e))
    other = tl.gather(x, tl.broadcast_to(partner[None, :], x.shape), 1)
    return x * c + other * s


@triton.jit
def _prepared(
    base,
    rows,
    inside,
    stride,
    gain,
    cos,
    sin,
    E: tl.constexpr,
    EP: tl.constexpr,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Return rows of queries or keys ÷ their root mean square, 1 ÷ that, and what attends."""
    e = tl.arange(0, EP)
    there = inside[:, None] & (e < E)[None, :]
    x = tl.load(base + rows[:, None] * stride + e[None, :], mask=there, other=0.0).to(tl.float32)
    rate = tl.where(inside, 1.0, 1.0)
    if NORMED:
        rate = tl.rsqrt(tl.sum(x * x, 1) / E + EPS)
        x = x * rate[:, None]
    ready = x * gain[None, :]
    if TURNED:
        ready = _turn(ready, rows, inside, cos, sin, E, EP, False)
    return x, rate, ready


@triton.jit
def _prepared_back(
    gradient,
    normed,
    rate,
    rows,
    inside,
    gain,
    cos,
    sin,
    E: tl.constexpr,
    EP: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Return the gradient by what was loaded, and by gain."""
    if TURNED:
        gradient = _turn(gradient, rows, inside, cos, sin, E, EP, True)
    by_normed = gradient * gain[None, :]
    by_loaded = by_normed
    if NORMED:
        along = tl.sum(by_normed * normed, 1) / E
        by_loaded = rate[:, None] * (by_normed - normed * along[:, None])
    return by_loaded, tl.sum(gradient * normed, 0)


@triton.jit
def _forward(
    qkv,
    gain_q,
    gain_k,
    cos,
    sin,
    blocks,
    out,
    log_sums,
    tokens,
    scale,
    H: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Attend from a part of a block of queries to its segment, softmax worked out as keys come."""
    head, item = tl.program_id(0), tl.program_id(1)
    blocks += (item // (BLOCK // BM)) * 3
    start = tl.load(blocks + 1)
    first, last, end = _bounds(tl.load(blocks), start, tl.load(blocks + 2), item, BLOCK, BM)
    if first >= end:
        return
    e = tl.arange(0, EP)
    stride = 3 * H * E
    here = qkv + head * E
    gq, gk = _gain(gain_q, E, EP, NORMED), _gain(gain_k, E, EP, NORMED)
    rows = (first + tl.arange(0, BM)).to(tl.int64)  # times stride they may pass 2**31
    inside = rows < end
    # Names of their own: Triton holds every name of a loop to one shape, `_` too.
    _q_normed, _q_rate, q = _prepared(
        here, rows, inside, stride, gq, cos, sin, E, EP, EPS, NORMED, TURNED
    )
    q = q.to(qkv.dtype.element_ty)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    seen = tl.zeros([BM, EP], tl.float32)
    for j in tl.range(start, last, BN):
        columns = (j + tl.arange(0, BN)).to(tl.int64)
        there = columns < end
        _k_normed, _k_rate, k = _prepared(
            here + H * E, columns, there, stride, gk, cos, sin, E, EP, EPS, NORMED, TURNED
        )
        place = here + 2 * H * E + columns[:, None] * stride + e[None, :]
        v = tl.load(place, mask=there[:, None] & (e < E)[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(there[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(weights, 1)
        seen = seen * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    total = tl.where(last > start, total, 1.0)  # padding's is 0, and so is what it sees
    top = tl.where(last > start, top, 0.0)
    seen = (seen / total[:, None]).to(out.dtype.element_ty)
    own = (rows[:, None] * H + head) * E + e[None, :]
    tl.store(out + own, seen, mask=inside[:, None] & (e < E)[None, :])
    tl.store(log_sums + head.to(tl.int64) * tokens + rows, top + tl.log2(total), mask=inside)


@triton.jit
def _backward(
    qkv,
    gain_q,
    gain_k,
    cos,
    sin,
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
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """Work out the gradients of a part of a block, first as keys and values, then as queries.

    Each part writes its own: the logits are worked out twice, and nothing is added up atomically.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    blocks += (item // (BLOCK // BM)) * 3
    start = tl.load(blocks + 1)
    first, last, end = _bounds(tl.load(blocks), start, tl.load(blocks + 2), item, BLOCK, BM)
    e = tl.arange(0, EP)
    real = e < E
    partial = dgain + (item.to(tl.int64) * H + head) * 2 * E + e
    if first >= end:
        tl.store(partial, tl.zeros([EP], tl.float32), mask=real)
        tl.store(partial + E, tl.zeros([EP], tl.float32), mask=real)
        return
    stride = 3 * H * E
    here, there_d = qkv + head * E, dqkv + head * E
    gq, gk = _gain(gain_q, E, EP, NORMED), _gain(gain_k, E, EP, NORMED)
    log_sums += head.to(tl.int64) * tokens
    rows = (first + tl.arange(0, BM)).to(tl.int64)
    inside = rows < end
    own = rows[:, None] * stride + e[None, :]
    owned = inside[:, None] & real[None, :]

    # As keys: what all queries of the segment say to these keys and values.
    normed, rate, k = _prepared(
        here + H * E, rows, inside, stride, gk, cos, sin, E, EP, EPS, NORMED, TURNED
    )
    k = k.to(qkv.dtype.element_ty)
    v = tl.load(here + 2 * H * E + own, mask=owned, other=0.0)
    dk = tl.zeros([BM, EP], tl.float32)
    dv = tl.zeros([BM, EP], tl.float32)
    for i in tl.range(start, last, BN):
        at = (i + tl.arange(0, BN)).to(tl.int64)
        there = at < end
        _q_normed, _q_rate, q = _prepared(
            here, at, there, stride, gq, cos, sin, E, EP, EPS, NORMED, TURNED
        )
        q = q.to(k.dtype)
        place = (at[:, None] * H + head) * E + e[None, :]
        do = tl.load(dout + place, mask=there[:, None] & real[None, :], other=0.0)
        o = tl.load(out + place, mask=there[:, None] & real[None, :], other=0.0)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        top = tl.load(log_sums + at, mask=there, other=float("inf"))
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.exp2(logits - top[None, :])  # [keys, queries]
        dv += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :])
        dk += tl.dot(dlogits.to(q.dtype), q, input_precision="ieee")
    tl.store(there_d + 2 * H * E + own, dv.to(dqkv.dtype.element_ty), mask=owned)
    dx, dg = _prepared_back(
        dk * scale, normed, rate, rows, inside, gk, cos, sin, E, EP, NORMED, TURNED
    )
    tl.store(there_d + H * E + own, dx.to(dqkv.dtype.element_ty), mask=owned)
    tl.store(partial + E, dg, mask=real)

    # As queries.
    normed, rate, q = _prepared(
        here, rows, inside, stride, gq, cos, sin, E, EP, EPS, NORMED, TURNED
    )
    q = q.to(qkv.dtype.element_ty)
    place = (rows[:, None] * H + head) * E + e[None, :]
    do = tl.load(dout + place, mask=owned, other=0.0)
    o = tl.load(out + place, mask=owned, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    top = tl.load(log_sums + rows, mask=inside, other=float("inf"))
    dq = tl.zeros([BM, EP], tl.float32)
    for j in tl.range(start, last, BN):
        columns = (j + tl.arange(0, BN)).to(tl.int64)
        there = columns < end
        _k_normed, _k_rate, keys = _prepared(
            here + H * E, columns, there, stride, gk, cos, sin, E, EP, EPS, NORMED, TURNED
        )
        keys = keys.to(q.dtype)
        at = here + 2 * H * E + columns[:, None] * stride + e[None, :]
        values = tl.load(at, mask=there[:, None] & real[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.where(there[None, :], tl.exp2(logits - top[:, None]), 0.0)
        dweights = tl.dot(do, tl.trans(values), input_precision="ieee")
        dlogits = weights * (dweights - delta[:, None])
        dq += tl.dot(dlogits.to(keys.dtype), keys, input_precision="ieee")
    dx, dg = _prepared_back(
        dq * scale, normed, rate, rows, inside, gq, cos, sin, E, EP, NORMED, TURNED
    )
    tl.store(there_d + own, dx.to(dqkv.dtype.element_ty), mask=owned)
    tl.store(partial, dg, mask=real)


def _constants(
    head_dim: int, block: int, queries: int, keys: int, normed: bool, turned: bool
) -> tuple[Any, ...]:
    """Return the kernels' constants from E on."""
    width = max(16, triton.next_power_of_2(head_dim))  # 16 is the least of a product
    return head_dim, width, block, queries, keys, QK_NORM_EPS, normed, turned


@triton_op("packpipe::attend", mutates_args=())
def attend(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    blocks: Tensor,
    block: int,
    queries: int,
    keys: int,
    warps: int,
    stages: int,
) -> tuple[Tensor, Tensor]:
    """Return outputs [T, H, E] and, for the backward pass, log2 of each query's sum [H, T].

    Args:
        qkv: [T, 3, H, E], queries, keys and values as projected.
        gain_q: float[E], by which normalised queries are multiplied; None normalises nothing.
        gain_k: float[E], of keys.
        cos: float32[T, E/2], of `packpipe.model.positions.rotation`; None turns nothing.
        sin: float32[T, E/2].
        blocks: int32[N, 3], of `packpipe.model.attention.blocks_of` with the same block.
        block: queries of a block.
        queries: of a program, which divide block.
        keys: of a step within it.
        warps: of a program.
        stages: of its loads.
    """
    tokens, _, heads, head_dim = qkv.shape
    out = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    normed, turned = gain_q is not None, cos is not None
    # What is None is not read; a tensor stands in for it.
    gains = (gain_q, gain_k) if normed else (log_sums, log_sums)
    turn = (cos, sin) if turned else (log_sums, log_sums)
    wrap_triton(_forward)[(heads, blocks.shape[0] * (block // queries))](
        *(qkv, *gains, *turn, blocks, out, log_sums, tokens, head_dim**-0.5),
        *(heads, *_constants(head_dim, block, queries, keys, normed, turned)),
        num_warps=warps,
        num_stages=stages,
    )
    return out, log_sums


@triton_op("packpipe::attend_back", mutates_args=())
def attend_back(
    dout: Tensor,
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    blocks: Tensor,
    out: Tensor,
    log_sums: Tensor,
    block: int,
    queries: int,
    keys: int,
    warps: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by qkv [T, 3, H, E] and, to be summed, by both gains [N·P·H, 2, E]."""
    tokens, _, heads, head_dim = qkv.shape
    programs = blocks.shape[0] * (block // queries)
    dqkv = torch.empty_like(qkv)
    dgain = torch.empty(programs * heads, 2, head_dim, dtype=torch.float32, device=qkv.device)
    normed, turned = gain_q is not None, cos is not None
    gains = (gain_q, gain_k) if normed else (log_sums, log_sums)
    turn = (cos, sin) if turned else (log_sums, log_sums)
    wrap_triton(_backward)[(heads, programs)](
        *(qkv, *gains, *turn, blocks, out, log_sums, dout, dqkv, dgain, tokens, head_dim**-0.5),
        *(heads, *_constants(head_dim, block, queries, keys, normed, turned)),
        num_warps=warps,
        num_stages=1,
    )
    return dqkv, dgain


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.sizes = inputs[6:10]  # but for the stages of loads, of which the backward pass has one


def _back(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _, gain_q, gain_k, *_ = saved = ctx.saved_tensors
    dqkv, dgain = attend_back(dout.contiguous(), *saved, *ctx.sizes)
    if gain_q is None:
        return dqkv, *[None] * 10
    dq, dk = dgain.sum(0)
    return dqkv, dq.to(gain_q.dtype), dk.to(gain_k.dtype), *[None] * 8


attend.register_autograd(_back, setup_context=_keep)


def fused_kernel(
    projected: Tensor,
    gains: tuple[Tensor, Tensor] | None,
    turn: tuple[Tensor, Tensor] | None,
    blocks: Tensor,
) -> Tensor:
    """Return [T, H, E], what each token sees of its segment; padding sees zeros.

    Args:
        projected: [T, 3, H, E], queries, keys and values, neither normalised nor turned.
        gains: of the norms of queries and keys, each [E]; None does not normalise.
        turn: (cos, sin) of rotary positions, each [T, 1, E/2]; None does not turn.
        blocks: of `packpipe.model.attention.blocks_of`.

    Raises:
        ValueError: there is no GPU, and Triton's interpreter is not asked for; or the projection is
            in float64.
    """
    device, dtype = projected.device, projected.dtype
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        remedy = "choose 'auto', 'reference' or 'segments'"
        raise ValueError(checks.sentence("attention", "fused", f"not on {device}", remedy))
    if dtype == torch.float64:
        remedy = "choose 'reference' for float64"
        raise ValueError(checks.sentence("attention", "fused", "float32 or less", remedy))
    gain_q, gain_k = gains or (None, None)
    cos, sin = (part[:, 0].float().contiguous() for part in turn) if turn else (None, None)
    # Wider heads, and rotary ones, spill out of a program's registers with 64 queries.
    size = 64 if projected.shape[-1] <= 64 and turn is None else 32
    seen: Tensor = attend(
        projected.contiguous(), gain_q, gain_k, cos, sin, blocks, QUERIES, size, size, 4, 2
    )[0]
    return seen
