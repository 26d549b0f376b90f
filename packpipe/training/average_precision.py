"""Mean average precision: how well a model ranks images by each of several labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Return the mean over classes of the average precision of each.

    Of a class, the images are ranked by their score. Each threshold, of which equal scores share
    one, finds some: average precision is Σ (gain in recall) · precision, without interpolation, as
    scikit-learn's ``average_precision_score`` has it. O(n log n) a class.

    Args:
        scores: float[n, K].
        labels: float[n, K], above 0.5 where an image has the label, NaN where nobody knows.

    Returns:
        The mean over classes that an image is known to have; None without any, NaN if a score is.

    Source: the PASCAL VOC challenge (Everingham et al.), 2010, 4.2, without its interpolation.
    """
    found = []
    for own, wanted in zip(scores.double().unbind(1), labels.unbind(1), strict=True):
        known = ~wanted.isnan()
        has = wanted[known] > 0.5
        if has.any():
            found.append(_average_precision(own[known], has))
    return sum(found) / len(found) if found else None


def _average_precision(scores: Tensor, has: Tensor) -> float:
    if scores.isnan().any():
        return math.nan
    scores, order = scores.sort(descending=True)
    # Of equal scores the last, since a threshold finds all of them.
    is_last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    found = has[order].double().cumsum(0)[is_last]
    precision = found / (is_last.nonzero()[:, 0] + 1)
    gains = found.diff(prepend=found.new_zeros(1)) / found[-1]
    return float((gains * precision).sum())
