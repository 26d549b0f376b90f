"""Validation: a model in training is measured on images it is not trained on.

The state says which steps were the best, how long it has been since then, and which images all that
was measured on: it is kept in checkpoints, so that a training that goes on ends at the same steps
with the same ones kept, and is never measured on other images without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from packpipe import checks
from packpipe.loading.contents import check_contents
from packpipe.loading.loader import PackedLoader
from packpipe.model.navit import NaViT
from packpipe.training.evaluation import Measures, check_measurable, measure


@dataclass(frozen=True)
class Standing:
    """The best steps so far, by validation loss.

    The loss, not the accuracy: it is finer, so that few steps are equal, and it sees a model that
    is too sure of itself. Of equal ones the earlier is better; NaN and infinity are never the best.

    Attributes:
        best: (loss, step), the best first.
        waited: validations since the best one.
    """

    best: tuple[tuple[float, int], ...] = ()
    waited: int = 0

    def after(self, step: int, loss: float, *, keep: int) -> Standing:
        """Return the standing after one more validation, with the keep best steps, 1 at least."""
        if not math.isfinite(loss):
            return Standing(self.best, self.waited + 1)
        best = sorted((*self.best, (loss, step)))[: max(1, keep)]
        is_best = best[0] == (loss, step)
        return Standing(tuple(best), 0 if is_best else self.waited + 1)


class Validator:
    """Measures a model when it is asked to, and knows which steps were the best.

    Args:
        model: the one that is trained.
        loader: of the images, with ``tail="pad"``; the epoch it is at is measured every time.
        loss: such as `segment_cross_entropy`.
        half: whether matrix products run in bfloat16.
        keep_best: checkpoints of so many of the best steps are kept.
        patience: validations without a better one after which the training ends; None is no end.

    Raises:
        TypeError, ValueError: the model cannot be measured on the loader (`check_measurable`), or
            the loader is of a stream.

    Attributes:
        standing: the best steps so far.
        due: the record of a step that could not be measured; None if none is due. It is in the
            state, so that a training that goes on measures that step first.
    """

    def __init__(
        self,
        model: NaViT,
        loader: PackedLoader,
        loss: Callable[..., Tensor],
        *,
        half: bool,
        keep_best: int,
        patience: int | None,
    ) -> None:
        check_measurable(model, loader, loss)
        if hasattr(loader.packs, "stream_packs"):
            expected = "packs that are known before they are read"
            raise ValueError(checks.sentence("validate", "a stream", expected, "use EpochPacks"))
        self._model, self._loader, self._loss, self._half = model, loader, loss, half
        self._keep_best, self._patience = keep_best, patience
        self._epoch = loader.epoch
        self.standing = Standing()
        self.due: dict[str, Any] | None = None

    def measure(self, step: int) -> Measures:
        """Measure the model after a step, note it in the standing, and return the figures.

        Raises:
            TooManyRejects: too many of the images cannot be decoded.
        """
        # Always the same epoch, so that two measures differ by the model alone.
        self._loader.set_epoch(self._epoch)
        called = "the validation images"
        found = measure(self._model, self._loader, self._loss, half=self._half, called=called)
        self.standing = self.standing.after(step, found.loss, keep=self._keep_best)
        self.due = None
        return found

    @property
    def best_steps(self) -> tuple[int, ...]:
        """The steps whose checkpoints are kept, the best first."""
        return tuple(step for _, step in self.standing.best[: self._keep_best])

    @property
    def is_exhausted(self) -> bool:
        """Whether the training ends, since none of the last validations was the best."""
        return self._patience is not None and self.standing.waited >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """Return the standing, and what tells whether other images are the same ones."""
        return {
            "best": [{"step": step, "loss": loss} for loss, step in self.standing.best],
            "waited": self.standing.waited,
            **({"due": self.due} if self.due else {}),
            **self._images(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the standing of a state.

        Raises:
            ValueError: it is of other images, or of the same at other sizes.
        """
        own = self._images()
        if (known := state["fingerprint"]) != own["fingerprint"]:
            name = "fingerprint of the validation images"
            remedy = "they are others, or of other sizes: use the data, options and seed of before"
            raise ValueError(checks.sentence(name, own["fingerprint"], repr(known), remedy))
        check_contents(own["contents"], state["contents"])
        best = tuple((float(one["loss"]), int(one["step"])) for one in state["best"])
        self.standing = Standing(best, int(state["waited"]))
        self.due = state.get("due")

    def must_agree(self) -> dict[str, Any]:
        """Return what all ranks must measure on, by name."""
        self._loader.set_epoch(self._epoch)
        return {f"validation {name}": value for name, value in self._loader.state_dict().items()}

    def _images(self) -> dict[str, Any]:
        self._loader.set_epoch(self._epoch)
        state = self._loader.state_dict()
        return {"fingerprint": state["fingerprint"], "contents": state["contents"]}
