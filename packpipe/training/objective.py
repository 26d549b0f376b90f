"""What a model is trained for: the loss of a batch, what counts in it, and a figure people read.

The loss is chosen by its name (`packpipe.training.losses.LOSSES`), and the labels decide what it
compares: classes, or numbers an image; of a model without pooling, the class of every cell.

Shape letters: B rows, L tokens a row, S segments a row, T cells a token, K classes or channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from packpipe import checks
from packpipe.loading.batch import PackedBatch
from packpipe.model.config import NaViTConfig
from packpipe.model.prefix import check_prefix
from packpipe.rows.labels import label_values
from packpipe.rows.rows import NO_LABEL
from packpipe.training.losses import (
    LOSSES,
    check_labels,
    check_shares,
    counted,
    segment_absolute_error,
    segment_cross_entropy,
    segment_squared_error,
)

if TYPE_CHECKING:  # it imports the checkpoints, which measure models by their objective
    from packpipe.training.train_config import TrainConfig

_REGRESSIONS = (segment_squared_error, segment_absolute_error)


def is_dense(config: NaViTConfig) -> bool:
    """Return whether a model answers for every token or cell, not for every image."""
    return config.pooling == "none"


def labels_in(batch: PackedBatch, config: NaViTConfig) -> Tensor:
    """Return what the outputs of a model are compared with: N is S, or L · T of a dense model.

    Args:
        batch: with labels or, for a dense model, targets; `check_batch` looks at their values.
        config: of the model.

    Returns:
        int64[B, N], -100 for none; or float[B, N, K], NaN for none.

    Raises:
        ValueError: there are no labels; or no targets, or not as many as the model has cells.
    """
    if is_dense(config):
        return _classes(_targets(batch, config))
    labels = batch.labels
    if labels is None:
        remedy = "pack with label_column"
        raise ValueError(checks.sentence("batch.labels", None, "integer labels", remedy))
    return labels


def check_batch(batch: PackedBatch, config: NaViTConfig, loss: Callable[..., Tensor]) -> None:
    """Raise if what a batch, on the CPU, is compared with does not suit a model's outputs.

    Args:
        batch: with labels or, for a dense model, targets.
        config: of the model.
        loss: one of `LOSSES`.

    Raises:
        ValueError: of `labels_in` and `check_comparable`; or the rows have other prefix tokens than
            the model.
    """
    check_prefix(batch, config.prefix_tokens)
    if is_dense(config):
        _check_cells(_targets(batch, config), config.num_classes)
    else:
        check_comparable(labels_in(batch, config), config.num_classes, loss)


def _check_cells(targets: Tensor, num_classes: int | None) -> None:
    """Raise ValueError if a cell has no class of the model; of uint8 or uint16, and as it is.

    A batch has millions of cells.
    """
    cells = targets.numpy()
    # One more is 0 where it was the largest number, that of a cell without a class.
    most = int((cells + cells.dtype.type(1)).max(initial=0)) - 1
    if num_classes is not None and most >= num_classes:
        check_labels(torch.tensor([most]), num_classes)


def check_comparable(labels: Tensor, num_classes: int | None, loss: Callable[..., Tensor]) -> None:
    """Raise if labels cannot be compared with a model's outputs.

    Args:
        labels: int64[...], -100 for none; or float[..., K], NaN for none. On a CPU: on a GPU their
            values are not looked at.
        num_classes: outputs of the model; None of one without a head.
        loss: one of `LOSSES`.

    Raises:
        ValueError: a label is no class of the model, or no share of one; or there are not as many
            numbers a label as outputs; or labels are classes, and the loss is of a regression.
    """
    if not labels.is_floating_point():
        if is_regression(loss):
            expected = "'softmax' or 'sigmoid' with integers as labels, which are classes"
            remedy = "if they are numbers, cast_column them to Value('float32')"
            raise ValueError(checks.sentence("loss", _name_of(loss), expected, remedy))
        if num_classes is not None:
            check_labels(labels, num_classes)
        return
    if num_classes is not None and labels.shape[-1] != num_classes:
        expected, remedy = f"{labels.shape[-1]}, as labels have numbers", "make it with as many"
        raise ValueError(checks.sentence("num_classes", num_classes, expected, remedy))
    if not is_regression(loss):
        check_shares(labels)


def _targets(batch: PackedBatch, config: NaViTConfig) -> Tensor:
    """Return uint8 or uint16[B, L, T], the class of every cell, the largest number for none."""
    targets = batch.targets
    if targets is None:
        expected, remedy = "targets, for a model without pooling", "pack with mask_column"
        raise ValueError(checks.sentence("batch.targets", None, expected, remedy))
    if targets.shape[-1] != config.cells:
        expected = f"{config.cells}, as the model has cells a token"
        remedy = "give it the target_stride of the rows"
        found = targets.shape[-1]
        raise ValueError(checks.sentence("batch.targets.shape[-1]", found, expected, remedy))
    return targets


def _classes(targets: Tensor) -> Tensor:
    """Return int64[B, L · T], the class of every cell, -100 for none."""
    ignored = 255 if targets.dtype == torch.uint8 else 65535
    classes = targets.long().flatten(1)
    return classes.masked_fill(classes == ignored, NO_LABEL)


def by_label(outputs: Tensor) -> Tensor:
    """Return outputs [B, N, K], one for each of `labels_in`, of those [B, S, K] or [B, L, T, K]."""
    return outputs.flatten(1, -2)


@dataclass(frozen=True, eq=False)
class Objective:
    """What a training lowers.

    Attributes:
        loss: one of `LOSSES`.
        label_smoothing: of softmax.
        class_weights: float[K], on the model's device; None is 1 for all.
        dense: whether the model answers for every cell, each of which counts the same.
    """

    loss: Callable[..., Tensor]
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    dense: bool = False

    def counts(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """Return what each image or cell of a batch counts in its loss, for `global_count`."""
        return counted(self.loss, labels, **self._weights(batch, labels))

    def of(self, outputs: Tensor, batch: PackedBatch, labels: Tensor, *, count: Tensor) -> Tensor:
        """Return the loss of a batch; averaged over ranks it is the mean over all their images.

        Args:
            outputs: of the model.
            batch: that they are of, on their device.
            labels: its `labels_in`.
            count: `global_count` of the `counts` of all batches of the step.
        """
        # Under autocast the head gives bfloat16.
        exact = by_label(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
        smoothed = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return self.loss(exact, labels, count=count, **self._weights(batch, labels), **smoothed)

    def _weights(self, batch: PackedBatch, labels: Tensor) -> dict[str, Any]:
        weights = batch.weight
        if weights is not None and self.dense:  # of the image of each cell; 0 in padding
            of_tokens = F.pad(weights, (1, 0)).gather(1, batch.segment_ids.long())
            weights = of_tokens.repeat_interleave(labels.shape[1] // of_tokens.shape[1], 1)
        given = {
            "partners": batch.partners,
            "weights": weights,
            "class_weights": self.class_weights,
        }
        return {name: value for name, value in given.items() if value is not None}


def objective_of(
    config: TrainConfig, packs: Any, model: NaViTConfig, device: torch.device
) -> Objective:
    """Return what a training lowers, once the labels that packs know are found to suit it.

    All ranks know those of all packs, so that none begins where another one would refuse a label.
    What packs do not know before they are read, the labels of a stream and masks, is looked at in
    each batch by `check_batch`, on the rank that has it, which tells the others.

    Args:
        config: which loss, and what classes weigh.
        packs: of the training's loader, whose labels ``class_weights="balanced"`` counts.
        model: its shape.
        device: of the model.

    Raises:
        ValueError: there is not a weight for each class, or classes cannot be counted; or labels
            cannot be compared with the outputs (`check_comparable`), or masks by the loss.
    """
    loss = LOSSES[config.loss]
    labels = None if is_dense(model) else getattr(packs, "labels", None)
    weights: Any = config.class_weights
    num_classes = model.num_classes
    if weights == "balanced":
        weights = _balanced(labels, int(num_classes or 0))
    elif weights is not None and len(weights) != num_classes:
        expected, remedy = f"{num_classes}, one a class", "give one for each output of the model"
        raise ValueError(checks.sentence("len(class_weights)", len(weights), expected, remedy))
    found = None if weights is None else torch.tensor(weights, device=device)
    if is_dense(model) and is_regression(loss):
        expected = "'softmax' or 'sigmoid' without pooling, as masks are of classes"
        raise ValueError(checks.sentence("loss", config.loss, expected, "choose one of them"))
    if labels is not None and len(labels):
        check_comparable(known_labels(labels), num_classes, loss)
    return Objective(loss, config.label_smoothing, found, is_dense(model))


def known_labels(labels: pa.Array) -> Tensor:
    """Return labels that packs know as batches show them: int64[n] or float32[n, K], without nulls.

    Raises:
        TypeError, ValueError: of `packpipe.rows.labels.label_values`.
    """
    return torch.from_numpy(label_values(labels.drop_null()).copy())


def _balanced(labels: pa.Array | None, num_classes: int) -> list[float]:
    """Return images ÷ (classes · images of the class), 1 for a class without any."""
    if labels is None or not pa.types.is_integer(labels.type):
        expected = "a list of numbers, unless packs know the class of each image"
        remedy = "pass class_weights=[...]"
        raise ValueError(checks.sentence("class_weights", "balanced", expected, remedy))
    known = known_labels(labels)
    check_labels(known, num_classes)
    known = known[known != NO_LABEL]
    counts = known.bincount(minlength=num_classes).tolist()
    return [len(known) / (num_classes * count) if count else 1.0 for count in counts]


def _name_of(loss: Callable[..., Tensor]) -> str:
    return next(name for name, one in LOSSES.items() if one is loss)


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


def overlaps(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return int64[K, K], how many cells of each class (first) are answered as each (second).

    Args:
        outputs: float[B, N, K].
        labels: int64[B, N], -100 for none.
    """
    num_classes = outputs.shape[-1]
    known = labels != NO_LABEL
    pairs = labels[known] * num_classes + outputs.argmax(-1)[known]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(found: Tensor) -> float:
    """Return the mean over classes of intersection ÷ union; of classes that are nowhere, none.

    Args:
        found: [K, K], sums of `overlaps`.

    Source: the PASCAL VOC challenge (Everingham et al.), 2010, 4.3 (segmentation accuracy).
    """
    both = found.diagonal().double()
    either = found.sum(0) + found.sum(1) - found.diagonal()
    there = either > 0
    return float((both[there] / either[there]).mean())
