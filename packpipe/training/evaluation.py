"""Evaluation: accuracy, calibration and cascades of what a model answered.

At any token budget by resizing, never by dropping: answer the packs of the same images at another
``max_tokens`` and compare::

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
from packpipe.loading.batch import NO_LABEL
from packpipe.model.predict import Answers


def accuracy(answers: Answers) -> float:
    """Return the share of labelled images whose largest output is that of their label.

    Raises:
        ValueError: there are no labels.
    """
    outputs, labels = _labelled(answers)
    return float((outputs.argmax(-1) == labels).double().mean())


def calibration_error(answers: Answers, *, bins: int = 30) -> float:
    """Return the expected calibration error of the top class: mean |confidence - accuracy|.

    Over bins of equal width in confidence, which is the largest softmax probability; each counts
    by the images in it.

    Args:
        answers: with labels.
        bins: how many.

    Raises:
        ValueError: there are no labels.
    """
    bins = checks.whole_number("bins", bins, 1, 10**6, "30 is usual")
    outputs, labels = _labelled(answers)
    confidence, chosen = outputs.double().softmax(-1).max(-1)
    bucket = (confidence * bins).long().clamp(max=bins - 1)
    surplus = confidence - (chosen == labels).double()
    sums = torch.zeros(bins, dtype=torch.float64).index_add(0, bucket, surplus)
    return float(sums.abs().sum() / len(labels))


class CascadePoint(NamedTuple):
    """A cascade that sends some images to the second stage: its cost and its accuracy."""

    share: float
    tokens: float
    accuracy: float


def cascade(first: Answers, second: Answers, shares: Iterable[float]) -> list[CascadePoint]:
    """Return what it costs and gives to ask again about the images the model is least sure of.

    Args:
        first: answers to all images at few tokens.
        second: answers to the same images at more.
        shares: of the images that are asked again, each in [0, 1]; the least confident ones.

    Returns:
        a point a share; tokens an image are those of the first and the share's of the second.

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
    """Return bool[n], which images have a label."""
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
