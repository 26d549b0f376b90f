"""A build: the folder of a packed dataset, its contents and its manifest (floor 2).

Probes every header, plans once, then has the planned rows filled (`ahead`) and written shard by
shard (`shards`): the plan, not the workers, decides what a row holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import PIL
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from PIL import features as codecs

import packpipe
from packpipe import schema, table
from packpipe.ahead import filled_ahead
from packpipe.config import PackConfig
from packpipe.epoch_plan import EpochPlan
from packpipe.features import packed_features
from packpipe.images import check_settings
from packpipe.lazy import LazyRows
from packpipe.plan import plan_epoch
from packpipe.quality import fill
from packpipe.quarantine import Tolerance
from packpipe.rows import Reject, planned_segments
from packpipe.shards import (
    REJECTS,
    Shards,
    alone_in,
    check_space,
    clear_if_bare,
    in_bytes,
    is_complete,
    naming_full_disks,
    read_manifest,
)
from packpipe.sizes import sizes_of
from packpipe.source import ImageSource, Survey, labels_of, survey

log = logging.getLogger(__name__)

_CODECS = ("jpg", "libjpeg_turbo", "webp", "zlib", "zlib_ng", "libtiff", "jpg_2000", "avif")
# A shard's rows, and what a batch of them brought: rejects, and how many images it took.
_Batch = tuple[pa.Table, list[Reject], int]


@dataclass(frozen=True)
class Build:
    """What `pack` was asked for; names, writes and opens the folder that holds it.

    Attributes:
        dataset: the source.
        image_column, label_column: its columns; no label column is None.
        size_columns: its columns of heights and widths; None reads headers.
        image_root: folder that paths are confined to, or None.
        config, seed, epoch: what the plan is made from.
        materialize: whether pixels are stored, or computed when read.
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

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything the bytes of the folder depend on."""
        return {
            "schema_version": schema.VERSION,
            "packpipe": packpipe.__version__,
            "pillow": PIL.__version__,
            "codecs": {name: codecs.version(name) for name in _CODECS if codecs.check(name)},
            "source_fingerprint": self.dataset._fingerprint,
            "source_files": self._source.files_digest(),
            "image_column": self.image_column,
            "label_column": self.label_column,
            "size_columns": None if self.size_columns is None else list(self.size_columns),
            "image_root": self.image_root,
            "config": self.config.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "materialized": self.materialize,
        }

    def cache_folder(self) -> Path:
        """Return the folder of the `datasets` cache that is this build's own."""
        return Path(datasets.config.HF_DATASETS_CACHE) / "packpipe" / self._digest()[:32]

    def is_at(self, folder: Path) -> bool:
        """Return whether this build is complete in folder; refuse a folder of anything else."""
        return is_complete(folder, self.record)

    def make(
        self,
        folder: Path,
        *,
        num_workers: int,
        image_seconds: float,
        tolerance: Tolerance,
        progress: bool,
        wait: bool,
    ) -> None:
        """Write the folder, or what is missing of it.

        Args:
            folder: where.
            num_workers: as for `pack`.
            image_seconds: likewise.
            progress: likewise.
            tolerance: how many rejects there may be.
            wait: whether to wait for another process that writes it, or to refuse.
        """
        existed = folder.exists()
        try:
            with alone_in(folder, wait=wait):
                if self.is_at(folder):  # another process was first
                    return
                try:
                    self._write(folder, num_workers, image_seconds, tolerance, progress)
                except BaseException:
                    clear_if_bare(folder)
                    raise
        finally:
            with suppress(OSError):  # another process may be in already
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()

    def open(self, folder: Path, on_error: str) -> Dataset:
        """Return the dataset a complete folder holds; on_error is for rows computed when read."""
        names = sorted(name for name in read_manifest(folder)["files"] if name != REJECTS)
        packed = datasets.concatenate_datasets(
            [Dataset.from_file(str(folder / name)) for name in names]
        )
        if self.materialize:
            return packed
        lazy = LazyRows(self._source, self.config, self.seed, self.epoch, self._label, on_error)
        return packed.with_transform(lazy)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _source(self) -> ImageSource:
        rows = self.dataset.select_columns([self.image_column]).with_format("arrow")
        return ImageSource(rows, self.image_root)

    @property
    def _label(self) -> Any:
        return None if self.label_column is None else self.dataset.features[self.label_column]

    @property
    def _features(self) -> Features:
        return packed_features(self.config, self._label, tokens=self.materialize)

    def _write(
        self,
        folder: Path,
        num_workers: int,
        image_seconds: float,
        tolerance: Tolerance,
        progress: bool,
    ) -> None:
        check_settings(self.config.max_pixels)  # processes that decode have their own
        labels = labels_of(self.dataset, self.label_column)
        with ThreadPoolExecutor(max(1, num_workers)) as executor:
            sizes = sizes_of(
                self.dataset,
                self._source,
                self.size_columns,
                max_pixels=self.config.max_pixels,
                executor=executor,
            )
        found = survey(sizes, labels, self._label)
        plan = plan_epoch(
            found.image_hw, self.config, seed=self.seed, epoch=self.epoch, index=found.index
        )
        # At least one shard, so that an empty dataset has its columns too.
        per_shard = max(1, table.FILE_BYTES // self.config.row_bytes)
        packs = _cut(range(len(plan)), per_shard) or [range(0)]
        with naming_full_disks(folder):
            shards = Shards(folder, self.record, [len(some) for some in packs])
        missing = {number: packs[number] for number in shards.missing}
        rejects = found.rejects + shards.rejects
        tolerance.check(rejects)
        packs_done = [len(plan) - sum(map(len, missing.values()))]

        size = self._stored_bytes(plan, missing)
        what = f"{len(found.index):,} images in {len(plan):,} rows"
        check_space(folder, size, what)
        bar = datasets.utils.tqdm(
            desc=f"Packing {what}, {in_bytes(size)}",
            total=_num_images(plan, missing),
            unit=" images",
            disable=not progress,
        )

        def account(batches: Iterator[_Batch], failed: list[Reject]) -> Iterator[pa.Table]:
            for rows, undecodable, num_images in batches:
                failed.extend(undecodable)
                rejects.extend(undecodable)
                tolerance.check(rejects)
                packs_done.append(len(rows))
                bar.set_postfix(packs=sum(packs_done), rejects=len(rejects), refresh=False)
                bar.update(num_images)
                yield rows

        with bar, naming_full_disks(folder):
            per_batch = max(1, table.BATCH_BYTES // self.config.row_bytes)
            batches = {number: _cut(some, per_batch) for number, some in missing.items()}
            every = list(chain(*batches.values()))
            with closing(self._batches(plan, every, labels, num_workers, image_seconds)) as filled:
                self._write_shards(shards, batches, filled, account)
            found = replace(found, rejects=sorted(rejects))
            self._write_sidecars(folder, plan, found, shards)
        if rejects:
            log.warning(
                "%d of %d examples rejected; packpipe.rejects(packed) says which and why",
                len(rejects),
                len(self.dataset),
            )

    def _batches(
        self,
        plan: EpochPlan,
        batches: list[range],
        labels: pa.Array | None,
        num_workers: int,
        image_seconds: float,
    ) -> Generator[_Batch, None, None]:
        """Yield the stored columns of some batches of packs, in order."""
        stored = self._features.arrow_schema
        if not self.materialize:
            for packs in batches:
                segments = planned_segments(plan, packs, labels)
                yield schema.segments_table(segments, stored), [], len(segments.seq_lens)
            return
        filled = filled_ahead(
            plan, batches, labels, self._source, num_workers=num_workers, seconds=image_seconds
        )
        with closing(filled):
            for rows, failed in filled:
                num_images = len(rows.segments.seq_lens) + len(failed)
                yield schema.rows_table(rows, stored), failed, num_images

    def _write_shards(
        self,
        shards: Shards,
        batches: dict[int, list[range]],
        filled: Iterator[_Batch],
        account: Callable[[Iterator[_Batch], list[Reject]], Iterator[pa.Table]],
    ) -> None:
        """Write shards from the batches that fill them; one is synced while the next is written."""
        stored = self._features.arrow_schema
        committed: Future[None] | None = None
        with ThreadPoolExecutor(1) as committing:
            for number, some in batches.items():
                failed: list[Reject] = []
                tables = account(islice(filled, len(some)), failed)
                written = table.write_stream(shards.path(number), stored, tables)
                if committed is not None:
                    committed.result()
                committed = committing.submit(shards.commit, number, written, failed)
            if committed is not None:
                committed.result()

    def _write_sidecars(self, folder: Path, plan: EpochPlan, found: Survey, shards: Shards) -> None:
        # `datasets.load_from_disk` opens the folder by these two.
        DatasetInfo(features=self._features).write_to_directory(str(folder))
        table.write_json(folder / "state.json", _state(shards.names, self._digest()[:16]))
        rejects = table.write_table(
            folder / REJECTS, schema.REJECTS, [schema.rejects_table(found.rejects)]
        )
        counts = _counts(plan, found, len(self.dataset))
        share = fill(counts["tokens"], len(plan), self.config.seq_len)
        shards.finish(rejects, counts=counts, fill=share)

    def _stored_bytes(self, plan: EpochPlan, missing: dict[int, range]) -> int:
        """Return about how many bytes some packs take on the disk."""
        # Five lists of one offset each; lengths, grid, size, index and (a guess) label.
        row, segment = 5 * 4, 4 + 4 + 8 + 8 + 8
        if self.materialize:
            row += self.config.row_bytes + self.config.seq_len * 8
        return row * sum(map(len, missing.values())) + segment * _num_images(plan, missing)


def read_rejects(folder: Path) -> list[Reject]:
    """Return the rejects of a complete folder."""
    stored = Dataset.from_file(str(folder / REJECTS))
    return [Reject(**row) for row in stored]


def _cut(packs: range, step: int) -> list[range]:
    """Return consecutive ranges of step packs; none if there are no packs."""
    return [packs[start : start + step] for start in range(0, len(packs), step)]


def _num_images(plan: EpochPlan, packs: dict[int, range]) -> int:
    """Return how many images are in some packs."""
    return sum(int(plan.offsets[some.stop] - plan.offsets[some.start]) for some in packs.values())


def _counts(plan: EpochPlan, found: Survey, num_examples: int) -> dict[str, Any]:
    """Return the manifest's counts; an image that failed when decoded gave no tokens."""
    rejects = found.rejects
    lost = [reject.example_index for reject in rejects if reject.stage == "decode"]
    lost_tokens = (
        dict(zip(plan.index.tolist(), plan.num_keep.tolist(), strict=True)) if lost else {}
    )
    return {
        "read": num_examples,
        "packed": num_examples - len(rejects),
        "rejected": len(rejects),
        "rejected_by_reason": dict(sorted(Counter(r.reason for r in rejects).items())),
        "shrunk": plan.num_shrunk,
        "broken_exif": found.broken_exif,
        "packs": len(plan),
        "bound": plan.bound,
        "tokens": plan.num_tokens - sum(lost_tokens[example] for example in lost),
    }


def _state(data_files: list[str], fingerprint: str) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": name} for name in data_files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
