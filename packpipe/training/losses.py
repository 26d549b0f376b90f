"""Losses, averaged over examples, not over rows or tokens.

Every image counts the same, whichever row it is in and however many images share it, unless it has
a weight: then the mean is the weighted one, Σ weight · loss ÷ Σ weight. Ranks hold different
numbers of images; with ``count=global_count(counted(labels, ...))`` the mean over ranks, which DDP
takes of gradients, is the mean over all images. So do micro-batches: with
``count=global_count(*those of all micro-batches)`` their gradients add up to that of one batch.

Labels are numbers of classes, -100 for an image that does not count; or K numbers an image, NaN
for each that is missing. What is missing has neither an effect nor a gradient.

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
# Where images have weights, those of a batch are of mixtures, so that each half weighs its own.
Partners: TypeAlias = tuple[Tensor, Tensor]


def segment_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: Tensor | None = None,
    label_smoothing: float = 0.0,
    partners: Partners | None = None,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean softmax cross-entropy over the segments that have a label; 0 if none has.

    Args:
        logits: float[B, S, K].
        labels: int64[B, S], -100 for segments that do not count; or float[B, S, K], the share of
            each class, of which a segment counts if it knows them all.
        count: what the sum is divided by; None is the sum of `counted`.
        label_smoothing: share of each target that is spread evenly over all K classes, in [0, 1).
        partners: of mixed images, see `Partners`: each loss is weight · loss(label) + (1 - weight)
            · loss(partner's label).
        weights: float[B, S], of each image; None is 1 for all.
        class_weights: float[K], of the images of each class, by which those are multiplied.

    Raises:
        ValueError: a label is no class, or a share is outside [0, 1], on a CPU; or label_smoothing
            is out of range; or partners or class_weights are given with shares.

    Source: Szegedy et al., arXiv 1512.00567, 7 (label smoothing).
    """
    check_label_smoothing(label_smoothing)

    def each(logits: Tensor, targets: Tensor) -> Tensor:
        flat = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(0, 1),
            reduction="none",
            label_smoothing=label_smoothing,
            ignore_index=NO_LABEL,
        )
        return flat.view(logits.shape[:2])

    if labels.is_floating_point():
        _check_shares(labels, logits, partners, class_weights)
        present = ~labels.isnan().any(-1)
        found = each(_where(present, logits), _where(present, labels).to(logits.dtype))
        return _mean(found, present, count, weights)
    _check_classes(labels, partners, logits.shape[-1])
    # Logits that do not count may be infinite or NaN, and in backward 0 times that is NaN.
    logits = _where(labels != NO_LABEL, logits)
    terms = _terms(labels, partners, weights, class_weights)
    return _sum_of(terms, [each(logits, own) for own, _ in terms], count)


def segment_sigmoid_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    present: Tensor | None = None,
    count: Tensor | None = None,
    partners: Partners | None = None,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the sigmoid cross-entropy, summed over classes, averaged over segments.

    Args:
        logits: float[B, S, K].
        labels: int64[B, S], -100 for segments that do not count; or float[B, S, K], each class's
            share in [0, 1], for several labels an image: classes that are NaN are left out, and a
            segment counts that knows one at least. Such may be integers or bools as well.
        present: bool[B, S], which segments count of those that have a label; None is all of them.
        count: what the sum is divided by; None is the sum of `counted`.
        partners: of mixed images, see `Partners`: a target is a share of each of the two labels.
        weights: float[B, S], of each image; None is 1 for all.
        class_weights: float[K], of the images of each class, by which those are multiplied.

    Raises:
        ValueError: a label is no class, or a share is outside [0, 1], on a CPU; or partners or
            class_weights are given with shares.

    Source: NaViT 3 (classification).
    """

    def each(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    if labels.is_floating_point() or labels.ndim == logits.ndim:
        labels = labels.to(torch.promote_types(labels.dtype, logits.dtype))
        _check_shares(labels, logits, partners, class_weights)
        known = ~labels.isnan() if present is None else ~labels.isnan() & present[..., None]
        found = each(logits.masked_fill(~known, 0), labels.masked_fill(~known, 0).to(logits.dtype))
        return _mean(found.masked_fill(~known, 0).sum(-1), known.any(-1), count, weights)
    present = labels != NO_LABEL if present is None else present & (labels != NO_LABEL)
    labels = labels.masked_fill(~present, NO_LABEL)
    _check_classes(labels, partners, logits.shape[-1])
    logits = _where(present, logits)
    classes = torch.arange(logits.shape[-1], device=logits.device)

    def of_classes(targets: Tensor) -> Tensor:
        # Not one_hot, which takes no -100; here such a label is no class at all.
        return each(logits, (targets[..., None] == classes).to(logits.dtype)).sum(-1)

    terms = _terms(labels, partners, weights, class_weights)
    return _sum_of(terms, [of_classes(own) for own, _ in terms], count)


def segment_squared_error(
    outputs: Tensor,
    targets: Tensor,
    *,
    present: Tensor | None = None,
    count: Tensor | None = None,
    weights: Tensor | None = None,
    partners: Partners | None = None,
) -> Tensor:
    """Return the squared error, averaged over channels and over segments.

    Args:
        outputs: float[B, S, K].
        targets: float[B, S, K]; channels that are NaN are left out, and a segment counts that knows
            one at least.
        present: bool[B, S], which segments count of those; None is all of them.
        count: what the sum is divided by; None is the sum of `counted`.
        weights: float[B, S], of each image; None is 1 for all.
        partners: None; numbers of mixed images are mixed when rows are (`packpipe.augmenting`).

    Raises:
        ValueError: the shapes differ; torch would broadcast them.
    """
    return _error(torch.square, outputs, targets, present, count, weights, partners)


def segment_absolute_error(
    outputs: Tensor,
    targets: Tensor,
    *,
    present: Tensor | None = None,
    count: Tensor | None = None,
    weights: Tensor | None = None,
    partners: Partners | None = None,
) -> Tensor:
    """Return the absolute error, averaged over channels and over segments.

    Arguments and errors are those of `segment_squared_error`.
    """
    return _error(torch.abs, outputs, targets, present, count, weights, partners)


def _error(
    size: Callable[[Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
    present: Tensor | None,
    count: Tensor | None,
    weights: Tensor | None,
    partners: Partners | None,
) -> Tensor:
    """Return the mean over segments of the mean size of their known errors."""
    _check_shape("targets", targets, outputs)
    _refuse("partners", partners)
    known = ~targets.isnan() if present is None else ~targets.isnan() & present[..., None]
    apart = outputs.masked_fill(~known, 0) - targets.masked_fill(~known, 0)
    mean = size(apart).sum(-1) / known.sum(-1).clamp(min=1)
    return _mean(mean, known.any(-1), count, weights)


def counted(
    loss: Callable[..., Tensor],
    labels: Tensor,
    *,
    partners: Partners | None = None,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return what each segment counts in a loss, for `global_count`: bool[B, S], or its weight.

    Args:
        loss: one of `LOSSES`.
        labels: int64[B, S], -100 for none; or float[B, S, K], NaN for none.
        partners: of mixed images, see `Partners`.
        weights: float[B, S], of each image; None is 1 for all.
        class_weights: float[K], of the images of each class; None is 1 for all.
    """
    if labels.is_floating_point():
        missing = labels.isnan()
        present = ~(missing.any(-1) if loss is segment_cross_entropy else missing.all(-1))
        return present if weights is None else weights.masked_fill(~present, 0)
    present = labels != NO_LABEL
    if weights is None and class_weights is None:
        return present
    return torch.stack(
        [weight for _, weight in _terms(labels, partners, weights, class_weights)]
    ).sum(0)


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
    """Return the examples of all ranks ÷ ranks, 1 ÷ ranks if there is none: divide each sum by it.

    The mean over W ranks of S_r ÷ (N ÷ W) is the sum over all N examples ÷ N. Without
    torch.distributed it is the number of examples here, 1 if there is none.

    Args:
        present: bool[...], which examples count here; or float[...], their weights (`counted`).
        more: those of further micro-batches, if gradients of several are accumulated. All ranks
            call this once a step, before the first backward.
    """
    number = torch.stack([each.sum() for each in (present, *more)]).sum().to(torch.float32)
    if not has_group():
        return _not_zero(number)
    torch.distributed.all_reduce(number)  # sums over ranks, in place
    return _not_zero(number) / torch.distributed.get_world_size()


def _terms(
    labels: Tensor,
    partners: Partners | None,
    weights: Tensor | None,
    class_weights: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Return the classes that segments have, two of mixed images, and what each weighs in the loss.

    Both are [B, S]; where there is no such class, it is -100 and weighs 0.
    """
    terms = [(labels, torch.ones(labels.shape, device=labels.device))]
    if partners is not None:
        others, shares = partners
        mixed = (labels != NO_LABEL) & (others != NO_LABEL)
        shares = shares.masked_fill(~mixed, 1)
        terms = [(labels, shares), (others.masked_fill(~mixed, NO_LABEL), 1 - shares)]
    found = []
    for own, share in terms:
        for factor in (weights, None if class_weights is None else class_weights[own.clamp(min=0)]):
            share = share if factor is None else share * factor
        found.append((own, share.masked_fill(own == NO_LABEL, 0)))
    return found


def _sum_of(
    terms: list[tuple[Tensor, Tensor]], losses: list[Tensor], count: Tensor | None
) -> Tensor:
    """Return the weighted sum of the losses of all terms, divided by the count."""
    sums = [(weight * each).sum() for (_, weight), each in zip(terms, losses, strict=True)]
    if count is None:
        count = _not_zero(torch.stack([weight.sum() for _, weight in terms]).sum())
    return torch.stack(sums).sum() / count


def _mean(each: Tensor, present: Tensor, count: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return the weighted sum of the losses of present segments, divided by the count."""
    weights = present.to(each.dtype) if weights is None else weights.masked_fill(~present, 0)
    total = (weights * each.masked_fill(~present, 0)).sum()
    return total / (_not_zero(weights.sum()) if count is None else count)


def _check_classes(labels: Tensor, partners: Partners | None, num_classes: int) -> None:
    for classes in (labels, *(() if partners is None else partners[:1])):
        check_labels(classes, num_classes)


def _check_shares(
    labels: Tensor, logits: Tensor, partners: Partners | None, class_weights: Tensor | None
) -> None:
    """Raise ValueError if labels are no shares of classes, as far as they are known on the CPU."""
    _check_shape("labels", labels, logits)
    _refuse("partners", partners)
    _refuse("class_weights", class_weights)
    check_shares(labels)


def check_shares(labels: Tensor) -> None:
    """Raise ValueError if a label is no share of a class, in [0, 1]; NaN is none that is known.

    Labels on a GPU are not looked at, since reading one back stalls it.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels < 0) | (labels > 1)]
    if len(wrong):
        remedy = "choose the loss mse or l1 for numbers that are no shares of classes"
        raise ValueError(checks.sentence("a label", float(wrong[0]), "in [0, 1], or NaN", remedy))


def _check_shape(name: str, labels: Tensor, outputs: Tensor) -> None:
    if labels.shape != outputs.shape:
        expected = f"{tuple(outputs.shape)} (outputs.shape)"
        found, remedy = tuple(labels.shape), "give one number a channel"
        raise ValueError(checks.sentence(f"{name}.shape", found, expected, remedy))


def _refuse(name: str, given: object) -> None:
    if given is not None:
        expected, remedy = "None with numbers as labels", "only classes have them"
        raise ValueError(checks.sentence(name, "given", expected, remedy))


def _where(present: Tensor, values: Tensor) -> Tensor:
    """Return values with 0 where absent, so that whatever is there has no effect or gradient."""
    return values.masked_fill(~present[..., None], 0)


def _not_zero(total: Tensor) -> Tensor:
    """Return what sums are divided by: 1 where nothing counts."""
    return torch.where(total > 0, total, torch.ones_like(total))


# By name: what `TrainConfig.loss` may be. Those of classes take numbers as labels, too: shares of
# classes ("softmax"), or several labels an image ("sigmoid").
LOSSES: dict[str, Callable[..., Tensor]] = {
    "softmax": segment_cross_entropy,
    "sigmoid": segment_sigmoid_cross_entropy,
    "mse": segment_squared_error,
    "l1": segment_absolute_error,
}
