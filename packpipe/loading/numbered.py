"""Lets `accelerate.skip_first_batches` begin at a later step without filling those before it.

``accelerate.skip_first_batches``, with which the Trainer of transformers resumes, makes a
DataLoader of these two, its sampler without the first numbers. Nothing of what is left out is
filled: the loader begins its pass at the first step that is asked for, and its workers fill those
after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from operator import length_hint
from typing import Any, Protocol


class Loader(Protocol):
    """What is needed of a `PackedLoader`."""

    batch_size: int

    @property
    def global_batch(self) -> int:
        """Packs of a step, over all ranks."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""

    def from_step(self, step: int) -> Iterator[Any]:
        """Return the batches of the epoch from a step on."""


@dataclass(frozen=True, eq=False)
class NumberedSteps:
    """The numbers of an epoch's steps, 0, 1, ...; those of a stream go on until it ends.

    Attributes:
        loader: whose steps.
        drop_last: False, since the loader's tail is left out before steps are numbered.
    """

    loader: Loader
    drop_last: bool = False

    @property
    def batch_size(self) -> int:
        """Packs of a step of this rank."""
        return self.loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[int]:
        try:
            return iter(range(len(self)))
        except TypeError:  # a stream
            return count()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.loader.set_epoch(epoch)


class NumberedBatches:
    """The batches of `NumberedSteps`, as a dataset whose length is the epoch's packs.

    Args:
        loader: whose batches.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._next = -1
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self._loader) * self._loader.global_batch

    def __getitems__(self, step: int) -> Any:
        """Return a step's batch; torch's DataLoader asks for what its batch sampler yielded."""
        if step != self._next:
            self._batches = self._loader.from_step(step)
        self._next = step + 1
        batch = next(self._batches)  # at the end of a stream it stops the DataLoader's loop, too
        # None is asked for after the last number, yet the pass has workers to end.
        if self._next == length_hint(self._loader, -1):
            next(self._batches, None)
        return batch
