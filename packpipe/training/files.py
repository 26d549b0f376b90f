"""What a training writes into its folder: checkpoints, log.jsonl, model.json.

Rank 0 writes, and what goes wrong there is raised on every rank.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from packpipe.loading.loader import PackedLoader
from packpipe.loading.ranks import rank_of_world, together
from packpipe.model.navit import NaViT
from packpipe.training.checkpoints import begin_after, load_checkpoint, save_checkpoint
from packpipe.training.figures import Record
from packpipe.training.log import append_record, begin_log, sync_log
from packpipe.training.run_folder import RunOptions, check_options, write_options
from packpipe.training.train_config import TrainConfig
from packpipe.training.validation import Validator


class Files:
    """The folder of a training; without one, nothing is read or written.

    Args:
        folder: a local one, or None.
        model: what is trained.
        optimizer: its state is saved, too.
        loader: of the batches; its place is saved, too.
        config: says how many checkpoints are kept.
        validator: what it knows of the best steps is saved, too; None without validation.
        averaged: the averaged weights; None without any.
        run_options: what model.json says; None writes none.
    """

    def __init__(
        self,
        folder: Path | None,
        model: NaViT,
        optimizer: torch.optim.Optimizer,
        loader: PackedLoader,
        config: TrainConfig,
        *,
        validator: Validator | None,
        averaged: NaViT | None,
        run_options: RunOptions | None,
    ) -> None:
        self._folder, self._options = folder, run_options
        self._validator, self._averaged = validator, averaged
        self._parts = model, optimizer, loader
        self._keep_last = config.keep_last
        # What one rank alone may write to.
        self._own = folder if rank_of_world()[0] == 0 else None

    def load(self) -> int:
        """Load the newest whole checkpoint; return its step, 0 without any.

        Raises:
            ValueError: see `check_options` and `load_checkpoint`.
        """
        if self._folder is None:
            return 0
        if self._options:
            check_options(self._folder, self._options)
        return load_checkpoint(
            self._folder, *self._parts, validator=self._validator, averaged=self._averaged
        )

    def begin(self, step: int) -> None:
        """Make the folder ready for a training that goes on from a step, which all have loaded."""

        def write() -> None:
            if self._own:
                begin_after(self._own, step)
                begin_log(self._own, step)
                if self._options:
                    write_options(self._own, self._options)

        together(write)

    def append(self, record: Record) -> None:
        """Write a record into the log."""
        if self._own:
            append_record(self._own, asdict(record))

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, and before it the log to the disk."""
        if self._folder is None:
            return
        together(lambda: sync_log(self._own) if self._own else None)
        save_checkpoint(
            self._folder,
            *self._parts,
            step,
            validator=self._validator,
            averaged=self._averaged,
            keep_last=self._keep_last,
        )
