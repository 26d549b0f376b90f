"""`LabelledData`: what a training takes of a dataset with labels, and what is held out of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from datasets import ClassLabel, Dataset

from packpipe.cli.compared import LABELS, Compared
from packpipe.cli.labels import classes_of, divided, labelled, num_outputs


@dataclass(frozen=True)
class LabelledData:
    """Images or packed rows of them with their labels as classes, in two parts.

    Attributes:
        dataset: images, or rows, with labels.
        loss: what the model is trained with, which says whether labels are classes.
        val: what the training is validated on: a share of the dataset, which is held out of it; or
            another dataset; None validates on none.
        seed: of which are held out.
        compared: masks in the place of labels, and weights.
    """

    dataset: Dataset
    loss: str
    val: float | Dataset | None
    seed: int
    compared: Compared = LABELS

    @property
    def _is_masked(self) -> bool:
        return self.compared.mask is not None

    @cached_property
    def whole(self) -> Dataset:
        """The dataset, undivided, with its labels as classes."""
        if self._is_masked:
            return self.compared.telling(self.dataset)
        return labelled(self.dataset, self.loss)

    @cached_property
    def _parts(self) -> tuple[Dataset, Dataset | None]:
        if isinstance(self.val, float):
            return divided(self.whole, self.val, self.seed, by_class=not self._is_masked)
        return self.whole, None

    @property
    def trained(self) -> Dataset:
        """What is trained on."""
        return self._parts[0]

    @property
    def validated(self) -> Dataset | None:
        """What is validated on: the part that is held out, or the other dataset; or None."""
        return self.val if isinstance(self.val, Dataset) else self._parts[1]

    @property
    def classes(self) -> ClassLabel | None:
        """The classes, by number; None if labels are numbers of another kind."""
        return self.compared.classes if self._is_masked else classes_of(self.whole)

    @property
    def num_outputs(self) -> int:
        """How many outputs the model needs."""
        of_masks = self.compared.num_classes
        return num_outputs(self.whole) if of_masks is None else of_masks
