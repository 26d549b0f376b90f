"""`TrainedImages`: what `packpipe train` takes from a dataset of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from datasets import ClassLabel, Dataset

from packpipe.cli.labels import classes_of, divided, labelled, num_outputs
from packpipe.cli.layouts import EncoderLayout, Layout, packs_of
from packpipe.cli.measured import num_measured, validation_packs
from packpipe.cli.open_source import naming_files, with_files
from packpipe.loading.epochs import EpochPacks
from packpipe.planning.image_config import PackConfig
from packpipe.rows.rejects import Reject, TooManyRejects
from packpipe.sources.image_columns import label_column_of


@dataclass(frozen=True)
class TrainedImages:
    """Images that are trained on, and those that the training is validated on.

    Attributes:
        dataset: labelled images.
        layout: how they become rows.
        patch_size: of the model.
        num_workers: threads that read the headers.
        seed: of which images are held out.
        val: images that the training is validated on: a share of the dataset's, which is held out
            of it, or a dataset of others, or of rows that are packed; None validates on none.
        val_tokens: most tokens of a validation image; None is those of the largest square.
        loss: what the model is trained with, which says whether labels are classes.
    """

    dataset: Dataset
    layout: Layout | EncoderLayout
    patch_size: int
    num_workers: int
    seed: int = 0
    val: float | Dataset | None = None
    val_tokens: int | None = None
    loss: str = "sigmoid"

    @property
    def layout_name(self) -> str:
        """Name of the layout."""
        return self.layout.name

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self.packs.config.seq_len

    @cached_property
    def _images(self) -> Dataset:
        """The images of the dataset, undivided, with their labels as classes."""
        return labelled(self.dataset, self.loss)

    @cached_property
    def _parts(self) -> tuple[Dataset, Dataset | None]:
        """The images that are trained on, and those of them that are held out."""
        if isinstance(self.val, float):
            return divided(self._images, self.val, self.seed)
        return self._images, None

    @property
    def labelled(self) -> Dataset:
        """The images that are trained on, with their labels as classes."""
        return self._parts[0]

    @property
    def classes(self) -> ClassLabel | None:
        """The classes, by number; None if labels are numbers of another kind."""
        return classes_of(self._images)

    @property
    def num_outputs(self) -> int:
        """How many outputs the model needs."""
        return num_outputs(self._images)

    @property
    def label_column(self) -> str | None:
        """Name of the column of labels."""
        return label_column_of(self._images.features, "auto")

    @cached_property
    def packs(self) -> EpochPacks:
        """The images as packs, planned anew every epoch."""
        if isinstance(self.val, float):
            _ = self._undivided  # raises if too many are bad
        layout = replace(self.layout, max_bad_fraction=self._allowed_in(self.labelled))
        return layout.packs(self.labelled, self.patch_size, self.num_workers)

    @property
    def rejected(self) -> list[tuple[str, Reject]]:
        """Images that are left out since header or label is bad, each with its file or number."""
        # Of a share that is held out, the numbers of a part are not those of the images.
        found = self._undivided if isinstance(self.val, float) else self.packs
        return with_files(self._images, found.rejects)

    @cached_property
    def _undivided(self) -> EpochPacks:
        """The images before some are held out, which is an error if too many are bad.

        How they are divided then decides nothing.
        """
        allowed = self.layout.max_bad_fraction
        try:
            with naming_files(self._images):
                return packs_of(
                    self._images, self.evaluation, self.num_workers, max_bad_fraction=allowed
                )
        except TooManyRejects as error:
            # Without the rejects, whose numbers are not those of the images that are trained on.
            raise TooManyRejects(str(error), []) from error

    def _allowed_in(self, part: Dataset) -> float:
        """Return the share of a part's images that may be bad: as many as of those undivided."""
        allowed = self.layout.max_bad_fraction
        if not isinstance(self.val, float):
            return allowed
        number = int(allowed * len(self._images) + 1e-9)
        # Half an image more, so that rounding decides nothing.
        return min(1.0, (number + 0.5) / len(part)) if number else allowed

    @cached_property
    def evaluation(self) -> PackConfig:
        """How images become rows when the model is evaluated."""
        return self.layout.evaluation(self.patch_size, self.val_tokens)

    @cached_property
    def validated(self) -> Dataset | None:
        """The images, or rows of them, that are validated on, with the same classes; or None."""
        return self.val if isinstance(self.val, Dataset) else self._parts[1]

    @cached_property
    def validation_packs(self) -> Any:
        """What is validated on as packs; None without any."""
        if self.validated is None:
            return None
        return validation_packs(
            self.validated,
            self.classes,
            self.evaluation,
            loss=self.loss,
            num_workers=self.num_workers,
            max_bad_fraction=self._allowed_in(self.validated),
        )

    def counts(self) -> dict[str, int]:
        """Return how many images are trained on and validated on, and how many are rejected."""
        counts = {"images": len(self.labelled) - len(self.packs.rejects)}
        if self.validated is not None:
            counts["validation images"] = num_measured(self.validated, self.validation_packs)
        return {**counts, "rejected images": len(self.rejected)}

    def epoch(self, seed: int) -> dict[str, int]:
        """Return the figures of the first epoch's plan."""
        plan = self.packs.plan(seed, 0)
        return {"rows an epoch": len(plan), "tokens an epoch": plan.quality.num_tokens}
