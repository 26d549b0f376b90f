"""The options of a training, and the learning rate of each step.

Source: NaViT B.1 and Zhai et al., arXiv 2106.04560 (the rate, the two weight decays).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from packpipe import checks
from packpipe.model.precision import PRECISIONS
from packpipe.training.checkpoints import KEPT
from packpipe.training.drop_path import check_drop_path
from packpipe.training.losses import LOSSES, check_label_smoothing


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
        schedule: a function of the step, 0 being the first, that returns its rate, in place of the
            four above. It may be another one when a training goes on, as all of them may.
        layer_decay: what the rate is multiplied by from each layer to the one before it, 1 for
            none: all that comes after the blocks has the rate itself, the last block layer_decay
            of it, patch embedding and positions layer_decay to the power of depth + 1.
        freeze: how many of the first blocks are not trained, nor are patch embedding and positions;
            0 trains everything.
        weight_decay: of the matrices of linear layers.
        head_weight_decay: of the head's matrix.
        clip: the gradient's largest norm; None leaves it as it is.
        ema: how much of the averaged weights a step keeps, such as 0.999; it is less in the first
            steps (`packpipe.training.averages`). The averaged weights are what is validated, what
            decides which steps were the best, and the model of the folder. None averages none.
        drop_path: how often an image goes around the last block's attention, and around its MLP;
            earlier blocks have less (`packpipe.training.drop_path`). In training alone. It is drawn
            by the loader's seed.
        loss: ``"sigmoid"`` or ``"softmax"``, of classes, of several labels an image (sigmoid), or
            of shares of classes; ``"mse"`` or ``"l1"``, of a regression.
        label_smoothing: of ``"softmax"``: share of each target that is spread over all classes.
            Validation is measured without.
        class_weights: what the images of each class count in the loss, which is the weighted mean
            (Σ weight · loss ÷ Σ weight); ``"balanced"``: images ÷ (classes · images of the class).
            An image's own weight (``weight_column``) is multiplied by it. Validation is measured
            without either. Arrays and tensors are taken as lists. None is 1 for all.
        precision: of matrix products; ``"auto"`` is bfloat16 on a GPU. On a CPU without
            instructions for it ``"bfloat16"`` is slower, which a warning says.
        compiled: whether `compile_parts` is used; None: on a GPU.
        captured: whether the whole step is one CUDA graph, which small models need, or launches
            take longer than kernels; neither under torchrun nor with trim. On a CPU only its
            batches are copied as for one. Not the default, since no card has measured it yet.
        trim: `PackedBatch.trim` cuts batches to a multiple of so many tokens; None does not. Every
            length is a graph of its own: with ``compiled``, an eighth of seq_len or more, since
            torch.compile keeps 8 (``torch._dynamo.config.recompile_limit``); a seventh with
            validation, which is a graph, too.
        log_every: steps between records, which are means over them. Only a record waits for the
            GPU; 1 is a record of each step.
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
    schedule: Callable[[int], float] | None = None
    layer_decay: float = 1.0
    freeze: int = 0
    weight_decay: float = 0.03
    head_weight_decay: float = 3.0
    clip: float | None = 1.0
    ema: float | None = None
    drop_path: float = 0.0
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    class_weights: str | Sequence[float] | NDArray[Any] | Tensor | None = None
    precision: str = "auto"
    compiled: bool | None = None
    captured: bool = False
    trim: int | None = None
    log_every: int = 10
    save_every: int | None = None
    val_every: int | None = None
    keep_last: int = KEPT
    keep_best: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        least = {"keep_last": KEPT, "keep_best": 0, "freeze": 0}
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
        checks.positive_number("learning_rate", self.learning_rate, "choose a usual one")
        if self.clip is not None:
            checks.positive_number("clip", self.clip, "1 is usual, None is none")
        remedy = "0.75 is usual, 1 is none"
        if not 0 < checks.real_number("layer_decay", self.layer_decay, remedy) <= 1:
            raise ValueError(checks.sentence("layer_decay", self.layer_decay, "in (0, 1]", remedy))
        if self.schedule is not None and not callable(self.schedule):
            expected, remedy = "a function of the step, or None", "pass lambda step: 1e-3"
            raise TypeError(checks.sentence("schedule", self.schedule, expected, remedy))
        object.__setattr__(self, "drop_path", check_drop_path(self.drop_path))
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
        object.__setattr__(self, "class_weights", self._checked_class_weights())
        checks.choice("precision", self.precision, PRECISIONS, "choose a precision")
        object.__setattr__(self, "captured", checks.boolean("captured", self.captured))

    def _checked_class_weights(self) -> str | tuple[float, ...] | None:
        weights: Any = self.class_weights
        remedy = "1 for all is None"
        if weights is None:
            return None
        if self.loss not in ("softmax", "sigmoid"):
            expected = f"None with loss={self.loss!r}"
            raise ValueError(checks.sentence("class_weights", weights, expected, "it has none"))
        if isinstance(weights, str):
            return checks.choice("class_weights", weights, ("balanced",), remedy)
        if hasattr(weights, "tolist"):
            weights = weights.tolist()
        if not isinstance(weights, Sequence):
            expected = "'balanced' or a number for each class"
            raise TypeError(checks.sentence("class_weights", weights, expected, remedy))
        found = []
        for number, weight in enumerate(weights):
            value = checks.real_number(f"class_weights[{number}]", weight, remedy)
            if not 0 <= value < math.inf:
                expected = "a finite number, 0 or more"
                what = f"class_weights[{number}]"
                raise ValueError(checks.sentence(what, value, expected, remedy))
            found.append(float(value))
        return tuple(found)

    def validates(self, done: int) -> bool:
        """Return whether the model is measured after so many steps."""
        return done == self.steps or (self.val_every is not None and done % self.val_every == 0)

    def must_agree(self) -> dict[str, Any]:
        """Return the options that must be equal on all ranks, by name; log_every need not be.

        Functions are told apart by the rates of a thousand steps, as a digest.
        """
        found = {name: value for name, value in vars(self).items() if name != "log_every"}
        if self.schedule is not None:
            steps = {*range(0, self.steps, -(-self.steps // 1000)), self.steps - 1}
            rates = repr([self.rate(step) for step in sorted(steps)])
            found["schedule"] = hashlib.sha256(rates.encode()).hexdigest()[:16]
        return found

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, 0 being the first.

        It rises linearly to the peak, then is peak · √(timescale ÷ (steps since + timescale)); in
        the last cool_down steps this is multiplied by a line towards 0. A schedule says it itself.

        Raises:
            TypeError, ValueError: it says no finite number of 0 or more.
        """
        if self.schedule is not None:
            name, remedy = f"schedule({step})", "return the rate of the step"
            rate = checks.real_number(name, self.schedule(step), remedy)
            if rate < 0:
                raise ValueError(checks.sentence(name, rate, "0 or more", remedy))
            return float(rate)
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
