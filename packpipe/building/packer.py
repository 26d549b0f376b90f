"""`Packer`: packing inside ``Dataset.map``, one batch at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
from datasets import Features
from datasets.formatting.formatting import LazyBatch

from packpipe import checks
from packpipe._version import __version__
from packpipe.building.token_job import too_long
from packpipe.images.opening import ImageData
from packpipe.planning.image_config import MAX_IMAGE_SEQ_LEN, PackConfig, config_from
from packpipe.planning.plan import plan_epoch
from packpipe.planning.token_config import TokenConfig, token_config_from
from packpipe.planning.token_plan import plan_tokens
from packpipe.rows import schema
from packpipe.rows.fill_images import fill_rows, planned_segments
from packpipe.rows.fill_tokens import packed_table
from packpipe.rows.rejects import Reject, bad_because
from packpipe.sources.columns import (
    Options,
    check_paddings,
    holds_tokens,
    image_column_of,
    label_column_of,
    token_columns_of,
    value_columns_of,
)
from packpipe.sources.features import packed_features, token_features
from packpipe.sources.image_source import checked_root, image_data
from packpipe.sources.survey import probe_sizes, survey
from packpipe.sources.token_source import rejected, token_column, usable

log = logging.getLogger(__name__)

ON_ERROR = ("raise", "drop")


class Packer:
    """A function for ``dataset.map(Packer(...), batched=True, remove_columns=...)``.

    Every batch is packed by itself, so the rows depend on ``batch_size`` and ``num_proc``, and
    each batch ends with a pack that is partly empty; `packpipe.pack` has neither limit. Pass
    ``with_indices=True`` to ``map`` to record each image's source row, else
    ``example_index`` is -1; options that draw need it, so that no two images share their draws.

    Args:
        seq_len: tokens a pack holds.
        image_column: its name; ``"auto"`` finds the only one.
        label_column: its name; ``"auto"`` finds it, None leaves labels out.
        image_root: as for `pack`.
        token_columns: as for `pack`.
        value_columns: likewise.
        seed: which permutation of a batch's images and packs.
        epoch: likewise.
        on_error: ``"raise"`` stops at the first image or sequence that cannot be used; ``"drop"``
            leaves it out and logs it, since ``map`` has no place for a rejects table.
        **options: the options of `PackConfig` or, of tokens, `TokenConfig`.

    Raises:
        TypeError, ValueError: an argument is wrong; or, when called, a column or an image is.
    """

    def __init__(
        self,
        seq_len: int = 1024,
        *,
        image_column: str = "auto",
        label_column: str | None = "auto",
        image_root: str | Path | None = None,
        token_columns: str | Sequence[str] = "auto",
        value_columns: str | Sequence[str] = "auto",
        seed: int = 0,
        epoch: int = 0,
        on_error: str = "raise",
        **options: Unpack[Options],
    ) -> None:
        # Which configuration it is shows in the options or, at last, in the dataset.
        self.config: PackConfig | TokenConfig = _config_from(seq_len, dict(options), token_columns)
        self.seq_len, self.options = seq_len, dict(options)
        self.token_columns, self.value_columns = token_columns, value_columns
        self.image_column = image_column
        self.label_column = label_column
        self.image_root = checked_root(image_root)
        self.seed, self.epoch = checks.seed_and_epoch(seed, epoch)
        self.on_error = checks.choice("on_error", on_error, ON_ERROR, "choose what bad images do")
        # `datasets` fingerprints this object by its class name and these plain values.
        self.version = (__version__, schema.VERSION)

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
        if holds_tokens(features, self.image_column, self.token_columns):
            return self._packed_tokens(table, features, indices)
        return self._packed_images(table, features, indices)

    def _packed_images(
        self, table: pa.Table, features: Features, indices: list[int] | None
    ) -> pa.Table:
        config = self.config
        if not isinstance(config, PackConfig):
            config = config_from(self.seq_len, self.options)
        image_column = image_column_of(features, self.image_column)
        label_column = label_column_of(features, self.label_column)
        images = table.column(image_column)
        labels = None if label_column is None else table.column(label_column)

        if indices is None and config.draws:
            raise ValueError(
                checks.sentence(
                    "with_indices",
                    False,
                    "True for options that draw, since every image draws by its row",
                    "use map(packer, batched=True, with_indices=True)",
                )
            )
        # Each image's number: its row in the source, where that is known.
        numbers = np.arange(table.num_rows) if indices is None else np.asarray(indices)
        place_of = {number: place for place, number in enumerate(numbers.tolist())}

        def read_image(number: int) -> ImageData:
            return image_data(images[place_of[number]], self.image_root)

        label = None if label_column is None else features[label_column]
        sizes = probe_sizes(
            lambda place: image_data(images[place], self.image_root),
            table.num_rows,
            max_pixels=config.max_pixels,
        )
        found = survey(sizes, labels, label)
        rejects = [r._replace(example_index=int(numbers[r.example_index])) for r in found.rejects]
        self._settle(rejects, indices is not None)
        seed, epoch = self.seed, self.epoch
        index = numbers[found.index]
        plan = plan_epoch(found.image_hw, config, seed=seed, epoch=epoch, index=index)
        segments = planned_segments(plan, range(len(plan)), None)
        if labels is not None:
            places = pa.array([place_of[number] for number in segments.example_index.tolist()])
            segments = replace(segments, labels=labels.take(places).combine_chunks())
        rows, undecodable = fill_rows(segments, read_image, config, seed=seed, epoch=epoch)
        self._settle(undecodable, indices is not None)
        if indices is None:
            unknown = np.full(len(rows.segments.example_index), -1)
            rows = replace(rows, segments=replace(rows.segments, example_index=unknown))
        return schema.rows_table(rows, packed_features(config, label).arrow_schema)

    def _packed_tokens(
        self, table: pa.Table, features: Features, indices: list[int] | None
    ) -> pa.Table:
        config = self.config
        if not isinstance(config, TokenConfig):
            config = token_config_from(self.seq_len, self.options)
        names = token_columns_of(features, self.token_columns)
        check_paddings(features, names, config)
        values = value_columns_of(features, names, self.value_columns)
        columns = {name: token_column(table.column(name)) for name in names}
        numbers = np.arange(table.num_rows) if indices is None else np.asarray(indices)
        bad = rejected(columns)
        index = usable(table.num_rows, bad)
        lens = columns[names[0]].lens[index]
        plan = plan_tokens(lens, config, seed=self.seed, epoch=self.epoch, index=index)
        in_source = [
            reject._replace(example_index=int(numbers[reject.example_index])) for reject in bad
        ]
        self._settle(in_source, indices is not None)
        for reject in too_long(plan, columns[names[0]]):
            log.warning("example %d dropped: %s", numbers[reject.example_index], reject.exception)
        rows = packed_table(
            plan,
            range(len(plan)),
            columns,
            {name: table.column(name).combine_chunks() for name in values},
            token_features(features, names, values, config).arrow_schema,
        )
        place = rows.schema.get_field_index("example_index")
        known = rows.column(place).combine_chunks()
        known_numbers = (
            np.full(len(known.values), -1)
            if indices is None
            else numbers[known.flatten().to_numpy()]
        )
        renumbered = pa.ListArray.from_arrays(known.offsets, pa.array(known_numbers))
        return rows.set_column(place, rows.schema.field(place), renumbered)

    def _settle(self, rejects: list[Reject], in_source: bool) -> None:
        for reject in sorted(rejects):
            name = f"example {reject.example_index}" + ("" if in_source else " of the batch")
            what = f"{name} {bad_because(reject)}"
            if self.on_error == "raise":
                remedy = "pass on_error='drop', or use packpipe.pack, which keeps a rejects table"
                raise ValueError(f"{what}; {remedy}")
            log.warning("%s; dropped", what)


def _config_from(
    seq_len: int, options: dict[str, Any], token_columns: str | Sequence[str]
) -> PackConfig | TokenConfig:
    """Return the configuration that options can only mean, or that of images."""
    own = {"overflow", "layout", "pad_token_id", "mask_first_label"}
    of_tokens = token_columns != "auto" or bool(own & options.keys())
    long = isinstance(seq_len, int) and seq_len > MAX_IMAGE_SEQ_LEN
    if of_tokens or (long and not options.keys() - TokenConfig.__dataclass_fields__.keys()):
        return token_config_from(seq_len, options)
    return config_from(seq_len, options)
