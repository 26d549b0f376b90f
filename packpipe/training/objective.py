"""What a model is trained for: the loss of a batch, what counts in it, and a figure people read.

The loss is chosen by its name (`packpipe.training.losses.LOSSES`), and the labels decide what it
compares: classes, or numbers an image.

Shape letters: B rows, S segments a row, K classes or channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.rows.labels import label_values
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


@dataclass(frozen=True, eq=False)
class Objective:
    """What a training lowers.

    Attributes:
        loss: one of `LOSSES`.
        label_smoothing: of softmax.
        class_weights: float[K], on the model's device; None is 1 for all.
    """

    loss: Callable[..., Tensor]
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None

    def counts(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """Return what each image of a batch counts in its loss, for `global_count`."""
        return counted(self.loss, labels, **self._weights(batch))

    def of(self, outputs: Tensor, batch: PackedBatch, labels: Tensor, *, count: Tensor) -> Tensor:
        """Return the loss of a batch; averaged over ranks it is the mean over all their images.

        Args:
            outputs: of the model, float[B, S, K].
            batch: that they are of, on their device.
            labels: its `labels_in`.
            count: `global_count` of the `counts` of all batches of the step.
        """
        # Under autocast the head gives bfloat16.
        exact = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        smoothed = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return self.loss(exact, labels, count=count, **self._weights(batch), **smoothed)

    def _weights(self, batch: PackedBatch) -> dict[str, Any]:
        given = {
            "partners": batch.partners,
            "weights": batch.weight,
            "class_weights": self.class_weights,
        }
        return {name: value for name, value in given.items() if value is not None}


def objective_of(
    config: TrainConfig, packs: Any, num_classes: int | None, device: torch.device
) -> Objective:
    """Return what a training lowers.

    Args:
        config: which loss, and what classes weigh.
        packs: of the training's loader, whose labels ``class_weights="balanced"`` counts.
        num_classes: outputs of the model.
        device: of the model.

    Raises:
        ValueError: there is not a weight for each class, or classes cannot be counted.
    """
    weights: Any = config.class_weights
    if weights == "balanced":
        weights = _balanced(packs, int(num_classes or 0))
    elif weights is not None and len(weights) != num_classes:
        expected, remedy = f"{num_classes}, one a class", "give one for each output of the model"
        raise ValueError(checks.sentence("len(class_weights)", len(weights), expected, remedy))
    found = None if weights is None else torch.tensor(weights, device=device)
    return Objective(LOSSES[config.loss], config.label_smoothing, found)


def _balanced(packs: Any, num_classes: int) -> list[float]:
    """Return images ÷ (classes · images of the class), 1 for a class without any."""
    labels = getattr(packs, "labels", None)
    if labels is None or not pa.types.is_integer(labels.type):
        expected = "a list of numbers, unless packs know the class of each image"
        remedy = "pass class_weights=[...]"
        raise ValueError(checks.sentence("class_weights", "balanced", expected, remedy))
    known = torch.from_numpy(label_values(labels.drop_null()).copy())
    check_labels(known, num_classes)
    known = known[known != NO_LABEL]
    counts = known.bincount(minlength=num_classes).tolist()
    return [len(known) / (num_classes * count) if count else 1.0 for count in counts]


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
