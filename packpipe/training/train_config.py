"""The options of a training, and the learning rate of each step.

Source: NaViT B.1 and Zhai et al., arXiv 2106.04560 (the rate, the two weight decays).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from packpipe import checks
from packpipe.training.checkpoints import KEPT
from packpipe.training.losses import LOSSES, check_label_smoothing

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of a training.

    Attributes:
        steps: updates.
        accumulate: batches of the loader whose gradients each step adds up. A step is that of one
            batch as large as all of them, and needs the memory of one for activations. It takes
            the next ones, over the end of an epoch, too, so that none is left out.
        learning_rate: the peak.
        warm_up: steps in which the rate rises to it; None is a tenth of all steps.
        cool_down: steps in which it falls towards 0 at the end; None is a tenth of all steps.
        timescale: steps after which the rate has fallen to 0.7 of the peak.
        weight_decay: of the matrices of linear layers.
        head_weight_decay: of the head's matrix.
        clip: the gradient's largest norm.
        ema: how much of the averaged weights a step keeps, such as 0.999; it is less in the first
            steps (`packpipe.training.averages`). The averaged weights are what is validated, what
            decides which steps were the best, and the model of the folder. None averages none.
        loss: ``"sigmoid"`` or ``"softmax"``.
        label_smoothing: of ``"softmax"``: share of each target that is spread over all classes.
            Validation is measured without.
        precision: of matrix products; ``"auto"`` is bfloat16 on a GPU.
        compiled: whether `compile_parts` is used; None: on a GPU.
        trim: `PackedBatch.trim` cuts batches to a multiple of so many tokens; None does not. Every
            length is a graph of its own: with ``compiled``, an eighth of seq_len or more, since
            torch.compile keeps 8 (``torch._dynamo.config.recompile_limit``); a seventh with
            validation, which is a graph, too.
        log_every: steps between records. Each record waits for the GPU.
        save_every: steps between checkpoints; None saves the last step alone.
        val_every: steps between validations; None validates after the last step alone.
        keep_last: how many of the last checkpoints are kept, 2 or more.
        keep_best: how many checkpoints are kept of the steps with the lowest validation loss.
        patience: validations without a lower loss after which training ends; None never ends it.

    Raises:
        TypeError, ValueError: an option has a wrong type, or is out of range.
    """

    steps: int
    accumulate: int = 1
    learning_rate: float = 8e-4
    warm_up: int | None = None
    cool_down: int | None = None
    timescale: int = 10_000
    weight_decay: float = 0.03
    head_weight_decay: float = 3.0
    clip: float = 1.0
    ema: float | None = None
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    precision: str = "auto"
    compiled: bool | None = None
    trim: int | None = None
    log_every: int = 1
    save_every: int | None = None
    val_every: int | None = None
    keep_last: int = KEPT
    keep_best: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        least = {"keep_last": KEPT, "keep_best": 0}
        counts = ("steps", "accumulate", "timescale", "log_every", "save_every", "val_every")
        optional = ("save_every", "val_every", "patience", "trim")
        for name in (*counts, "patience", "trim", *least):
            value = getattr(self, name)
            if value is not None or name not in optional:
                low = least.get(name, 1)
                checks.whole_number(name, value, low, 2**63, "choose a usual number")
        for name in ("warm_up", "cool_down"):
            value = getattr(self, name)
            tenth = self.steps // 10
            value = tenth if value is None else value
            remedy = f"steps is {self.steps}"
            # The class is frozen.
            object.__setattr__(self, name, checks.whole_number(name, value, 0, self.steps, remedy))
        for name in ("learning_rate", "clip"):
            checks.positive_number(name, getattr(self, name), "choose a usual one")
        if self.ema is not None:
            remedy = "0.999 is usual, None is none"
            if not 0 < checks.real_number("ema", self.ema, remedy) < 1:
                raise ValueError(checks.sentence("ema", self.ema, "in (0, 1)", remedy))
        for name in ("weight_decay", "head_weight_decay"):
            if checks.real_number(name, getattr(self, name), "0 is none") < 0:
                raise ValueError(
                    checks.sentence(name, getattr(self, name), "0 or more", "0 is none")
                )
        if self.patience is not None and self.val_every is None:
            expected, remedy = "None without val_every", "pass val_every=100, or another"
            raise ValueError(checks.sentence("patience", self.patience, expected, remedy))
        checks.choice("loss", self.loss, LOSSES, "choose a loss")
        smoothing = check_label_smoothing(self.label_smoothing)
        if smoothing and self.loss != "softmax":
            expected = f"0 with loss={self.loss!r}"
            remedy = "pass loss='softmax', whose targets are shares"
            raise ValueError(checks.sentence("label_smoothing", smoothing, expected, remedy))
        object.__setattr__(self, "label_smoothing", smoothing)
        checks.choice("precision", self.precision, PRECISIONS, "choose a precision")

    def validates(self, done: int) -> bool:
        """Return whether the model is measured after so many steps."""
        return done == self.steps or (self.val_every is not None and done % self.val_every == 0)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0 being the first.

        It rises linearly to the peak, then is peak · √(timescale ÷ (steps since + timescale)); in
        the last cool_down steps this is multiplied by a line towards 0.
        """
        warm_up, cool_down = int(self.warm_up or 0), int(self.cool_down or 0)
        # Both lines are 0 one step outside of the training, so that no step has a rate of 0.
        rising = min(1.0, (step + 1) / (warm_up + 1))
        since = max(0, step - warm_up)
        falling = min(1.0, (self.steps - step) / (cool_down + 1))
        return (
            self.learning_rate
            * rising
            * falling
            * math.sqrt(self.timescale / (since + self.timescale))
        )
