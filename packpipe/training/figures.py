"""Figures of a training: what a record says, summed over the steps since the last one.

What a device computes is added up there, within the step, and read when a record is made: no step
waits for the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from packpipe.loading.batch import PackedBatch
from packpipe.model.config import NaViTConfig
from packpipe.model.flops import TRAINING, forward_flops


@dataclass(frozen=True)
class Record:
    """Figures of the steps of this rank since the last record, or since a training went on.

    Attributes:
        step: the last of them, 1 being the first of the training.
        loss: mean over the steps.
        accuracy: share of labelled images whose largest logit is that of their label; of mixed
            images, of their own label, not of their partner's. Of several labels an image, the
            share of labels that are right (`packpipe.training.objective.agreement`); None of a
            regression; of a model without pooling, of the cells that have a class.
        learning_rate: of the last step.
        images_per_s: images a second.
        tokens_per_s: real tokens a second.
        fill: real tokens ÷ slots.
        data_wait: share of the time spent waiting for the loader, and for those of other ranks.
        flops_per_s: useful FLOPs a second (`packpipe.model.flops`); what is frozen, or left out by
            drop path, counts as if it were trained.
        mfu: flops_per_s ÷ the measured rate of matrix products; None on a CPU.
        val_loss: mean over the validation images of all ranks, without label smoothing; None where
            they were not measured.
        val_accuracy: of the same images.
        val_ece: expected calibration error on them (`packpipe.training.evaluation`); None unless
            labels are classes.
        error: of a regression, the mean absolute error of all numbers; else None.
        val_error: of the validation images.
        val_iou: of a model without pooling, the mean intersection ÷ union of its classes on them.
        val_mean_ap: of several labels an image, the mean average precision on them.
        val_images: how many validation images there were.
    """

    step: int
    loss: float
    accuracy: float | None
    learning_rate: float
    images_per_s: float
    tokens_per_s: float
    fill: float
    data_wait: float
    flops_per_s: float
    mfu: float | None
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_ece: float | None = None
    error: float | None = None
    val_error: float | None = None
    val_iou: float | None = None
    val_mean_ap: float | None = None
    val_images: int | None = None


class Figures:
    """Sums over the steps since the last record.

    Args:
        config: of the model.
        rate: of matrix products, FLOP/s; None if it was not measured.
        step: how many steps are done.
        device: of the model.
        regression: whether agreements are errors.
    """

    def __init__(
        self,
        config: NaViTConfig,
        rate: float | None,
        step: int,
        *,
        device: torch.device,
        regression: bool = False,
    ) -> None:
        self.config, self.rate, self.regression = config, rate, regression
        exact = torch.float32 if device.type == "mps" else torch.float64  # which MPS has not
        # Of losses, of agreements and of what they are over; one tensor, which a graph can change.
        self._sums = torch.zeros(3, dtype=exact, device=device)
        self._reset(step)

    def _reset(self, step: int) -> None:
        self.step, self.began, self.waited = step, time.perf_counter(), 0.0
        self.images = self.tokens = self.slots = self.flops = 0
        self._sums.zero_()

    def add(self, agreement: tuple[Tensor, Tensor], loss: Tensor) -> None:
        """Add what was computed of a batch, without waiting for it.

        Args:
            agreement: see `packpipe.training.objective.agreement`.
            loss: of the batch.
        """
        self._sums += torch.stack([part.to(self._sums.dtype) for part in (loss, *agreement)])

    def count(self, batch: PackedBatch) -> None:
        """Count what is in a batch, on the CPU."""
        self.images += int(batch.present.sum())
        self.tokens += int(batch.seq_lens.sum())
        self.slots += batch.segment_ids.numel()
        self.flops += TRAINING * forward_flops(self.config, batch.seq_lens)

    def record(self, step: int, learning_rate: float) -> Record:
        """Return the record of the steps up to this one, and begin the next one."""
        loss, agreed, compared = self._sums.tolist()  # waits for the device
        mean = agreed / max(1.0, compared)
        seconds = time.perf_counter() - self.began
        record = Record(
            step=step,
            loss=loss / (step - self.step),
            accuracy=None if self.regression else mean,
            error=mean if self.regression else None,
            learning_rate=learning_rate,
            images_per_s=self.images / seconds,
            tokens_per_s=self.tokens / seconds,
            fill=self.tokens / self.slots,
            data_wait=self.waited / seconds,
            flops_per_s=self.flops / seconds,
            mfu=None if self.rate is None else self.flops / seconds / self.rate,
        )
        self._reset(step)
        return record
