"""Losses, averaged over examples, not over rows or tokens.

Every image counts the same, whichever row it is in and however many images share it. Ranks hold
different numbers of images; with ``count=global_count(present)`` the mean over ranks, which DDP
takes of gradients, is the mean over all images. So do micro-batches: with
``count=global_count(*those of all micro-batches)`` their gradients add up to that of one batch.

Shape letters: B rows, S segments a row, K classes or channels. Without pooling S is L, the tokens.

Source: Krell 3.2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from packpipe import checks
from packpipe.loading.ranks import has_group
from packpipe.rows.rows import NO_LABEL

# Of mixed images, `PackedBatch.partners`: int64[B, S], the label of the image that each is mixed
# with, -100 for none; and float[B, S], the weight of its own label, of no effect without a partner.
Partners: TypeAlias = tuple[Tensor, Tensor]


def segment_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: Tensor | None = None,
    label_smoothing: float = 0.0,
    partners: Partners | None = None,
) -> Tensor:
    """Return the mean softmax cross-entropy over the segments that have a label; 0 if none has.

    Args:
        logits: float[B, S, K].
        labels: int64[B, S], -100 for segments that do not count.
        count: what the sum is divided by; None is the number of segments with a label.
        label_smoothing: share of each target that is spread evenly over all K classes, in [0, 1).
        partners: of mixed images, see `Partners`: each loss is weight · loss(label) + (1 - weight)
            · loss(partner's label).

    Raises:
        ValueError: a label is no class, on a CPU; or label_smoothing is out of range.

    Source: Szegedy et al., arXiv 1512.00567, 7 (label smoothing).
    """
    check_label_smoothing(label_smoothing)
    check_labels(labels, logits.shape[-1])
    present = labels != NO_LABEL
    # Logits that do not count may be infinite or NaN, and in backward 0 times that is NaN.
    flat = _where(present, logits).flatten(0, 1)

    def against(targets: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(
            flat,
            targets.flatten(),
            ignore_index=NO_LABEL,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    if partners is None:
        return against(labels, "sum") / _divisor(present, count)
    others, weights = _checked_partners(partners, logits, present)
    weights = weights.flatten()
    each = weights * against(labels, "none") + (1 - weights) * against(others, "none")
    return each.sum() / _divisor(present, count)


def segment_sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    present: Tensor | None = None,
    count: Tensor | None = None,
    partners: Partners | None = None,
) -> Tensor:
    """Return the sigmoid cross-entropy, summed over classes, averaged over segments.

    Args:
        logits: float[B, S, K].
        labels: int64[B, S], -100 for segments that do not count; or float[B, S, K], each class's
            share in [0, 1], for several labels or mixed images.
        present: bool[B, S], which segments count; None is those whose label is not -100.
        count: what the sum is divided by; None is the number of segments that count.
        partners: of mixed images, see `Partners`: a target is a share of each of the two labels.

    Raises:
        ValueError: labels for each class are passed without present, or with partners; or a label
            is no class, on a CPU.

    Source: NaViT 3 (classification).
    """
    if labels.ndim == logits.ndim:
        if present is None:
            expected, remedy = "bool[B, S] with labels for each class", "pass batch.present"
            raise ValueError(checks.sentence("present", None, expected, remedy))
        if partners is not None:
            expected, remedy = "None with labels for each class", "mix those"
            raise ValueError(checks.sentence("partners", "given", expected, remedy))
        targets = labels.to(logits.dtype)
    else:
        present = labels != NO_LABEL if present is None else present & (labels != NO_LABEL)
        check_labels(labels.masked_fill(~present, NO_LABEL), logits.shape[-1])
        classes = torch.arange(logits.shape[-1], device=logits.device)
        # Not one_hot, which takes no -100; here such a label is no class at all.
        targets = (labels[..., None] == classes).to(logits.dtype)  # [B, S, K]
        if partners is not None:
            others, weights = _checked_partners(partners, logits, present)
            other = (others[..., None] == classes).to(logits.dtype)
            targets = torch.lerp(other, targets, weights[..., None])
    each = F.binary_cross_entropy_with_logits(
        _where(present, logits), _where(present, targets), reduction="none"
    )
    return _where(present, each).sum() / _divisor(present, count)


def segment_squared_error(
    outputs: Tensor, targets: Tensor, *, present: Tensor, count: Tensor | None = None
) -> Tensor:
    """Return the squared error, averaged over channels and over segments.

    Args:
        outputs: float[B, S, K].
        targets: float[B, S, K].
        present: bool[B, S], which segments count.
        count: what the sum is divided by; None is the number of segments that count.

    Raises:
        ValueError: the shapes differ; torch would broadcast them.
    """
    if outputs.shape != targets.shape:
        expected = f"{tuple(outputs.shape)} (outputs.shape)"
        found, remedy = tuple(targets.shape), "give one number a channel"
        raise ValueError(checks.sentence("targets.shape", found, expected, remedy))
    error = _where(present, outputs) - _where(present, targets)
    return error.square().mean(-1).sum() / _divisor(present, count)


def check_label_smoothing(value: float) -> float:
    """Return the share of a target that is spread over all classes, if it is in [0, 1)."""
    remedy = "0.1 is usual, 0 is none"
    share = checks.real_number("label_smoothing", value, remedy)
    if not 0 <= share < 1:
        raise ValueError(checks.sentence("label_smoothing", share, "in [0, 1)", remedy))
    return float(share)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise if a label is no class: a sigmoid loss would train on it in silence.

    Labels on a GPU are not looked at, since reading one back stalls it.

    Args:
        labels: int64[...], -100 for what does not count.
        num_classes: K.

    Raises:
        ValueError: names the first wrong one.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        expected = f"0..{num_classes - 1}, or {NO_LABEL} for a segment that does not count"
        remedy = "give the model as many classes as the labels have"
        raise ValueError(checks.sentence("a label", int(wrong[0]), expected, remedy))


def global_count(present: Tensor, *more: Tensor) -> Tensor:
    """Return the examples of all ranks ÷ ranks, at least 1 ÷ ranks: divide each rank's sum by it.

    The mean over W ranks of S_r ÷ (N ÷ W) is the sum over all N examples ÷ N. Without
    torch.distributed it is the number of examples here, at least 1.

    Args:
        present: bool[...], which examples count here.
        more: those of further micro-batches, if gradients of several are accumulated. All ranks
            call this once a step, before the first backward.
    """
    number = torch.stack([each.sum() for each in (present, *more)]).sum().to(torch.float32)
    if not has_group():
        return number.clamp(min=1)
    torch.distributed.all_reduce(number)  # sums over ranks, in place
    return number.clamp(min=1) / torch.distributed.get_world_size()


def _checked_partners(partners: Partners, logits: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partners' labels and the weights of the own ones, -100 and 1 where none counts.

    Raises:
        ValueError: a label is no class, on a CPU.
    """
    labels, weights = partners
    check_labels(labels, logits.shape[-1])
    counts = present & (labels != NO_LABEL)
    return labels.masked_fill(~counts, NO_LABEL), weights.to(logits.dtype).masked_fill(~counts, 1)


def _where(present: Tensor, values: Tensor) -> Tensor:
    """Return values with 0 where absent, so that whatever is there has no effect or gradient."""
    return values.masked_fill(~present[..., None], 0)


def _divisor(present: Tensor, count: Tensor | None) -> Tensor:
    return present.sum().clamp(min=1) if count is None else count


LOSSES: dict[str, Callable[..., Tensor]] = {
    "softmax": segment_cross_entropy,
    "sigmoid": segment_sigmoid_cross_entropy,
}
