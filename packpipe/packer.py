"""`Packer`: packing inside ``Dataset.map``, one batch at a time (floor 2)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
from datasets import Features
from datasets.formatting.formatting import LazyBatch

import packpipe
from packpipe import checks, schema
from packpipe.config import PackConfig, PackOptions, config_from
from packpipe.features import packed_features
from packpipe.images import Encoded
from packpipe.plan import plan_epoch
from packpipe.rows import Reject, fill_rows, planned_segments
from packpipe.source import encoded_of, image_column_of, label_column_of, survey

log = logging.getLogger(__name__)

ON_ERROR = ("raise", "drop")


class Packer:
    """A function for ``dataset.map(Packer(...), batched=True, remove_columns=...)``.

    Every batch is packed by itself, so the rows depend on ``batch_size`` and ``num_proc``, and
    each batch ends with a pack that is partly empty; `packpipe.pack` has neither limit. Pass
    ``with_indices=True`` to ``map`` to record each image's source row, else
    ``example_index`` is -1.

    Args:
        seq_len: tokens a pack holds.
        image_column: its name; ``"auto"`` finds the only one.
        label_column: its name; ``"auto"`` finds it, None leaves labels out.
        seed: which permutation of a batch's images and packs.
        epoch: likewise.
        on_error: ``"raise"`` stops at the first image that cannot be used; ``"drop"`` leaves
            it out and logs it, since ``map`` has no place for a rejects table.
        **options: the options of `PackConfig`.

    Raises:
        TypeError, ValueError: an argument is wrong; or, when called, a column or an image is.
    """

    def __init__(
        self,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        seed: int = 0,
        epoch: int = 0,
        on_error: str = "raise",
        **options: Unpack[PackOptions],
    ) -> None:
        self.config: PackConfig = config_from(seq_len, dict(options))
        self.image_column = image_column
        self.label_column = label_column
        self.seed, self.epoch = checks.seed_and_epoch(seed, epoch)
        self.on_error = checks.choice("on_error", on_error, ON_ERROR, "choose what bad images do")
        # `datasets` fingerprints this object by its class name and these plain values.
        self.version = (packpipe.__version__, schema.VERSION)

    def __call__(self, batch: Any, indices: list[int] | None = None) -> pa.Table:
        """Return the packed rows of a batch.

        Args:
            batch: the batch ``map`` passes.
            indices: source row of each example, with ``with_indices=True``.
        """
        if not isinstance(batch, LazyBatch):
            raise TypeError(
                checks.sentence(
                    "type(batch)",
                    type(batch).__name__,
                    "LazyBatch, as Dataset.map passes it",
                    "use map(packer, batched=True) on dataset.with_format(None)",
                )
            )
        table: pa.Table = batch.pa_table
        features = Features.from_arrow_schema(table.schema)
        if batch.formatter.features is not None:
            features = Features(
                {name: batch.formatter.features[name] for name in table.column_names}
            )
        image_column = image_column_of(features, self.image_column)
        label_column = label_column_of(features, self.label_column)
        images = table.column(image_column)
        labels = None if label_column is None else table.column(label_column)

        def read_image(example: int) -> Encoded:
            return encoded_of(images[example])

        label = None if label_column is None else features[label_column]
        found = survey(read_image, table.num_rows, labels, label, max_pixels=self.config.max_pixels)
        self._settle(found.rejects, indices)
        plan = plan_epoch(
            found.image_hw, self.config, seed=self.seed, epoch=self.epoch, index=found.index
        )
        segments = planned_segments(plan, range(len(plan)), labels)
        rows, undecodable = fill_rows(segments, read_image, self.config)
        self._settle(undecodable, indices)

        place = rows.segments.example_index
        known = np.full(len(place), -1) if indices is None else np.asarray(indices)[place]
        rows = replace(rows, segments=replace(rows.segments, example_index=known))
        return schema.rows_table(rows, packed_features(self.config, label).arrow_schema)

    def _settle(self, rejects: list[Reject], indices: list[int] | None) -> None:
        for reject in sorted(rejects):
            name = f"example {reject.example_index} of the batch"
            if indices is not None:
                name = f"example {indices[reject.example_index]}"
            what = f"{name} is bad ({reject.reason}: {reject.exception}), expected a usable image"
            if self.on_error == "raise":
                remedy = "pass on_error='drop', or use packpipe.pack, which keeps a rejects table"
                raise ValueError(f"{what} and label; {remedy}")
            log.warning("%s; dropped", what)
