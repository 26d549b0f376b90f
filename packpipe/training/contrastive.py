"""Contrastive losses of images and texts, without holding the whole matrix of logits.

The N × M logits are computed in chunks of rows, once more in the backward pass, so memory grows
with chunk · M. Pairs of absent segments are masked, not removed, so that shapes stay the same;
their vectors may hold anything.

Each rank passes its own pairs, which are compared with those of all ranks. The mean over ranks of
the losses, which DDP takes of gradients, is the loss of all pairs together.

Shape letters: N pairs of this rank, M of all ranks, C channels.

Source: CLIP (Radford et al., arXiv 2103.00020), SigLIP (Zhai et al., arXiv 2303.15343).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # here: a first import by `checkpoint` keeps the frames of our callers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from packpipe import checks
from packpipe.loading.ranks import has_group
from packpipe.training.losses import global_count


def softmax_contrastive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    present: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Return the cross-entropy of finding each image's text and each text's image, averaged.

    Args:
        images: float[N, C], vectors of length 1; row i belongs to row i of texts. Of a `PairBatch`:
            ``model(batch.images).flatten(0, 1)``, with ``present=batch.present.flatten()``.
        texts: float[N, C], vectors of length 1.
        scale: float[], multiplies the logits; exp of a learned number.
        present: bool[N], which pairs are there; None is all.
        chunk: rows of logits at a time.

    Raises:
        TypeError, ValueError: chunk is no such number, or the shapes do not fit.
    """
    here, all_pairs, first = _checked(images, texts, present, chunk)
    everywhere = all_pairs(here.to(torch.uint8)).bool()  # gloo gathers no bool
    # Row i of this rank belongs to row first + i of all ranks' rows.
    labels = first + torch.arange(len(images), device=images.device)

    def missed(rows: Tensor, others: Tensor, scale: Tensor, start: int) -> Tensor:
        part = slice(start, start + len(rows))
        logits = (scale * rows @ others.T).masked_fill(~everywhere, -torch.inf)  # [chunk, M]
        # An absent row gets logits of 0: -inf alone would make it NaN, even in the gradient.
        logits = logits.masked_fill(~here[part, None], 0)
        losses = F.cross_entropy(logits, labels[part], reduction="none")
        return losses.masked_fill(~here[part], 0).sum()

    images, texts = _clean(images, here), _clean(texts, here)
    total = _in_chunks(missed, images, all_pairs(texts), (scale,), chunk)
    total = total + _in_chunks(missed, texts, all_pairs(images), (scale,), chunk)
    return total / 2 / global_count(here)


def sigmoid_contrastive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    present: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Return SigLIP's loss: binary cross-entropies of all N · M combinations, per present pair.

    Args:
        images: float[N, C], vectors of length 1; row i belongs to row i of texts.
        texts: float[N, C], vectors of length 1.
        scale: float[], multiplies the logits; exp of a learned number.
        bias: float[], added to the logits; -10 at the start of a training.
        present: bool[N], which pairs are there; None is all.
        chunk: rows of logits at a time.

    Raises:
        TypeError, ValueError: chunk is no such number, or the shapes do not fit.
    """
    here, all_pairs, first = _checked(images, texts, present, chunk)
    everywhere = all_pairs(here.to(torch.uint8)).bool()  # gloo gathers no bool
    place = torch.arange(len(everywhere), device=images.device)

    def missed(rows: Tensor, others: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        logits = scale * rows @ others.T + bias  # [chunk, M]
        own = place == first + start + place[: len(rows), None]
        losses = -F.logsigmoid(torch.where(own, logits, -logits))
        asked = here[start : start + len(rows), None] & everywhere
        return losses.masked_fill(~asked, 0).sum()

    images, texts = _clean(images, here), _clean(texts, here)
    total = _in_chunks(missed, images, all_pairs(texts), (scale, bias), chunk)
    return total / global_count(here)


def _in_chunks(
    missed: Callable[..., Tensor], rows: Tensor, others: Tensor, numbers: Any, chunk: int
) -> Tensor:
    """Return the sum of `missed` over chunks of rows; backward computes each chunk again."""
    total = rows.new_zeros(())
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        total = total + checkpoint(missed, part, others, *numbers, start, use_reentrant=False)
    return total


def _checked(
    images: Tensor, texts: Tensor, present: Tensor | None, chunk: int
) -> tuple[Tensor, Callable[[Tensor], Tensor], int]:
    """Return present as bool[N], a gather of [N, ...] to [M, ...], and where N begins in M."""
    checks.whole_number("chunk", chunk, 1, 2**31, "1024 is usual")
    if images.ndim != 2:
        remedy = "flatten(0, 1) what the model returned"
        raise ValueError(checks.sentence("images.ndim", images.ndim, "2 (pairs, channels)", remedy))
    for name, found, wanted in (
        ("texts.shape", texts.shape, images.shape),
        ("present.shape", images.shape[:1] if present is None else present.shape, images.shape[:1]),
    ):
        if found != wanted:
            expected, remedy = f"{tuple(wanted)}, as images has it", "give one row a pair"
            raise ValueError(checks.sentence(name, tuple(found), expected, remedy))
    if present is None:
        present = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if not has_group():
        return present, lambda rows: rows, 0
    # Ranks must have equally many rows, absent ones included: all_gather takes one shape.
    return present, _Gather.apply, torch.distributed.get_rank() * len(images)


def _clean(vectors: Tensor, present: Tensor) -> Tensor:
    # Masked logits are not enough: in the backward pass a gradient of 0 times NaN is NaN.
    return vectors.masked_fill(~present[:, None], 0)


class _Gather(torch.autograd.Function):
    """Gathers all ranks' rows, one after the other; the gradient of a row is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.length = len(rows)
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A row counts in the loss of every rank, and all_gather itself has no gradient.
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        start = torch.distributed.get_rank() * ctx.length
        return gradient[start : start + ctx.length]
