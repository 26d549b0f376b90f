"""Rows of images, for a build: every header is probed, then planned, then decoded."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from datasets import Dataset, Features
from numpy.typing import NDArray
from PIL import features as codecs

from packpipe._version import __version__
from packpipe.building.job import Batch
from packpipe.images.opening import check_settings
from packpipe.packing.quality import Quality
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.rows import schema
from packpipe.rows.fill_ahead import filled_ahead
from packpipe.rows.fill_images import planned_segments
from packpipe.rows.rejects import Reject
from packpipe.sources.features import packed_features
from packpipe.sources.image_source import ImageSource, labels_of
from packpipe.sources.lazy_rows import LazyRows
from packpipe.sources.sizes import sizes_of
from packpipe.sources.survey import Survey, survey

_CODECS = ("jpg", "libjpeg_turbo", "webp", "zlib", "zlib_ng", "libtiff", "jpg_2000", "avif")


@dataclass(frozen=True, eq=False)
class Beside:
    """What packs hold of each example beside its image, in rows of their own.

    Attributes:
        lens: int64[rows of the source], its tokens.
        seq_len: most of them in a pack.
        rejects: examples that have none that can be packed.
        record: everything the above depend on.
    """

    lens: NDArray[np.int64]
    seq_len: int
    rejects: list[Reject]
    record: dict[str, Any]


@dataclass(frozen=True)
class ImageContents:
    """What `pack` was asked to make of images.

    Attributes:
        dataset: the source.
        image_column, label_column: its columns; no label column is None.
        size_columns: its columns of heights and widths; None reads headers.
        image_root: folder that paths are confined to, or None.
        config, seed, epoch: what the plan is made from.
        materialize: whether pixels are stored, or computed when read.
        num_workers, image_seconds: as for `pack`; no byte depends on them.
        beside: what else packs hold of each example, or None.
    """

    dataset: Dataset
    image_column: str
    label_column: str | None
    size_columns: tuple[str, str] | None
    image_root: str | None
    config: PackConfig
    seed: int
    epoch: int
    materialize: bool
    num_workers: int
    image_seconds: float
    beside: Beside | None = None

    @property
    def num_examples(self) -> int:
        """Examples of the source."""
        return len(self.dataset)

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""
        supported = codecs.get_supported()
        return {
            "schema_version": schema.VERSION,
            "packpipe": __version__,
            "pillow": PIL.__version__,
            "codecs": {name: codecs.version(name) for name in _CODECS if name in supported},
            "source_fingerprint": self.dataset._fingerprint,
            "source_files": self.source.files_digest(),
            "image_column": self.image_column,
            "label_column": self.label_column,
            "size_columns": None if self.size_columns is None else list(self.size_columns),
            "image_root": self.image_root,
            "config": self.config.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "materialized": self.materialize,
            **({} if self.beside is None else {"beside": self.beside.record}),
        }

    @property
    def features(self) -> Features:
        """Features of the stored rows."""
        return packed_features(self.config, self.label, tokens=self.materialize)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's patches."""
        return self.config.row_bytes

    @cached_property
    def source(self) -> ImageSource:
        """The images."""
        rows = self.dataset.select_columns([self.image_column]).with_format("arrow")
        return ImageSource(rows, self.image_root)

    @property
    def label(self) -> Any:
        """Feature of the labels, or None."""
        return None if self.label_column is None else self.dataset.features[self.label_column]

    def plan(self) -> PlannedImages:
        """Return the packs; reads every header that is not known yet."""
        return self._planned

    @cached_property
    def _planned(self) -> PlannedImages:
        check_settings(self.config.max_pixels)  # processes that decode have their own
        labels = labels_of(self.dataset, self.label_column)
        with ThreadPoolExecutor(max(1, self.num_workers)) as executor:
            sizes = sizes_of(
                self.dataset,
                self.source,
                self.size_columns,
                max_pixels=self.config.max_pixels,
                executor=executor,
            )
        found = survey(sizes, labels, self.label)
        also = None
        if self.beside is not None:
            found = found.without(self.beside.rejects)
            also = self.beside.lens[found.index], self.beside.seq_len
        plan = plan_epoch(
            found.image_hw,
            self.config,
            seed=self.seed,
            epoch=self.epoch,
            index=found.index,
            also=also,
        )
        return PlannedImages(self, found, labels, plan)

    def opened(self, stored: Dataset, on_error: str) -> Dataset:
        """Return the stored rows, or rows that are computed when read."""
        if self.materialize:
            return stored
        return stored.with_transform(
            LazyRows(self.source, self.config, self.seed, self.epoch, self.label, on_error)
        )


@dataclass(frozen=True)
class PlannedImages:
    """Packs of images, before they are decoded."""

    contents: ImageContents
    found: Survey
    labels: pa.Array | None
    epoch_plan: EpochPlan
    unit: str = "image"

    @property
    def num_packs(self) -> int:
        """How many packs there are."""
        return len(self.epoch_plan)

    @property
    def seq_len(self) -> int:
        """Tokens a pack holds."""
        return self.contents.config.seq_len

    @property
    def quality(self) -> Quality:
        """Fill, bound, gap and the other figures."""
        return self.epoch_plan.quality

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32[images], tokens kept of each."""
        return self.epoch_plan.num_keep

    @property
    def rejects(self) -> list[Reject]:
        """Images whose header or label is bad."""
        return self.found.rejects

    @property
    def what(self) -> str:
        """What is packed, for a reader."""
        return f"{len(self.found.index):,} images in {self.num_packs:,} rows"

    def num_examples(self, packs: range) -> int:
        """Return how many images are in some packs."""
        offsets = self.epoch_plan.offsets
        return int(offsets[packs.stop] - offsets[packs.start])

    def stored_bytes(self, packs: list[range]) -> int:
        """Return about how many bytes some packs take on the disk."""
        # Five lists of one offset each; lengths, grid, size, index and (a guess) label.
        row, segment = 5 * 4, 4 + 4 + 8 + 8 + 8
        if self.contents.materialize:
            row += self.contents.row_bytes + self.seq_len * 8
        return row * sum(map(len, packs)) + segment * sum(map(self.num_examples, packs))

    def batches(self, packs: list[range]) -> Generator[Batch, None, None]:
        """Yield the rows of packs, one batch for each range of them."""
        contents, plan = self.contents, self.epoch_plan
        stored = contents.features.arrow_schema
        if not contents.materialize:
            for some in packs:
                segments = planned_segments(plan, some, self.labels)
                rows = schema.segments_table(segments, stored)
                yield Batch(rows, [], len(segments.seq_lens))
            return
        filled = filled_ahead(
            plan,
            packs,
            self.labels,
            contents.source,
            num_workers=contents.num_workers,
            seconds=contents.image_seconds,
        )
        with closing(filled):
            for rows, failed in filled:
                num_images = len(rows.segments.seq_lens) + len(failed)
                yield Batch(schema.rows_table(rows, stored), failed, num_images)

    def counts(self, rejects: list[Reject]) -> dict[str, int]:
        """Return the manifest's counts; an image that failed when decoded gave no tokens."""
        plan = self.epoch_plan
        lost = [reject.example_index for reject in rejects if reject.stage == "decode"]
        tokens = dict(zip(plan.index.tolist(), plan.num_keep.tolist(), strict=True)) if lost else {}
        return {
            "shrunk": plan.num_shrunk,
            "broken_exif": self.found.broken_exif,
            "packs": len(plan),
            "bound": plan.bound,
            "tokens": plan.num_tokens - sum(tokens[example] for example in lost),
        }
