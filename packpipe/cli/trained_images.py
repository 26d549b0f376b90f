"""`TrainedImages`: what `packpipe train` takes from a dataset of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from datasets import Dataset

from packpipe.cli.compared import LABELS, Compared
from packpipe.cli.labelled_data import LabelledData
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
        compared: masks in the place of labels, and weights.
    """

    dataset: Dataset
    layout: Layout | EncoderLayout
    patch_size: int
    num_workers: int
    seed: int = 0
    val: float | Dataset | None = None
    val_tokens: int | None = None
    loss: str = "sigmoid"
    compared: Compared = LABELS

    @property
    def layout_name(self) -> str:
        """Name of the layout."""
        return self.layout.name

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self.packs.config.seq_len

    @cached_property
    def labelled(self) -> LabelledData:
        """The images with their labels as classes, in their parts."""
        return LabelledData(self.dataset, self.loss, self.val, self.seed, self.compared)

    @property
    def label_column(self) -> str | None:
        """Name of the column of labels, or of masks."""
        return self.compared.mask or label_column_of(self.labelled.whole.features, "auto")

    @cached_property
    def packs(self) -> EpochPacks:
        """The images as packs, planned anew every epoch."""
        if isinstance(self.val, float):
            _ = self._undivided  # raises if too many are bad
        layout = replace(self.layout, max_bad_fraction=self._allowed_in(self.labelled.trained))
        images, columns = self.labelled.trained, self.compared.trained
        return layout.packs(images, self.patch_size, self.num_workers, **columns)

    @property
    def rejected(self) -> list[tuple[str, Reject]]:
        """Images that are left out since header or label is bad, each with its file or number."""
        # Of a share that is held out, the numbers of a part are not those of the images.
        found = self._undivided if isinstance(self.val, float) else self.packs
        return with_files(self.labelled.whole, found.rejects)

    @cached_property
    def _undivided(self) -> EpochPacks:
        """The images before some are held out, which is an error if too many are bad.

        How they are divided then decides nothing.
        """
        allowed = self.layout.max_bad_fraction
        try:
            with naming_files(self.labelled.whole):
                options = {"max_bad_fraction": allowed, **self.compared.trained}
                images = self.labelled.whole
                return packs_of(images, self.evaluation, self.num_workers, **options)
        except TooManyRejects as error:
            # Without the rejects, whose numbers are not those of the images that are trained on.
            raise TooManyRejects(str(error), []) from error

    def _allowed_in(self, part: Dataset | None) -> float:
        """Return the share of a part's images that may be bad: as many as of those undivided."""
        allowed = self.layout.max_bad_fraction
        if part is None or not isinstance(self.val, float):
            return allowed
        number = int(allowed * len(self.labelled.whole) + 1e-9)
        # Half an image more, so that rounding decides nothing.
        return min(1.0, (number + 0.5) / len(part)) if number else allowed

    @cached_property
    def evaluation(self) -> PackConfig:
        """How images become rows when the model is evaluated."""
        return self.layout.evaluation(self.patch_size, self.val_tokens)

    @cached_property
    def validation_packs(self) -> Any:
        """What is validated on as packs; None without any."""
        return validation_packs(
            self.labelled,
            self.evaluation,
            num_workers=self.num_workers,
            max_bad_fraction=self._allowed_in(self.labelled.validated),
            compared=self.compared,
        )

    def counts(self) -> dict[str, int]:
        """Return how many images are trained on and validated on, and how many are rejected."""
        counts = {"images": len(self.labelled.trained) - len(self.packs.rejects)}
        validated = self.labelled.validated
        if validated is not None:
            counts["validation images"] = num_measured(validated, self.validation_packs)
        return {**counts, "rejected images": len(self.rejected)}

    def epoch(self, seed: int) -> dict[str, int]:
        """Return the figures of the first epoch's plan."""
        plan = self.packs.plan(seed, 0)
        return {"rows an epoch": len(plan), "tokens an epoch": plan.quality.num_tokens}
