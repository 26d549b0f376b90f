"""Plain twins of the attention kernels that run on a GPU alone: dense masks, any device."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from packpipe.model import attention
from packpipe.model.positions import rotate


@contextmanager
def in_place_of_kernels():
    """Within it, models call these twins where they would call the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_kernel", varlen_kernel)
        patch.setattr(attention, "flex_kernel", flex_kernel)
        patch.setattr(attention, "fused_kernel", fused_kernel)
        yield


def varlen_kernel(q, k, v, bounds, longest):
    """Attention within bounds, by a mask of all tokens; beyond longest there is nothing right."""
    number = torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(q)), right=True)
    beyond = torch.arange(len(q)) - bounds[number] >= longest
    v = v.masked_fill(beyond[:, None, None], torch.nan)
    mask = number[:, None] == number[None, :]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def fused_kernel(projected, gains, turn, blocks):
    """Attention of each block's queries to its segment, by a mask of all tokens."""
    q, k, v = projected.unbind(1)
    if gains is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
            for x, gain in zip((q, k), gains, strict=True)
        )
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    first, start, stop = blocks.unbind(1)
    token = torch.arange(len(q))[:, None]
    own = (token >= first) & (token < torch.minimum(first + 64, stop.abs()))  # [T, N]
    seen = (token >= start) & (token < stop)
    mask = own.to(q.dtype) @ seen.to(q.dtype).T
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)[0].transpose(0, 1)


def flex_kernel(q, k, v, mask):
    """Attention under a block mask, by the dense mask it stands for."""
    return scaled_dot_product_attention(q, k, v, attn_mask=dense(mask)[:, None])


def dense(mask):
    """bool[B, L, L] of a BlockMask: its full blocks, and its partial ones where mask_mod agrees."""
    block = mask.BLOCK_SIZE[0]
    length = mask.seq_lengths[0]
    full = spread(listed(mask.full_kv_num_blocks, mask.full_kv_indices), block, length)
    partial = spread(listed(mask.kv_num_blocks, mask.kv_indices), block, length)
    place = torch.arange(length)
    batch = torch.arange(len(full))
    agrees = mask.mask_mod(
        batch[:, None, None], torch.zeros(()), place[None, :, None], place[None, None, :]
    )
    return full | (partial & agrees)


def listed(count, order):
    """bool[B, blocks, blocks]: whether a block is among the first count of its row's order."""
    return (order.argsort(-1) < count[..., None])[:, 0]


def spread(blocks, block, length):
    """bool[B, L, L] of bool[B, blocks, blocks]."""
    tall = blocks.repeat_interleave(block, 1)[:, :length]
    return tall.repeat_interleave(block, 2)[:, :, :length]
