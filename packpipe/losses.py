"""Losses: averaged over examples, not over rows or tokens (floor 2, torch)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from packpipe.batch import NO_LABEL


def segment_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the segments that have a label; 0 if none has.

    Every image counts the same, whichever row it is in and however many share it.

    Args:
        logits: float[B, S, classes].
        labels: int64[B, S], -100 for segments that do not count.

    Source: Krell 3.2.3.
    """
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
    return total / (labels != NO_LABEL).sum().clamp(min=1)
