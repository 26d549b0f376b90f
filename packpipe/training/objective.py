"""What a model is trained for: the loss of a batch, what counts in it, and a figure people read.

The loss is chosen by its name (`packpipe.training.losses.LOSSES`), and the labels decide what it
compares: classes, or numbers an image.

Shape letters: B rows, S segments a row, K classes or channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.rows.rows import NO_LABEL
from packpipe.training.losses import (
    LOSSES,
    check_labels,
    counted,
    segment_absolute_error,
    segment_cross_entropy,
    segment_squared_error,
)

if TYPE_CHECKING:  # it imports the checkpoints, which measure models by their objective
    from packpipe.training.train_config import TrainConfig

_REGRESSIONS = (segment_squared_error, segment_absolute_error)


def labels_in(batch: PackedBatch, num_classes: int | None) -> Tensor:
    """Return the labels of a batch: int64[B, S], -100 for none; or float[B, S, K], NaN for none.

    Args:
        batch: with labels; on the CPU they are checked.
        num_classes: of the model.

    Raises:
        ValueError: there are no labels, or one is no class of the model.
    """
    labels = batch.labels
    if labels is None:
        remedy = "pack with label_column"
        raise ValueError(checks.sentence("batch.labels", None, "integer labels", remedy))
    if num_classes is not None and not labels.is_floating_point():
        check_labels(labels, num_classes)
    return labels


def counts_in(batch: PackedBatch, labels: Tensor, config: TrainConfig) -> Tensor:
    """Return what each image of a batch counts in its loss, for `global_count`."""
    return counted(LOSSES[config.loss], labels, **_options(batch))


def loss_of(
    outputs: Tensor, batch: PackedBatch, labels: Tensor, config: TrainConfig, *, count: Tensor
) -> Tensor:
    """Return the loss of a batch; averaged over ranks it is the mean over the images of all ranks.

    Args:
        outputs: of the model, float[B, S, K].
        batch: that they are of, on their device.
        labels: its `labels_in`.
        config: which loss.
        count: `global_count` of the `counts_in` of all batches of the step.
    """
    # Under autocast the head gives bfloat16.
    exact = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    smoothed = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    return LOSSES[config.loss](exact, labels, count=count, **_options(batch), **smoothed)


def _options(batch: PackedBatch) -> dict[str, Any]:
    return {"partners": batch.partners}


def is_regression(loss: Callable[..., Tensor]) -> bool:
    """Return whether a loss compares numbers with numbers, not with classes."""
    return loss in _REGRESSIONS


def agreement(
    loss: Callable[..., Tensor], outputs: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of a figure that people read, and over how many it is: its mean is the ratio.

    * Of classes, the images whose largest output is that of their label: the accuracy.
    * Of shares of classes (softmax), those whose largest output is that of the largest share.
    * Of several labels an image (sigmoid), the labels whose output has the right sign, of all that
      are known: 1 - the Hamming loss.
    * Of a regression, the absolute errors of all numbers that are known.

    Args:
        loss: one of `LOSSES`.
        outputs: float[B, S, K].
        labels: int64[B, S], -100 for none; or float[B, S, K], NaN for none.
    """
    if not labels.is_floating_point():
        return (outputs.argmax(-1) == labels).sum(), (labels != NO_LABEL).sum()
    known = ~labels.isnan()
    if is_regression(loss):
        return (outputs - labels).abs().masked_fill(~known, 0).sum(), known.sum()
    if loss is segment_cross_entropy:
        known = known.all(-1)
        right = outputs.argmax(-1) == labels.nan_to_num().argmax(-1)
    else:
        right = (outputs > 0) == (labels > 0.5)
    return (right & known).sum(), known.sum()
