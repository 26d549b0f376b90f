"""Evaluation of a model's answers: accuracy, calibration and cascades.

To compare token budgets, images are resized, and no tokens dropped: let the model answer packs of
the same images with another ``max_tokens``::

    packs = EpochPacks(dataset, 1024, resolution="budget", max_tokens=128)
    accuracy(predict_packs(model, packs))

`measure` gives loss, accuracy and calibration in one pass over a loader, and keeps no answers.

Source: NaViT 3.5 (budgets), 3.6 (cascades), 3.7 (calibration).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

from packpipe import checks
from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import has_group, together
from packpipe.model.predict import Answers, Model
from packpipe.rows.rejects import TooManyRejects
from packpipe.rows.rows import NO_LABEL
from packpipe.training.average_precision import mean_average_precision
from packpipe.training.losses import counted, segment_sigmoid_cross_entropy
from packpipe.training.objective import (
    agreement,
    by_label,
    check_batch,
    check_comparable,
    is_dense,
    is_regression,
    known_labels,
    labels_in,
    mean_iou,
    overlaps,
)

_BINS = 30
# Outputs and labels of batches, each float[n, K], of which images are ranked.
_Ranked: TypeAlias = list[tuple[Tensor, Tensor]]


def accuracy(answers: Answers) -> float:
    """Return the share of the labelled images whose largest output is that of their label.

    Raises:
        ValueError: there are no labels, or they are no classes: `measure` takes others, too.
    """
    outputs, labels = _labelled(answers)
    return float((outputs.argmax(-1) == labels).double().mean())


def calibration_error(answers: Answers, *, bins: int = _BINS) -> float:
    """Return the expected calibration error of the top class: mean |confidence - accuracy|.

    The mean is over bins of equal width in confidence, the largest softmax probability, weighted by
    the images in each.

    Args:
        answers: with labels.
        bins: how many.

    Raises:
        ValueError: there are no labels, or they are no classes, or a logit is NaN.
    """
    bins = checks.whole_number("bins", bins, 1, 10**6, "30 is usual")
    outputs, labels = _labelled(answers)
    sums = _surplus(outputs, labels, bins)
    if sums.isnan().any():
        where = int(outputs.double().softmax(-1).isnan().any(-1).nonzero()[0])
        expected, remedy = "numbers", "look for what made the model give NaN or infinity"
        raise ValueError(checks.sentence(f"logits[{where}]", "NaN", expected, remedy))
    return float(sums.abs().sum() / len(labels))


def _surplus(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return float64[bins], Σ (confidence - whether it is right) of the images in each bin.

    Of a bin with n images, its absolute value is n · |mean confidence - accuracy|. One NaN makes a
    bin NaN.
    """
    confidence, chosen = logits.double().softmax(-1).max(-1)
    # A confidence of exactly 1 belongs to the last bin.
    bucket = (confidence.nan_to_num() * bins).long().clamp(max=bins - 1)
    surplus = confidence - (chosen == labels).double()
    return surplus.new_zeros(bins).index_add(0, bucket, surplus)


class Measures(NamedTuple):
    """How good a model is on some images.

    Attributes:
        loss: mean over the labelled images.
        accuracy: share of them whose largest output is that of their label; what it is of numbers
            as labels, `packpipe.training.objective.agreement` says. None of a regression.
        ece: expected calibration error, see `calibration_error`; None unless labels are classes.
        num_images: labelled images; of a model without pooling, all of them.
        error: of a regression, the mean absolute error of all numbers; else None.
        iou: of a model without pooling, whose loss and accuracy are of cells, the `mean_iou`.
        mean_ap: of several labels an image, the `mean_average_precision`.
    """

    loss: float
    accuracy: float | None
    ece: float | None
    num_images: int
    error: float | None = None
    iou: float | None = None
    mean_ap: float | None = None


def measure(
    model: Model,
    loader: PackedLoader,
    loss: Callable[..., Tensor],
    *,
    half: bool = False,
    called: str | None = None,
) -> Measures:
    """Return loss, accuracy and calibration error of a model on one pass of a loader.

    Under torch.distributed every rank measures its share of the packs, and all are told the figures
    of the whole; they call it together. Nothing random is drawn. Of several labels an image, all
    outputs and labels of the pass are kept, on every rank, since images are ranked by them.

    Args:
        model: with its weights, on its device, with an output a class and an image or, without
            pooling, a class and a cell.
        loader: with ``tail="pad"``, so that no image is left out. Its pass is used up.
        loss: one of `packpipe.training.losses.LOSSES`.
        half: whether matrix products run in bfloat16.
        called: what an error calls the images, of which too many cannot be decoded; it then holds
            no rejects, whose numbers could be taken for those of other images.

    Raises:
        TooManyRejects: a ValueError; too many images cannot be decoded.
        TypeError, ValueError: the loader leaves images out, changes them or makes no tensors, there
            is no label, or a label is no class.
    """
    check_measurable(model, loader, loss)
    device = next(model.parameters()).device

    def summed() -> tuple[Tensor, _Ranked]:
        try:
            return _sums(model, loader, loss, device, half)
        except TooManyRejects as error:
            if called is None:
                raise
            raise TooManyRejects(f"of {called}, {error}", []) from error

    # Sums, not means: ranks hold different numbers of images, and are weighed by them.
    sums, ranked = together(summed)
    if has_group():
        torch.distributed.all_reduce(sums)
        ranked = _of_all_ranks(ranked)
    total, agreed, compared, number, num_images, of_classes, *rest = sums.tolist()
    _check_any(number)
    mean = agreed / compared
    # Absolute values after the sum over ranks: a bin's surplus may change its sign there.
    ece = float(torch.tensor(rest[:_BINS], dtype=torch.float64).abs().sum()) / number
    dense = is_dense(model.config)
    classes = int(model.config.num_classes or 0)
    return Measures(
        loss=total / number,
        accuracy=None if is_regression(loss) else mean,
        ece=ece if of_classes else None,
        num_images=int(num_images),
        error=mean if is_regression(loss) else None,
        iou=mean_iou(torch.tensor(rest[_BINS:]).view(classes, classes)) if dense else None,
        mean_ap=mean_average_precision(*map(torch.cat, zip(*ranked, strict=True)))
        if ranked
        else None,
    )


def _of_all_ranks(ranked: _Ranked) -> _Ranked:
    """Return the values of all ranks, those of the first rank first."""
    if not ranked:  # of all ranks or of none, since their labels are of one dataset
        return ranked
    everyone: list[_Ranked] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, ranked)
    return [one for each in everyone for one in each]


def check_measurable(model: Model, loader: PackedLoader, loss: Callable[..., Tensor]) -> None:
    """Raise if a model cannot be measured on a loader, as far as is known before it is read.

    Raises:
        TypeError, ValueError: the model has no class an image; or the loader leaves images out,
            changes them or makes no tensors; or there is no label, or one that cannot be compared
            with the outputs by the loss (`packpipe.training.objective.check_comparable`).
    """
    if loader.tail != "pad":
        expected = "'pad', which leaves no image out"
        remedy = "make it with PackedLoader(packs, batch_size, tail='pad')"
        raise ValueError(checks.sentence("tail of the loader", loader.tail, expected, remedy))
    if loader.augment is not None:
        expected, remedy = "None", "measure images as they are"
        raise ValueError(checks.sentence("augment of the loader", loader.augment, expected, remedy))
    if loader.as_numpy:
        expected, remedy = "False", "make one whose batches are tensors"
        raise ValueError(checks.sentence("as_numpy of the loader", True, expected, remedy))
    dense = is_dense(model.config)
    if model.config.num_classes is None or (
        dense and not getattr(loader.packs, "has_targets", True)
    ):
        found = (model.config.num_classes, model.config.pooling)
        expected = "classes, and an output an image unless there are targets"
        remedy = "measure a model that classifies, or pack with mask_column"
        raise ValueError(checks.sentence("(num_classes, pooling)", found, expected, remedy))
    # A stream, or packs of a class of the caller's own, may not know their labels yet.
    if not dense and hasattr(loader.packs, "labels"):
        _check_known_labels(loader.packs.labels, model.config.num_classes, loss)


def _check_known_labels(
    labels: pa.Array | None, num_classes: int, loss: Callable[..., Tensor]
) -> None:
    name, remedy = "labels of the loader", "pack with label_column"
    if labels is None:
        raise ValueError(checks.sentence(name, None, "integer labels", remedy))
    known = known_labels(labels)
    _check_any(int(counted(loss, known).sum()))
    check_comparable(known, num_classes, loss)


def _check_any(number: int) -> None:
    if not number:
        raise ValueError(checks.sentence("labels", "none", "one label at least", "pass images"))


def _sums(
    model: Model,
    loader: PackedLoader,
    loss: Callable[..., Tensor],
    device: torch.device,
    half: bool,
) -> tuple[Tensor, _Ranked]:
    """Return float64[6 + bins + K²], sums of what `measure` returns the means of, and the ranked.

    Of the loss, of agreement, what is compared, what counts, images, and images with classes; of
    the surplus in each bin; and, of a dense model, of `overlaps`.
    """
    ranked: _Ranked = []
    dense, cells = is_dense(model.config), int(model.config.num_classes or 0) ** 2
    sums = torch.zeros(6 + _BINS + dense * cells, dtype=torch.float64, device=device)
    one = torch.ones((), dtype=torch.float64, device=device)
    was_training = model.training
    model.train(False)
    try:
        # no_grad, not inference_mode: nothing made here may be of no use to the training after it.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            for batch in loader:
                check_batch(batch, model.config, loss)  # on the CPU, without waiting
                moved = batch.to(device, non_blocking=True)
                labels = labels_in(moved, model.config)
                # Cells are many: their logits stay in half the memory.
                exact = torch.float32 if dense else torch.float64
                logits = by_label(model(moved).to(exact))
                sums[0] += loss(logits, labels, count=one)
                agreed, compared = agreement(loss, logits, labels)
                known = counted(loss, labels)
                num_images = moved.present.sum() if dense else known.sum()
                figures = (agreed, compared, known.sum(), num_images)
                sums[1:5] += torch.stack([figure.double() for figure in figures])
                if dense:
                    sums[6 + _BINS :] += overlaps(logits, labels).flatten()
                elif not labels.is_floating_point():
                    sums[5] += known.sum()
                    sums[6:] += _surplus(logits[known], labels[known], _BINS)
                elif loss is segment_sigmoid_cross_entropy:
                    ranked.append((logits[known].float().cpu(), labels[known].cpu()))
    finally:
        model.train(was_training)
    return sums, ranked


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
        ValueError: the two are not of the same images, or there are no labels, or no classes.
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
    """Return bool[n], which images have a label; ValueError without any, or if they are numbers."""
    if answers.labels is None:
        remedy = "pack with label_column"
        raise ValueError(checks.sentence("answers.labels", None, "integer labels", remedy))
    if answers.labels.is_floating_point():
        expected, remedy = "a class an image", "use measure, which takes numbers, too"
        raise ValueError(checks.sentence("answers.labels", "numbers", expected, remedy))
    return answers.labels != NO_LABEL


def _labelled(answers: Answers) -> tuple[Tensor, Tensor]:
    known = labels_known(answers)
    _check_any(int(known.sum()))
    if isinstance(answers.outputs, list):
        expected, remedy = "an output an image", "use measure, which takes maps, too"
        raise ValueError(checks.sentence("answers.outputs", "maps", expected, remedy))
    assert answers.labels is not None  # noqa: S101 (for the type checker)
    return answers.outputs[known], answers.labels[known]
