"""Evaluation of a model's answers: accuracy, calibration and cascades.

To compare token budgets, images are resized, and no tokens dropped: let the model answer packs of
the same images with another ``max_tokens``::

    packs = EpochPacks(dataset, 1024, resolution="budget", max_tokens=128)
    accuracy(predict_packs(model, packs))

Source: NaViT 3.5 (budgets), 3.6 (cascades), 3.7 (calibration).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from packpipe import checks
from packpipe.model.predict import Answers
from packpipe.rows.rows import NO_LABEL


def accuracy(answers: Answers) -> float:
    """Return the share of the labelled images whose largest output is that of their label.

    Raises:
        ValueError: there are no labels.
    """
    outputs, labels = _labelled(answers)
    return float((outputs.argmax(-1) == labels).double().mean())


def calibration_error(answers: Answers, *, bins: int = 30) -> float:
    """Return the expected calibration error of the top class: mean |confidence - accuracy|.

    The mean is over bins of equal width in confidence, the largest softmax probability, weighted by
    the images in each.

    Args:
        answers: with labels.
        bins: how many.

    Raises:
        ValueError: there are no labels, or a logit is NaN.
    """
    bins = checks.whole_number("bins", bins, 1, 10**6, "30 is usual")
    outputs, labels = _labelled(answers)
    confidence, chosen = outputs.double().softmax(-1).max(-1)
    if confidence.isnan().any():
        where = int(confidence.isnan().nonzero()[0])
        expected, remedy = "numbers", "look for what made the model give NaN or infinity"
        raise ValueError(checks.sentence(f"logits[{where}]", "NaN", expected, remedy))
    # A confidence of exactly 1 belongs to the last bin.
    bucket = (confidence * bins).long().clamp(max=bins - 1)
    surplus = confidence - (chosen == labels).double()
    # Of a bin with n images, |sum of surplus| is n · |mean confidence - accuracy|.
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, bucket, surplus)
    return float(sums.abs().sum() / len(labels))


class CascadePoint(NamedTuple):
    """A cascade: share of images in its second stage, tokens an image (mean), accuracy."""

    share: float
    tokens: float
    accuracy: float


def cascade(first: Answers, second: Answers, shares: Iterable[float]) -> list[CascadePoint]:
    """Return cost and accuracy of answering the least confident images again with more tokens.

    Args:
        first: answers to all images at few tokens.
        second: answers to the same images at more.
        shares: shares of the images that are answered again, each in [0, 1].

    Returns:
        one point a share. Its tokens count the first stage for all images and the second for those
        answered again, divided by all images.

    Raises:
        ValueError: the two are not of the same images, or there are no labels.
    """
    if not torch.equal(first.example_index, second.example_index):
        found = f"{len(second.example_index)} other images"
        expected = f"the {len(first.example_index)} of first"
        raise ValueError(
            checks.sentence("second.example_index", found, expected, "answer the same dataset")
        )
    outputs, labels = _labelled(first)
    again, _ = _labelled(second)
    counts = labels_known(first)
    # Least confident first; stable, so that equal confidences always give the same order.
    order = outputs.double().softmax(-1).max(-1).values.argsort(stable=True)
    points = []
    for share in shares:
        share = checks.real_number("share", share, "pass a share of the images")
        if not 0 <= share <= 1:
            raise ValueError(checks.sentence("share", share, "a number in [0, 1]", "pass a share"))
        hardest = order[: round(share * len(order))]
        chosen = outputs.argmax(-1)
        chosen[hardest] = again[hardest].argmax(-1)
        tokens = first.seq_lens[counts].sum() + second.seq_lens[counts][hardest].sum()
        right = float((chosen == labels).double().mean())
        points.append(CascadePoint(share, float(tokens) / len(labels), right))
    return points


def labels_known(answers: Answers) -> Tensor:
    """Return bool[n], which images have a label; ValueError without any labels."""
    if answers.labels is None:
        remedy = "pack with label_column"
        raise ValueError(checks.sentence("answers.labels", None, "integer labels", remedy))
    return answers.labels != NO_LABEL


def _labelled(answers: Answers) -> tuple[Tensor, Tensor]:
    known = labels_known(answers)
    if not known.any():
        raise ValueError(checks.sentence("labels", "none", "one label at least", "pass images"))
    assert answers.labels is not None  # noqa: S101 (for the type checker)
    return answers.outputs[known], answers.labels[known]
