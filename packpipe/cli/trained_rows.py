"""`TrainedRows`: what `packpipe train` takes from a folder of packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from packpipe.cli.labelled_data import LabelledData
from packpipe.cli.measured import (
    check_patches,
    num_images,
    num_measured,
    segments_of,
    validation_packs,
)
from packpipe.loading.read import read_rows
from packpipe.loading.stored import StoredPacks
from packpipe.philox import Key
from packpipe.planning.decisions import decide
from packpipe.planning.evaluation import evaluation_of
from packpipe.planning.image_config import PackConfig
from packpipe.rows.rejects import Reject
from packpipe.training.run_folder import RunOptions

# What a manifest says of the source and the options of its rows.
_Record = dict[str, Any]


@dataclass(frozen=True)
class TrainedRows:
    """Packed rows that are trained on, and what the training is validated on.

    Attributes:
        dataset: rows of images.
        record: what their manifest says; None without one, as of rows that `save_to_disk` wrote.
        patch_size: of the model.
        num_workers: threads that read the headers of validation images.
        seed: of which rows are held out.
        val: what the training is validated on: a share of the rows, which are held out; a dataset
            of other rows, or of images; None validates on none.
        val_tokens: most tokens of a validation image, and of one that the model is asked for
            later; None is what `evaluation` says.
        loss: what the model is trained with, which says whether labels are classes.
        max_bad_fraction: a larger share of validation images that cannot be read is an error.
    """

    dataset: Dataset
    record: _Record | None
    patch_size: int
    num_workers: int
    seed: int = 0
    val: float | Dataset | None = None
    val_tokens: int | None = None
    loss: str = "sigmoid"
    max_bad_fraction: float = 0.01

    layout_name = "packed"

    @cached_property
    def labelled(self) -> LabelledData:
        """The rows with their labels as classes, in their parts."""
        check_patches(self.dataset, self.patch_size, "of the model")
        return LabelledData(self.dataset, self.loss, self.val, self.seed)

    @property
    def label_column(self) -> str | None:
        """Name of the column of labels in the source; None if nobody knows it."""
        return None if self.record is None else self.record["label_column"]

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        # Not of the features: rows in a store have the columns that are here.
        return int(read_rows(self.dataset, range(0)).segment_ids.shape[1])

    @cached_property
    def packs(self) -> StoredPacks:
        """The rows as packs, in another order every epoch."""
        return StoredPacks(self.labelled.trained)

    @property
    def rejected(self) -> list[tuple[str, Reject]]:
        """None: what is bad was left out when the rows were packed."""
        return []

    @cached_property
    def evaluation(self) -> PackConfig:
        """How images become rows when the model is evaluated.

        By the options that the rows were packed with, where nothing is drawn or dropped. Rows that
        do not tell them are taken for images at their own size, if all of them have it; else
        images get as many tokens as the largest one in the rows.
        """
        if self.record is not None:
            found = evaluation_of(PackConfig.from_dict(self.record["config"]))
        else:
            found = self._guessed()
        if self.val_tokens is None:
            return found
        return RunOptions(packing=found).at(self.val_tokens).packing

    def _guessed(self) -> PackConfig:
        known = segments_of(self.dataset)
        first = read_rows(self.dataset, range(min(1, len(self.dataset))))
        slots = int((first.coords[..., 0] < 0).sum()) // max(1, len(first.seq_lens))
        native = PackConfig(seq_len=self.seq_len, patch_size=self.patch_size, prefix_tokens=slots)
        own = decide(known.image_hw, native, Key(0, 0), index=known.example_index)
        if np.array_equal(own.grid_hw, known.grid_hw):
            return native
        most = int(known.grid_hw.astype(np.int64).prod(axis=1).max(initial=1))
        return RunOptions(packing=native).at(min(most, native.room)).packing

    @cached_property
    def validation_packs(self) -> Any:
        """What is validated on as packs; None without any."""
        return validation_packs(
            self.labelled,
            self.evaluation,
            num_workers=self.num_workers,
            max_bad_fraction=self.max_bad_fraction,
        )

    def counts(self) -> dict[str, int]:
        """Return how many images are trained on and validated on."""
        counts = {"images": num_images(self.labelled.trained)}
        validated = self.labelled.validated
        if validated is not None:
            counts["validation images"] = num_measured(validated, self.validation_packs)
        return counts

    def epoch(self, seed: int) -> dict[str, int]:  # noqa: ARG002  of all epochs alike
        """Return the figures of an epoch."""
        tokens = int(segments_of(self.labelled.trained).seq_lens.sum(dtype=np.int64))
        return {"rows an epoch": len(self.labelled.trained), "tokens an epoch": tokens}
